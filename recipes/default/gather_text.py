"""Choose English sentences that hold words which the Common Voice sentences seldom or never say.

The LM misspells what it never read: on dev, words that its text held a hundred times and more were
wrong at 8 %, those that it held twice at most at 67 %. Sources are the glosses and
examples of WordNet and books or speeches as plain text. A sentence is kept while one of its words
is still rare in what was kept, so that a million words do for a vocabulary of some ten thousands.
No sentence that is one of a dev or test split, or shares five words in a row with one, is kept.
"""

from __future__ import annotations

import argparse
import random
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from prepare import read_rows
from synthesise import HELD_OUT_MANIFESTS, comparable

if TYPE_CHECKING:
    from collections.abc import Iterable

SHORTEST, LONGEST = 3, 28  # words
N_SHARED = 5  # words in a row that no sentence may share with a test
RARE = 20  # occurrences below which a word is wanted
KNOWN = 8  # occurrences in all sources, from which on a word is no slip of a pen
_WRITABLE = re.compile(r"[A-Za-z ,.!?'\-;:]+")


def glosses(folder: Path) -> list[str]:
    """Definitions and examples of WordNet, a sentence each."""
    found: list[str] = []
    for part in ("adj", "adv", "noun", "verb"):
        lines = (folder / f"data.{part}").read_text(encoding="utf-8").splitlines()
        for gloss in (line.partition(" | ")[2] for line in lines):
            found += re.findall(r'"([^"]+)"', gloss)
            definition = re.sub(r'"[^"]*"?|\([^)]*\)', " ", gloss)
            found += definition.split(";")
    return found


def sentences_of(text: str) -> list[str]:
    """Sentences of running text, whose lines may be broken anywhere."""
    paragraphs = re.split(r"\n\s*\n", text)
    return [
        sentence
        for paragraph in paragraphs
        for sentence in re.split(r"(?<=[.!?])[\"']?\s+(?=[\"']?[A-Z])", " ".join(paragraph.split()))
    ]


def clauses(sentence: str) -> list[str]:
    """The sentence, or its pieces between marks where it is too long."""
    if len(sentence.split()) <= LONGEST:
        return [sentence]
    pieces = re.split(r"(?<=[;:])\s+|\s*--\s*", sentence)
    if len(pieces) == 1:
        pieces = re.split(r"(?<=,)\s+(?=and |but |or |which |that |who |where |when )", sentence)
    return [piece for piece in pieces if len(piece.split()) <= LONGEST]


def tidy(sentence: str) -> str | None:
    """The sentence as Common Voice writes one; None for what can't be spoken as it is written."""
    plain = unicodedata.normalize("NFKC", sentence).replace("’", "'").replace("—", ", ")
    plain = re.sub(r'["_*“”]|(?<!\w)\'|\'(?!\w)', "", plain)
    plain = re.sub(r"\s+", " ", plain).strip(" ,;:-.")
    plain = re.sub(r"\s+([,.;:!?])", r"\1", plain)
    if not SHORTEST <= len(plain.split()) <= LONGEST or not _WRITABLE.fullmatch(plain):
        return None
    if sum(word.isupper() and len(word) > 1 for word in plain.split()) > 1:
        return None  # a heading
    end = "" if plain[-1] in "!?" else "."
    return plain[0].upper() + plain[1:] + end


def runs_of_words(sentence: str) -> set[tuple[str, ...]]:
    """All runs of N_SHARED words; of a shorter sentence, all of it."""
    words = comparable(sentence).split()
    return {tuple(words[i : i + N_SHARED]) for i in range(max(1, len(words) - N_SHARED + 1))}


def without(sentences: Iterable[str], held_out: list[str]) -> list[str]:
    """The sentences that are none of those held out and share no run of words with one."""
    runs = set().union(*map(runs_of_words, held_out))
    return [sentence for sentence in sentences if runs.isdisjoint(runs_of_words(sentence))]


def choose(sentences: list[str], known: Counter[str], rng: random.Random) -> list[str]:
    """Sentences with a word that is rare in `known` and in those chosen before."""
    totals = Counter(word for sentence in sentences for word in comparable(sentence).split())
    kept = []
    for sentence in rng.sample(sentences, len(sentences)):
        words = comparable(sentence).split()
        if any(known[word] < RARE and totals[word] >= KNOWN for word in words):
            kept.append(sentence)
            known.update(words)
    return kept


def main() -> None:
    """Write the sentences."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--known", type=Path, required=True, help="text that is there already")
    parser.add_argument("--wordnet", type=Path, help="folder of WordNet's data.noun and so on")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="books, speeches")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    manifests = options.data_dir / "manifests"
    held_out = [
        row["text"]
        for name in HELD_OUT_MANIFESTS
        for row in read_rows(manifests / f"{name}.jsonl", options.data_dir)
    ]
    raw = glosses(options.wordnet) if options.wordnet else []
    for path in options.text:
        raw += sentences_of(path.read_text(encoding="utf-8", errors="replace"))
    tidied = (tidy(clause) for sentence in raw for clause in clauses(sentence))
    sentences = without(dict.fromkeys(text for text in tidied if text), held_out)
    known = Counter(comparable(options.known.read_text(encoding="utf-8")).split())
    kept = choose(sentences, known, random.Random(0))  # noqa: S311 - a draw
    options.output.write_text("\n".join(kept) + "\n", encoding="utf-8")
    n_words = sum(len(sentence.split()) for sentence in kept)
    print(f"{len(kept)} of {len(sentences)} sentences, {n_words} words")  # noqa: T201 - a report


if __name__ == "__main__":
    main()
