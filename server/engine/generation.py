"""One request's answer as it grows: when it ends, whether it loops, what of it is new text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from server.engine.decoding import FinishReason, Token

LOOP_RETRY_PENALTY = 1.3
"""Repetition penalty of the one retry of an answer that loops."""

_MAX_UNIT_TOKENS = 16  # longest repeated n-gram that is looked for
_MIN_COPIES = 4  # of an n-gram in a row; people do say things three times
_MIN_LOOP_TOKENS = 24  # below, a repetition may be speech: "no, no, no, no"
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


class Generation:
    """The tokens of one answer.

    Attributes:
        token_ids: so far, without an end token.
        logprobs: of these, where they were asked for.
        finish_reason: None while it goes on.
        retried: it looped once, and began again.
    """

    def __init__(
        self,
        *,
        max_tokens: int,
        stop_ids: frozenset[int],
        guards_loops: bool = True,
        may_retry: bool = True,
    ) -> None:
        """Begin empty.

        Args:
            max_tokens: cap.
            stop_ids: tokens that end it.
            guards_loops: whether an answer that repeats itself is broken off.
            may_retry: whether it then begins again, once.
        """
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: FinishReason | None = None
        self.retried = False
        self._max_tokens = max_tokens
        self._stop_ids = stop_ids
        self._detector = RepetitionDetector() if guards_loops else None
        self._may_retry = may_retry

    def push(self, token: Token) -> bool:
        """Take the next token.

        Returns:
            Whether to begin again, under a repetition penalty; what was generated is dropped.
        """
        token_id, token_ids = token.id, self.token_ids
        if token_id in self._stop_ids:
            self.finish_reason = "stop"
            return False
        repeated = self._detector.push(token_id, token_ids) if self._detector is not None else 0
        token_ids.append(token_id)
        if token.logprob is not None:
            self.logprobs.append(token.logprob)
        if repeated and self._may_retry and not self.retried:
            self._begin_again()
            return True
        if repeated:
            # One copy of what it repeats stays.
            del token_ids[-repeated:], self.logprobs[-repeated:]
            self.finish_reason = "loop"
        elif len(token_ids) == self._max_tokens:
            self.finish_reason = "length"
        return False

    def _begin_again(self) -> None:
        self.token_ids, self.logprobs = [], []
        self._detector = RepetitionDetector()
        self.retried = True


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
