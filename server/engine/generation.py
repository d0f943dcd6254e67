"""Answers as they grow: when they end, whether they loop, what of them is new text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from numpy.typing import NDArray

    from server.engine.decoding import FinishReason

LOOP_RETRY_PENALTY = 1.3
"""Repetition penalty of the one retry of an answer that loops."""

_MAX_UNIT_TOKENS = 16  # longest repeated n-gram that is looked for
_MIN_COPIES = 4  # of an n-gram in a row; people do say things three times
_MIN_LOOP_TOKENS = 24  # below, a repetition may be speech: "no, no, no, no"
_NO_TOKEN = -1
_NOWHERE = -2  # behind which no token stands
_FIRST_WIDTH = 64  # tokens that answers have room for before one needs more
_INCOMPLETE = "\ufffd"  # what a tokenizer gives for the first bytes of a character


class RepetitionDetector:
    """Notices when the latest tokens are one n-gram over and over."""

    def __init__(self) -> None:
        """Begin before the first token."""
        # How many tokens in a row equal the one n before them, for each n that is not at 0.
        self._runs: dict[int, int] = {}
        self._place = _NOWHERE  # of the token that these were counted at

    def push(self, token: int, before: Sequence[int], place: int) -> int:
        """Take a token of an answer. One that none of the 16 before it equals may be left out.

        Args:
            token: at `place`.
            before: up to it, all that stand there or the last 16 of them.
            place: how many tokens of the answer stand before it.

        Returns:
            How many of the latest tokens only repeat what stands before them; 0 without a loop.
        """
        recent = reversed(before[-_MAX_UNIT_TOKENS:])
        same = [n for n, earlier in enumerate(recent, 1) if earlier == token]
        runs = self._runs if place == self._place + 1 else {}
        self._runs, self._place = {n: runs.get(n, 0) + 1 for n in same}, place
        for n, run in self._runs.items():
            if run + n >= max(_MIN_COPIES * n, _MIN_LOOP_TOKENS):
                return run
        return 0


@dataclass(frozen=True, slots=True)
class Grown:
    """What the tokens of a step have made of answers.

    Attributes:
        ended: how those ended that did, by lane.
        again: lanes of those that begin again, under a repetition penalty; what was generated is
            dropped.
    """

    ended: dict[int, FinishReason]
    again: list[int]


class Answers:
    """Greedy or sampled answers as they grow, each in a lane of its own.

    They are held in arrays, since a step may add to hundreds. The epoch of a lane changes when its
    answer is closed or begins again: what was on its way to the one of before is not for the next.

    Axis legend: R answers that grow.
    """

    def __init__(self, lanes: int, stop_ids: Collection[int]) -> None:
        """Begin without an answer.

        Args:
            lanes: most answers at a time.
            stop_ids: tokens that end them.
        """
        self.epochs = np.zeros(lanes, np.int64)
        self._is_stop = np.zeros(max(stop_ids, default=0) + 2, bool)  # all above it as the last
        self._is_stop[[*stop_ids]] = True
        self._free = [*reversed(range(lanes))]
        self._tokens = np.zeros((lanes, _FIRST_WIDTH), np.int64)
        self._sizes = np.zeros(lanes, np.int64)
        self._max_tokens = np.zeros(lanes, np.int64)
        self._first_s = np.full(lanes, np.nan)
        self._may_retry = np.zeros(lanes, bool)
        self._detectors: list[RepetitionDetector | None] = [None] * lanes
        # The last tokens of each: at their place, counted from the beginning over and over.
        self._recent = np.full((lanes, _MAX_UNIT_TOKENS), _NO_TOKEN)

    def open(self, *, max_tokens: int, guards_loops: bool = True, may_retry: bool = True) -> int:
        """Begin an answer.

        Args:
            max_tokens: cap.
            guards_loops: whether it is broken off when it repeats itself.
            may_retry: whether it then begins again, once.

        Returns:
            Its lane.
        """
        lane = self._free.pop()
        self._max_tokens[lane], self._first_s[lane] = max_tokens, np.nan
        self._may_retry[lane] = may_retry
        self._begin(lane, guards_loops=guards_loops)
        return lane

    def close(self, lane: int) -> None:
        """Let another answer have a lane."""
        self.epochs[lane] += 1
        self._free.append(lane)

    def token_ids(self, lane: int) -> list[int]:
        """Tokens of an answer so far, without an end token."""
        tokens: list[int] = self._tokens[lane, : self._sizes[lane]].tolist()
        return tokens

    def first_token_s(self, lane: int) -> float:
        """When its first token came, before it began again if it did; NaN before."""
        return float(self._first_s[lane])

    def push(self, lanes: NDArray[np.int64], token_ids: NDArray[np.int64], now_s: float) -> Grown:
        """Take the next token (R,) of some answers, which are in `lanes` (R,), none twice."""
        stops = self._is_stop.take(token_ids, mode="clip")
        sizes = self._sizes[lanes]
        first = lanes[np.isnan(self._first_s[lanes])]
        if first.size:
            self._first_s[first] = now_s
        if sizes.max(initial=0) == self._tokens.shape[1]:
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)], 1)
        self._tokens[lanes, sizes] = token_ids
        loops = self._find_loops(lanes, token_ids, sizes)
        self._recent[lanes, sizes % _MAX_UNIT_TOKENS] = token_ids
        sizes += ~stops
        self._sizes[lanes] = sizes
        grown = Grown({}, [])
        for index in (stops | (sizes == self._max_tokens[lanes])).nonzero()[0].tolist():
            grown.ended[int(lanes[index])] = "stop" if stops[index] else "length"
        for lane, repeated in loops.items():
            if grown.ended.get(lane) == "stop":
                continue
            if self._may_retry[lane]:
                grown.ended.pop(lane, None)
                grown.again.append(lane)
                self._may_retry[lane] = False
                self.epochs[lane] += 1
                self._begin(lane, guards_loops=True)
            else:
                self._sizes[lane] -= repeated  # one copy of what it repeats stays
                grown.ended[lane] = "loop"
        return grown

    def _begin(self, lane: int, *, guards_loops: bool) -> None:
        self._sizes[lane], self._recent[lane] = 0, _NO_TOKEN
        self._detectors[lane] = RepetitionDetector() if guards_loops else None

    def _find_loops(
        self, lanes: NDArray[np.int64], token_ids: NDArray[np.int64], sizes: NDArray[np.int64]
    ) -> dict[int, int]:
        """How many of the latest tokens of each answer only repeat others, where any do.

        What is to come is one token of each, behind `sizes` (R,) others.
        """
        may_loop = (self._recent[lanes] == token_ids[:, None]).any(1)  # most do not
        loops = {}
        for index in may_loop.nonzero()[0].tolist():
            lane, place = int(lanes[index]), int(sizes[index])
            if (detector := self._detectors[lane]) is not None:
                before = self._tokens[lane, max(0, place - _MAX_UNIT_TOKENS) : place].tolist()
                if repeated := detector.push(int(token_ids[index]), before, place):
                    loops[lane] = repeated
        return loops


class TextStream:
    """Cuts a growing answer into pieces of text that are final."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """Begin before the first token; `decode` turns token ids into text."""
        self._decode = decode
        self._sent = ""

    def push(self, token_ids: Sequence[int], *, is_last: bool = False) -> str:
        """Return what `token_ids`, all tokens so far, add to the text returned before.

        A character whose bytes are not all there waits for the rest, unless this `is_last`.
        """
        text = self._decode(token_ids)
        if not is_last:
            text = text.rstrip(_INCOMPLETE)
        if not text.startswith(self._sent):
            return ""
        new = text[len(self._sent) :]
        self._sent = text
        return new
