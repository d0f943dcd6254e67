"""A lexicon: the words that an answer is likely made of, and what another word costs.

A small LLM on an unknown voice spells by ear ("proceedger"). In the search for the best answer each
word outside the lexicon costs a penalty, from the token on with which no word of the lexicon begins
any more, so that a beam that spells a word takes the place of one that does not. Words that nobody
has listed, names for instance, can still be written where the audio is clear enough.

A word is a run of letters and their marks, in lower case; all else parts words.

Axis legend: V vocabulary.

Source of the idea: the score of unknown words in Flashlight's lexicon decoder (Kahn et al. 2022,
arXiv 2201.12465). Here the lexicon is soft, and read by the LLM's tokens. Own code.
"""

from __future__ import annotations

import codecs
import unicodedata
from copy import copy
from functools import cache
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

_CACHED_BYTES = 1 << 25  # for what follows where; beyond, it is worked out again
_KEPT_STEPS = 1 << 14
_KEPT_EXTENSIONS = 8  # by words of requests


class Spelling(NamedTuple):
    """Where an answer stands in a word.

    Attributes:
        letters: of the word so far; None where it is outside the lexicon already.
        rest: bytes of a character that is not whole yet.
    """

    letters: str | None = ""
    rest: bytes = b""


BEGIN = Spelling()
"""Before the first letter of a word."""


