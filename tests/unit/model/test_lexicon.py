"""A lexicon read by tokens, against the whole text's words."""

import codecs
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from model.lexicon import BEGIN, Lexicon, Spelling, words_of

WORDS = ["a", "ab", "abba", "bab", "й", "йа", "ёж"]
# Parts of words, capitals, marks between them, halves of characters, and nothing (special tokens).
TOKENS = [
    *(text.encode() for text in ["a", "b", "ab", "BA", "bab", "й", "Ё", "ж", "'", " ", "3", "."]),
    *(text.encode() for text in [" a", " ab", " B", " й", "a'", "b a", " x", ". A", "b ", " b ab"]),
    *(b"\xd0", b"\xd1", b"\xb0", b"\xb9", b"\x91", b" \xd0", b"a\xd1", b"\xb9a", b"\xb6 b", b""),
]


def text_of(tokens: list[int]) -> str:
    """What the tokens write, without the rest of a character that is not whole yet."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return decoder.decode(b"".join(TOKENS[index] for index in tokens))


def count_outside(text: str, words: list[str]) -> int:
    """Words of a text that are outside, the last being one that may go on."""
    *whole, last = "".join(
        letter if unicodedata.category(letter)[0] in "LM" else " " for letter in text.lower()
    ).split(" ")
    outside = [word for word in whole if word and word not in words]
    return len(outside) + all(not word.startswith(last) for word in words)


def read(lexicon: Lexicon, tokens: list[int]) -> Spelling:
    spelling = BEGIN
    for index in tokens:
        spelling = lexicon.read(spelling, index)
    return spelling


answers = st.lists(st.integers(0, len(TOKENS) - 1), max_size=12)


@example([TOKENS.index(b"a\xd1")], {"ab"}, [])  # within a word, and within a character
@given(answers, st.sets(st.sampled_from(WORDS), min_size=1), st.lists(st.sampled_from(WORDS)))
def test_a_token_brings_a_word_outside_where_the_text_has_one_more(
    answer: list[int], words: set[str], own: list[str]
) -> None:
    lexicon = Lexicon(words, 2.5, TOKENS).with_words(own)
    spelling = read(lexicon, answer)
    known = [*words, *own]
    before = count_outside(text_of(answer), known)
    outside = lexicon.brings_outside(spelling).tolist()
    for index, is_outside in enumerate(outside):
        brings = count_outside(text_of([*answer, index]), known) > before
        assert is_outside == brings, TOKENS[index]
    assert lexicon.ends_outside(spelling) == (count_outside(text_of(answer) + " ", known) > before)


def test_a_request_s_own_words_are_its_own() -> None:
    lexicon = Lexicon(["ab"], 2.5, TOKENS)
    more = lexicon.with_words(["Bab, ёж!", "ab"])
    b, bab = TOKENS.index(b"b"), TOKENS.index(b"bab")
    assert lexicon.brings_outside(BEGIN)[bab]
    assert not more.brings_outside(BEGIN)[bab]
    assert (lexicon.read(BEGIN, b).letters, more.read(BEGIN, b).letters) == (None, "b")
    assert more.words == lexicon.words
    assert lexicon.with_words(["AB"]) is lexicon
    for number in range(20):  # many requests, each with its own
        assert lexicon.with_words([f"{'b' * number}"]).words == lexicon.words


def test_ids_beyond_the_tokens_say_nothing() -> None:
    lexicon = Lexicon(["ab"], 2.5, TOKENS)
    spelling = lexicon.read(BEGIN, TOKENS.index(b"a"))
    assert lexicon.read(spelling, len(TOKENS) + 5) == spelling


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't stop, 2nd try!", ["don", "t", "stop", "nd", "try"]),
        ("Тэр Й ёлка; ӨНДӨР", ["тэр", "й", "ёлка", "өндөр"]),
        ("и\u0306", ["й"]),  # NFC
        ("co\u0332op", ["co\u0332op"]),  # a mark that no letter holds
        ("H\u0331ayya", ["\u1e96ayya"]),  # one character in lower case only
        ("12 + …", []),
    ],
)
def test_words_are_runs_of_letters(text: str, words: list[str]) -> None:
    assert list(words_of(text)) == words
    if words:
        assert Lexicon(words, 2.5, TOKENS).words == set(words)


@pytest.mark.parametrize(
    ("words", "reason"),
    [([], "needs a word"), (["ab", "Ab"], "'Ab' is not a word"), (["a b"], "'a b' is not a word")],
)
def test_what_is_no_lexicon_is_refused(words: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Lexicon(words, 2.5, TOKENS)
