"""Text normalisers: what counts as the same words when a transcript is scored.

English uses Whisper's English normaliser, so that figures compare with published ones. Every other
language, Mongolian first, uses a normaliser that keeps the letters of all scripts whole: й, ё, ө
and ү are letters of their own, and stripping their marks would hide real errors.
"""

from __future__ import annotations

import json
import unicodedata
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

if TYPE_CHECKING:
    from collections.abc import Callable

_ENGLISH = frozenset({"en", "eng", "english"})

# Soft hyphen, zero-width space, directional marks, word joiner, byte-order mark: unseen and unsaid.
# The zero-width (non-)joiners are left alone, they are part of the spelling in several scripts.
_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u200e\u200f\u2060\ufeff"))


def normaliser_for(language: str | None) -> Callable[[str], str]:
    """Return the normaliser that scores text of a language.

    Args:
        language: a tag such as "en", "en-GB" or "mn"; None when it is not known.

    Returns:
        Whisper's English normaliser for English, `normalise_basic` for all else.
    """
    primary = (language or "").replace("_", "-").split("-")[0].strip().lower()
    return normalise_english if primary in _ENGLISH else normalise_basic


def normalise_basic(text: str) -> str:
    """Lower-case, replace punctuation and symbols by spaces, keep every letter and mark.

    Composes to NFC and nothing stronger: compatibility forms (NFKC) and decomposition with mark
    removal would merge letters that differ in meaning.
    """
    composed = unicodedata.normalize("NFC", text.translate(_INVISIBLE).lower())
    spaced = "".join(" " if unicodedata.category(char)[0] in "PS" else char for char in composed)
    return " ".join(spaced.split())


def normalise_english(text: str) -> str:
    """Apply Whisper's English normaliser: numbers, contractions, British to American spelling.

    Source: "Robust Speech Recognition via Large-Scale Weak Supervision", appendix C.
    """
    return " ".join(_english_normaliser()(text).split())


@cache
def _english_normaliser() -> EnglishTextNormalizer:
    # transformers has the algorithm but keeps the spelling table on the hub; this package ships it.
    table = resources.files("whisper_normalizer") / "normalizers" / "english.json"
    mapping: dict[str, str] = json.loads(table.read_text(encoding="utf-8"))
    # The first published table has a slip here, "archeology</span>", and so has this copy of it.
    mapping["archaeology"] = "archeology"
    return EnglishTextNormalizer(mapping)