class Lexicon:
    """Words, and how tokens spell them."""

    def __init__(self, words: Iterable[str], penalty: float, tokens: Sequence[bytes]) -> None:
        """Keep the words, and how each token begins and goes on.

        Args:
            words: lower case, letters alone.
            penalty: in nats, of each word that is none of them.
            tokens: (V,) UTF-8 that each token of the LLM writes; none of special tokens.

        Raises:
            ValueError: there are no words, or one of them is not a single word in lower case.
        """
        self.words = check_words(words)
        self.penalty = penalty
        self._next = _next_letters(self.words)
        # What a request's own words add.
        self._own_words: frozenset[str] = frozenset()
        self._own_next: dict[str, str] = {}
        self._tokens = tokens
        self._lay_out()
        self._forget(_CACHED_BYTES)
        self._extended: dict[tuple[str, ...], Lexicon] = {}

    def _lay_out(self) -> None:
        """Sort the tokens by the letters with which they go on with a word."""
        self._heads: dict[str, int] = {}
        self._head = np.zeros(len(self._tokens), dtype=np.int64)  # index of each token's
        self._parts = np.zeros(len(self._tokens), dtype=bool)  # something that ends a word follows
        self._errs = np.zeros(len(self._tokens), dtype=bool)  # further on, whatever stands before
        self._unknown_tails: dict[str, list[int]] = {}  # with which they begin a word, wrongly
        self._continuing: list[int] = []  # tokens that begin within a character
        for index, token in enumerate(self._tokens):
            text, _ = _decode(token)
            head = "".join(takewhile(_is_letter, text))
            self._head[index] = self._heads.setdefault(_lower(head), len(self._heads))
            if len(head) < len(text):
                self._parts[index] = True
                tail = "".join(takewhile(_is_letter, reversed(text)))[::-1]
                within = text[len(head) : len(text) - len(tail)]
                errs_within = self._read(BEGIN, within.encode())[1]
                if errs_within or (tail and not self._is_beginning(_lower(tail))):
                    self._errs[index] = True
                    if not errs_within:
                        self._unknown_tails.setdefault(_lower(tail), []).append(index)
            if token and token[0] & 0xC0 == 0x80:  # noqa: PLR2004 - UTF-8's continuation bytes
                self._continuing.append(index)
        self._heads_next = _next_letters(self._heads)
        self._is_empty = np.array([not token for token in self._tokens])

    def _forget(self, cached_bytes: int) -> None:
        """Begin to remember anew what follows where, within so many bytes."""
        self._most_places = max(16, cached_bytes // len(self._tokens))
        self._places: dict[Spelling, NDArray[np.bool_]] = {}
        self._steps: dict[tuple[Spelling, int], Spelling] = {}

    def with_words(self, text: Iterable[str]) -> Lexicon:
        """This lexicon with the words of some texts, a request's hotwords for instance.

        A token that holds such a word whole, between others, costs what it did.
        """
        key = tuple(text)
        if key not in self._extended:
            if len(self._extended) == _KEPT_EXTENSIONS:
                self._extended.clear()
            self._extended[key] = self._extend(key)
        return self._extended[key]

    def _extend(self, texts: Sequence[str]) -> Lexicon:
        words = self._own_words.union(word for text in texts for word in words_of(text))
        if words <= self.words:
            return self
        more = copy(self)
        more._own_words = words
        more._own_next = _next_letters(words)
        more._errs = self._errs.copy()
        for tail in more._own_next.keys() & self._unknown_tails.keys():
            more._errs[self._unknown_tails[tail]] = False
        more._forget(_CACHED_BYTES // _KEPT_EXTENSIONS)
        more._extended = {}
        return more

    def brings_outside(self, spelling: Spelling) -> NDArray[np.bool_]:
        """Which next tokens (V,) bring a word outside, behind an answer that stands there."""
        if spelling not in self._places:
            if len(self._places) >= self._most_places:
                self._places.clear()
            self._places[spelling] = self._find_outside(spelling)
        return self._places[spelling]

    def ends_outside(self, spelling: Spelling) -> bool:
        """Whether an answer that ends there ends within a word."""
        return bool(spelling.letters) and not self._is_word(spelling.letters or "")

    def read(self, spelling: Spelling, token_id: int) -> Spelling:
        """Where an answer stands with one more token."""
        key = (spelling, token_id)
        if key not in self._steps:
            if len(self._steps) >= _KEPT_STEPS:
                self._steps.clear()
            token = self._tokens[token_id] if token_id < len(self._tokens) else b""
            self._steps[key] = self._read(spelling, token)[0]
        return self._steps[key]

    def _read(self, spelling: Spelling, token: bytes) -> tuple[Spelling, bool]:
        """Where an answer stands with more bytes, and whether a word of them is outside."""
        text, rest = _decode(spelling.rest + token)
        letters, is_outside = spelling.letters, False
        for character in _lower(text):
            if not _is_letter(character):
                is_outside |= bool(letters) and not self._is_word(letters or "")
                letters = ""
            elif letters is not None:
                letters += character
                if not self._is_beginning(letters):
                    letters, is_outside = None, True
        return Spelling(letters, rest), is_outside

    def _find_outside(self, spelling: Spelling) -> NDArray[np.bool_]:
        letters = spelling.letters
        if spelling.rest:
            return self._find_outside_within(spelling)
        if letters is None:
            return self._errs
        begins, is_word = np.zeros((2, len(self._heads)), dtype=bool)
        heads = [""]
        while heads:  # all with which both a token and the rest of a word begin
            head = heads.pop()
            word = letters + head
            if head in self._heads:
                place = self._heads[head]
                begins[place], is_word[place] = True, not word or self._is_word(word)
            follow = self._next.get(word, "") + self._own_next.get(word, "")
            heads += [
                head + letter for letter in self._heads_next.get(head, "") if letter in follow
            ]
        fits = np.where(self._parts, is_word[self._head], begins[self._head])
        outside: NDArray[np.bool_] = self._errs | ~fits
        return outside

    def _find_outside_within(self, spelling: Spelling) -> NDArray[np.bool_]:
        """The same within a character; a token that does not go on with it ends the word."""
        outside = self.brings_outside(BEGIN) | self.ends_outside(spelling)
        outside[self._is_empty] = False
        for index in self._continuing:
            outside[index] = self._read(spelling, self._tokens[index])[1]
        return outside

    def _is_word(self, word: str) -> bool:
        return word in self.words or word in self._own_words

    def _is_beginning(self, letters: str) -> bool:
        return letters in self._next or letters in self._own_next


def check_words(words: Iterable[str]) -> frozenset[str]:
    """The words of a lexicon.

    Raises:
        ValueError: there are none, or one of them is not a single word in lower case.
    """
    checked = frozenset(words)
    if not checked:
        raise ValueError("a lexicon needs a word")
    for word in checked:
        if not word or _lower(word) != word or not all(map(_is_letter, word)):
            raise ValueError(f"{word!r} is not a word in lower case letters")
    return checked


def words_of(text: str) -> Iterator[str]:
    """The words of a text in order: runs of letters, NFC, in lower case."""
    word = ""
    # Some letters with a mark are one character in lower case only.
    lower = unicodedata.normalize("NFC", _lower(unicodedata.normalize("NFC", text)))
    for character in lower + " ":
        if _is_letter(character):
            word += character
        elif word:
            yield word
            word = ""


def _next_letters(words: Iterable[str]) -> dict[str, str]:
    """Of everything with which the words begin, the letters that follow in any; "" begins all."""
    follow: dict[str, str] = {"": ""}
    for word in words:
        for end, letter in enumerate(word):
            beginning = word[:end]
            if letter not in follow[beginning]:
                follow[beginning] += letter
            follow.setdefault(beginning + letter, "")
    return follow


def _decode(data: bytes) -> tuple[str, bytes]:
    """The characters in some UTF-8, and the bytes of one that is not whole."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(data)
    return text, decoder.getstate()[0]


def _lower(text: str) -> str:
    """Lower case, each character by itself, for an answer grows by characters."""
    return "".join(map(str.lower, text))


@cache
def _is_letter(character: str) -> bool:
    return unicodedata.category(character)[0] in "LM"
