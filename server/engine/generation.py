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
_UNIT_SIZES = np.arange(1, _MAX_UNIT_TOKENS + 1)
_MIN_RUNS = np.maximum(_MIN_COPIES * _UNIT_SIZES, _MIN_LOOP_TOKENS) - _UNIT_SIZES
_NO_TOKEN = -1
_FIRST_WIDTH = 64  # tokens that answers have room for before one needs more
_INCOMPLETE = "\ufffd"  # what a tokenizer gives for the first bytes of a character


class RepetitionDetector:
    """Notices when the latest tokens are one n-gram over and over."""

    def __init__(self) -> None:
        """Begin before the first token."""
        # How many tokens in a row equal the one n before them, for each n that is not at 0.
        self._runs: dict[int, int] = {}

    def push(self, token: int, before: Sequence[int]) -> int:
        """Take the next token of an answer, and all that stand before it.

        Returns:
            How many of the latest tokens only repeat what stands before them; 0 without a loop.
        """
        recent = before[-_MAX_UNIT_TOKENS:]
        if token not in recent:  # most are not
            if self._runs:
                self._runs = {}
            return 0
        same = [n for n, earlier in enumerate(reversed(recent), 1) if earlier == token]
        self._runs = {n: self._runs.get(n, 0) + 1 for n in same}
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

    Axis legend: N lanes, R of them that grow, T tokens, U lengths of a repeated n-gram.
    """

    def __init__(self, lanes: int, stop_ids: Collection[int]) -> None:
        """Begin without an answer.

        Args:
            lanes: most answers at a time.
            stop_ids: tokens that end them.
        """
        self.epochs = np.zeros(lanes, np.int64)
        self._stop_ids = np.array(sorted(stop_ids))
        self._free = [*reversed(range(lanes))]
        self._tokens = np.zeros((lanes, _FIRST_WIDTH), np.int64)
        self._sizes = np.zeros(lanes, np.int64)
        self._max_tokens = np.zeros(lanes, np.int64)
        self._first_s = np.full(lanes, np.nan)
        self._guards_loops = np.zeros(lanes, bool)
        self._may_retry = np.zeros(lanes, bool)
        # As in `RepetitionDetector`: (N, U) each, the latest token and the shortest n-gram first.
        self._recent = np.full((lanes, _MAX_UNIT_TOKENS), _NO_TOKEN)
        self._runs = np.zeros((lanes, _MAX_UNIT_TOKENS), np.int64)

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
        self._guards_loops[lane], self._may_retry[lane] = guards_loops, may_retry
        self._begin(lane)
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
        stops = (token_ids[:, None] == self._stop_ids).any(1)
        sizes = self._sizes[lanes]
        if sizes.max(initial=0) == self._tokens.shape[1]:
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)], 1)
        first = lanes[np.isnan(self._first_s[lanes])]
        self._first_s[first] = now_s
        self._tokens[lanes, sizes] = token_ids
        sizes += ~stops
        self._sizes[lanes] = sizes
        repeated = self._count_repeated(lanes, token_ids)
        grown = Grown({}, [])
        ends = stops | (repeated > 0) | (sizes == self._max_tokens[lanes])
        for index in np.flatnonzero(ends).tolist():
            lane = int(lanes[index])
            if stops[index]:
                grown.ended[lane] = "stop"
            elif not repeated[index]:
                grown.ended[lane] = "length"
            elif self._may_retry[lane]:
                self._may_retry[lane] = False
                self.epochs[lane] += 1
                self._begin(lane)
                grown.again.append(lane)
            else:
                self._sizes[lane] -= repeated[index]  # one copy of what it repeats stays
                grown.ended[lane] = "loop"
        return grown

    def _begin(self, lane: int) -> None:
        self._sizes[lane] = 0
        self._recent[lane], self._runs[lane] = _NO_TOKEN, 0

    def _count_repeated(
        self, lanes: NDArray[np.int64], token_ids: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """What `RepetitionDetector.push` returns of each answer (R,)."""
        recent = self._recent[lanes]
        runs = (self._runs[lanes] + 1) * (recent == token_ids[:, None])
        self._runs[lanes] = runs
        self._recent[lanes, 1:] = recent[:, :-1]
        self._recent[lanes, 0] = token_ids
        is_loop = runs >= _MIN_RUNS
        longest = runs[np.arange(len(runs)), is_loop.argmax(1)]
        repeated: NDArray[np.int64] = longest * (is_loop.any(1) & self._guards_loops[lanes])
        return repeated


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
