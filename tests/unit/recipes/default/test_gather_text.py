"""English text beside what is spoken: tidy, wide in its words, and no sentence of a test."""

import json
import sys
from collections import Counter
from pathlib import Path
from random import Random
from types import ModuleType

import pytest

TEST_SENTENCES = ["They were three hundred yards apart.", "My watch is broken."]


def test_running_text_becomes_sentences_whatever_its_lines(gather_text: ModuleType) -> None:
    text = "CHAPTER 1\n\nCall me Ishmael. Some years\nago it was cold! So I went\n\nTo sea."
    assert gather_text.sentences_of(text) == [
        "CHAPTER 1", "Call me Ishmael.", "Some years ago it was cold!", "So I went", "To sea.",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "written"),
    [
        ("draw air into the lungs", "Draw air into the lungs."),
        ("  “Well,”  he said—’tis late  ", "Well, he said, tis late."),
        ("Who goes\nthere?", "Who goes there?"),
        ("He doesn’t 'see' it", "He doesn't see it."),
        ("THE WHITE WHALE", None),
        ("In 1817 he left", None),
        ("naïve in a way", None),
        ("too short", None),
        (" ".join(["long"] * 29), None),
    ],
)
def test_sentences_are_written_as_they_are_spoken(
    gather_text: ModuleType, raw: str, written: str | None
) -> None:
    assert gather_text.tidy(raw) == written


def test_a_long_sentence_falls_into_its_clauses(gather_text: ModuleType) -> None:
    half = " ".join(["word"] * 20)
    assert gather_text.clauses(f"{half}; {half}.") == [f"{half};", f"{half}."]
    assert gather_text.clauses(f"{half}, and {half}.") == [f"{half},", f"and {half}."]
    assert gather_text.clauses(f"{half} {half}") == []


def test_no_sentence_of_a_test_nor_a_part_of_one_is_kept(gather_text: ModuleType) -> None:
    sentences = [
        "They were three hundred yards apart!",
        "He said they were three hundred yards away.",
        "My watch is broken.",
        "They were three hundred men.",
        "He says my watch is broken.",
    ]
    assert gather_text.without(sentences, TEST_SENTENCES) == sentences[3:]


def test_what_is_chosen_holds_every_known_word_and_little_else(gather_text: ModuleType) -> None:
    common = [f"The cat sat on mat number {n} of them." for n in "abcdefghij" * 20]
    rare = [f"An oppressive {word} came by." for word in "abcdefghij"]
    slip = "An opressive thing came by."
    known = Counter({"the": 99, "cat": 99, "sat": 99, "on": 99, "mat": 99, "number": 99, "of": 99,
                     "them": 99} | dict.fromkeys("abcdefghij", 99))  # fmt: skip
    chosen = gather_text.choose([*common, *rare, slip], known, Random(0))  # noqa: S311 - a draw
    assert set(rare) <= set(chosen)
    assert not set(common) & set(chosen)
    assert known["oppressive"] == len(rare)


def test_the_script_reads_a_dictionary_and_books(
    gather_text: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in gather_text.HELD_OUT_MANIFESTS:
        path = tmp_path / "manifests" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        rows = [{"audio": "a.flac", "text": text} for text in TEST_SENTENCES]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    gloss = 'draw air (of any kind) into, and expel out of, the lungs; "I can breathe better now"'
    for part in ("adj", "adv", "noun", "verb"):
        (tmp_path / f"data.{part}").write_text(f"00001740 29 v 01 breathe 0 | {gloss}  \n")
    (tmp_path / "known.txt").write_text("Well, now, that's right.\n")
    book = "I can breathe here. My watch is broken. I can't breathe into the lungs.\n\n"
    (tmp_path / "book.txt").write_text(book)
    monkeypatch.setattr(gather_text, "KNOWN", 2)
    monkeypatch.setattr(sys, "argv", [
        "gather_text.py", "--data-dir", str(tmp_path), "--known", str(tmp_path / "known.txt"),
        "--wordnet", str(tmp_path), "--text", str(tmp_path / "book.txt"),
        "--output", str(tmp_path / "text.txt"),
    ])  # fmt: skip
    gather_text.main()
    assert set((tmp_path / "text.txt").read_text().splitlines()) == {
        "Draw air into, and expel out of, the lungs.", "I can breathe better now.",
        "I can breathe here.", "I can't breathe into the lungs.",
    }  # fmt: skip
