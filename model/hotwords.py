"""Words that somebody expects to be said, kept only where something like them was heard.

They come from outside and stand in the LLM's prompt, so they are data there and never more: what is
not a letter, a digit or a mark within words is dropped, which leaves nothing of a chat token; and
what the CTC head has not heard, such as an instruction that nobody speaks, is not prompted at all.

Source of the filter: Yang et al., CTC-assisted LLM-based contextual ASR, arXiv 2411.06437.
"""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

from rapidfuzz import fuzz

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_LISTED = 10
"""Most hotwords in a prompt."""

MAX_LIST_BYTES = 256
"""Longest list in a prompt, UTF-8; it takes no more tokens than that."""

_SEPARATOR = ", "
_MARKS_WITHIN_WORDS = "'’.&+@-"
# Of 100: one wrong letter in four passes, and what two unrelated sentences have in common does not.
_MIN_SIMILARITY = 75.0


def clean_hotword(word: str) -> str:
    """Letters, digits and marks within words, parted by single spaces; NFC."""
    characters = unicodedata.normalize("NFC", word)
    return " ".join("".join(each if _may_stand(each) else " " for each in characters).split())


def _may_stand(character: str) -> bool:
    return character in _MARKS_WITHIN_WORDS or unicodedata.category(character)[0] in "LMN"


def heard_hotwords(hotwords: Iterable[str], heard: str) -> list[str]:
    """Choose the hotwords that a CTC head's reading holds something similar to.

    Args:
        hotwords: from outside.
        heard: the reading.

    Returns:
        Cleaned, the most similar first, within MAX_LISTED and MAX_LIST_BYTES.
    """
    text = heard.casefold()
    words = dict.fromkeys(filter(None, map(clean_hotword, hotwords)))
    scored = [(_similarity(word.casefold(), text), word) for word in words]
    scored = [each for each in scored if each[0] >= _MIN_SIMILARITY]
    scored.sort(key=lambda each: -each[0])  # equal ones keep the client's order
    listed: list[str] = []
    for _, word in scored[:MAX_LISTED]:
        if len(list_hotwords([*listed, word]).encode()) <= MAX_LIST_BYTES:
            listed.append(word)
    return listed


def _similarity(word: str, text: str) -> float:
    # Of a text that is shorter than the word, the partial ratio would seek the text in the word.
    measure = fuzz.partial_ratio if len(word) <= len(text) else fuzz.ratio
    return measure(word, text)


def list_hotwords(words: Iterable[str]) -> str:
    """Put words together as they stand in a prompt."""
    return _SEPARATOR.join(words)
