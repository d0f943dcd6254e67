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

    def finish(self, transcript: str, *, is_cut: bool = False) -> str:
        """Take the open piece's last transcript; returns what is new to tell. Opens the next.

        Args:
            transcript: of the whole piece.
            is_cut: the audio goes on, and what was told may have been heard behind the cut; the
                next piece then begins with that.
        """
        units, told = _units(transcript), self._told
        self._told, self._latest = [], []
        said, carried = _line_up(told, units, may_carry=is_cut)
        if carried:
            self._told = [carried[0].lstrip(), *carried[1:]]
        elif [each.strip() for each in units[:said]] != [each.strip() for each in told]:
            self.contradictions += 1
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


def _line_up(told: list[str], units: list[str], *, may_carry: bool) -> tuple[int, list[str]]:
    """Find out what of a transcript was told, by the least edit distance.

    Returns:
        How many of `units` were told, and what of `told` lies behind all of them, which is nothing
        unless it `may_carry`.
    """
    n_told, n_units = len(told), len(units)
    row = list(range(n_units + 1))
    whole = [row[-1]]  # distances of the beginnings of `told` from all units
    for i, each in enumerate(told, start=1):
        diagonal, row[0] = row[0], i
        for j, unit in enumerate(units, start=1):
            substituted = diagonal + (each.strip() != unit.strip())
            diagonal = row[j]
            row[j] = min(substituted, row[j] + 1, row[j - 1] + 1)
        whole.append(row[-1])
    said = min(range(n_units + 1), key=lambda n: (row[n], abs(n - n_told)))
    kept = min(range(n_told + 1), key=lambda n: (whole[n], abs(n - n_units)))
    if may_carry and whole[kept] < row[said]:
        return n_units, told[kept:]
    return said, []
