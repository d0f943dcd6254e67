"""Text that grows while its audio does, and of which nothing is ever taken back. Pure.

The growing audio is transcribed again and again. What two transcripts in a row agree on, but for
the last word of each, which the end of the audio may have cut, is told; the last transcript of the
whole audio goes on from there. Where it contradicts what was told, it is lined up with that, and
goes on behind it.

Source: local agreement, Liu et al., arXiv 2005.11185; Macháček et al., arXiv 2307.14743.
"""

from __future__ import annotations

import re

# Words with the space before them; in scripts that write none between words, characters.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_UNIT = re.compile(rf"\s*(?:[{_UNSPACED}]|[^\s{_UNSPACED}]+)")


class GrowingText:
    """The text of one turn, whose audio comes in one piece or several.

    Attributes:
        text: what has been told; complete once the last piece is `finish`ed.
        contradictions: pieces whose last transcript did not begin with what had been told.
    """

    def __init__(self) -> None:
        """Begin without any."""
        self.text = ""
        self.contradictions = 0
        self._told: list[str] = []  # of the open piece
        self._latest: list[str] = []  # units of its latest transcript

    def grow(self, transcript: str) -> str:
        """Take a transcript of the open piece so far; returns what is new to tell."""
        units = _units(transcript)[:-1]
        agreed = _common_prefix(units, self._latest)
        self._latest = units
        if len(agreed) <= len(self._told) or agreed[: len(self._told)] != self._told:
            return ""
        new, self._told = agreed[len(self._told) :], agreed
        return self._tell(new, is_first=len(new) == len(agreed))

    def finish(self, transcript: str) -> str:
        """Take the open piece's last transcript; returns what is new to tell. Opens the next."""
        units, told = _units(transcript), self._told
        self._told, self._latest = [], []
        if units[: len(told)] == told:
            return self._tell(units[len(told) :], is_first=not told)
        self.contradictions += 1
        said = _line_up(told, units)
        return self._tell(units[said:], is_first=said == 0)

    def _tell(self, units: list[str], *, is_first: bool) -> str:
        new = "".join(units)
        if is_first and new and self.text:
            new = " " + new
        self.text += new
        return new


def _units(transcript: str) -> list[str]:
    return _UNIT.findall(transcript.strip())


def _common_prefix(units: list[str], others: list[str]) -> list[str]:
    n = 0
    while n < min(len(units), len(others)) and units[n] == others[n]:
        n += 1
    return units[:n]


def _line_up(told: list[str], units: list[str]) -> int:
    """How many of `units` stand for what was told: those at the least edit distance from it."""
    row = list(range(len(units) + 1))
    for i, each in enumerate(told, start=1):
        diagonal, row[0] = row[0], i
        for j, unit in enumerate(units, start=1):
            substituted = diagonal + (each.strip() != unit.strip())
            diagonal = row[j]
            row[j] = min(substituted, row[j] + 1, row[j - 1] + 1)
    return min(range(len(row)), key=lambda n: (row[n], abs(n - len(told))))
