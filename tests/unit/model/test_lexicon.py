"""A lexicon read by tokens, against the whole text's words."""

import codecs
import unicodedata

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from model.lexicon import BEGIN, Lexicon, Spelling, words_of

WORDS = ["a", "ab", "abba", "bab", "й", "йа", "ёж"]
# Parts of words, capitals, marks between them, halves of characters, and nothing (special tokens).
TOKENS = [
    *(text.encode() for text in ["a", "b", "ab", "BA", "bab", "й", "Ё", "ж", "'", " ", "3", "."]),
    *(text.encode() for text in [" a", " ab", " B", " й", "a'", "b a", " x", ". A", "b ", " b ab"]),
    *(b"\xd0", b"\xd1", b"\xb0", b"\xb9", b"\x91", b" \xd0", b"a\xd1", b"\xb9a", b"\xb6 b", b""),
]
PENALTY = 2.5


def text_of(tokens: list[int]) -> str:
    return b"".join(TOKENS[index] for index in tokens).decode(errors="ignore")


def count_outside(text: str, words: list[str]) -> int:
    """Words of a text that are outside, the last being one that may go on."""
    *whole, last = "".join(
        letter if unicodedata.category(letter)[0] in "LM" else " " for letter in text.lower()
    ).split(" ")
    outside = [word for word in whole if word and word not in words]
    return len(outside) + all(not word.startswith(last) for word in words)


def is_text(tokens: list[int]) -> bool:
    """Whether the tokens write characters, but perhaps for the rest of the last one."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(b"".join(TOKENS[index] for index in tokens))
    except UnicodeDecodeError:
        return False
    return True


def read(lexicon: Lexicon, tokens: list[int]) -> Spelling:
    spelling = BEGIN
    for index in tokens:
        spelling = lexicon.read(spelling, index)
    return spelling


answers = st.lists(st.integers(0, len(TOKENS) - 1), max_size=12)


@given(answers, st.sets(st.sampled_from(WORDS), min_size=1), st.lists(st.sampled_from(WORDS)))
def test_a_token_costs_what_brings_a_word_outside(
    answer: list[int], words: set[str], own: list[str]
) -> None:
    assume(is_text(answer))
    lexicon = Lexicon(words, PENALTY, TOKENS).with_words(own)
    spelling = read(lexicon, answer)
    known = [*words, *own]
    before = count_outside(text_of(answer), known)
    penalties = lexicon.penalties(spelling).tolist()
    for index, penalty in enumerate(penalties):
        if is_text([*answer, index]):
            brings = count_outside(text_of([*answer, index]), known) > before
            assert penalty == PENALTY * brings, TOKENS[index]
    ended = count_outside(text_of(answer) + " ", known) > before
    assert lexicon.end_penalty(spelling) == PENALTY * ended


def test_a_request_s_own_words_are_its_own() -> None:
    lexicon = Lexicon(["ab"], PENALTY, TOKENS)
    more = lexicon.with_words(["Bab, ёж!", "ab"])
    b, bab = TOKENS.index(b"b"), TOKENS.index(b"bab")
    assert (lexicon.penalties(BEGIN)[bab], more.penalties(BEGIN)[bab]) == (PENALTY, 0)
    assert (lexicon.read(BEGIN, b).letters, more.read(BEGIN, b).letters) == (None, "b")
    assert more.words == lexicon.words
    assert lexicon.with_words(["AB"]) is lexicon


def test_ids_beyond_the_tokens_say_nothing() -> None:
    lexicon = Lexicon(["ab"], PENALTY, TOKENS)
    spelling = lexicon.read(BEGIN, TOKENS.index(b"a"))
    assert lexicon.read(spelling, len(TOKENS) + 5) == spelling


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't stop, 2nd try!", ["don", "t", "stop", "nd", "try"]),
        ("Тэр Й ёлка; ӨНДӨР", ["тэр", "й", "ёлка", "өндөр"]),
        ("и\u0306", ["й"]),  # NFC
        ("co\u0332op", ["co\u0332op"]),  # a mark that no letter holds
        ("12 + …", []),
    ],
)
def test_words_are_runs_of_letters(text: str, words: list[str]) -> None:
    assert list(words_of(text)) == words


@pytest.mark.parametrize(
    ("words", "reason"),
    [([], "needs a word"), (["ab", "Ab"], "'Ab' is not a word"), (["a b"], "'a b' is not a word")],
)
def test_what_is_no_lexicon_is_refused(words: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Lexicon(words, PENALTY, TOKENS)
