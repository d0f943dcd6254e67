"""Beam search of one request: which beams go on and which answers stand. Pure; no tensors.

The rules are those of transformers' `generate(num_beams=N, length_penalty=1.0,
early_stopping=False)`: a finished answer's score is the mean score of its tokens (log-probability,
or what `model.ctc_prefix` makes of it), its end token included, and the search ends when N answers
have finished and the best running beam's mean is no better than the worst of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from server.engine.generation import RepetitionDetector

if TYPE_CHECKING:
    from collections.abc import Sequence

    from server.engine.decoding import Candidates, FinishReason


def candidates_per_beam(num_beams: int, n_stop_ids: int) -> int:
    """How many next tokens of a beam must be known.

    Were every end token among them, for every beam, as many others as there are beams would remain.
    """
    return max(2, 1 + n_stop_ids) * num_beams


@dataclass(frozen=True, slots=True)
class Branch:
    """A beam that goes on: from which beam of the last step, and with which token."""

    parent: int
    token_id: int


@dataclass(frozen=True, slots=True)
class Beam:
    """One of the sequences of a search.

    Attributes:
        token_ids: of it, without an end token.
        logprobs: of the tokens under the model.
        score: sum of its tokens' scores, see `Candidates`; of a finished answer, the mean.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    score: float = 0.0


class BeamSearch:
    """The beams of one answer.

    Attributes:
        answers: finished, the best first.
        finish_reason: None while it goes on; at its end, the best answer's.
    """

    def __init__(
        self,
        *,
        num_beams: int,
        max_tokens: int,
        stop_ids: frozenset[int],
        guards_loops: bool = True,
    ) -> None:
        """Begin with one empty beam.

        Args:
            num_beams: that are kept.
            max_tokens: cap.
            stop_ids: tokens that end an answer.
            guards_loops: whether a best answer that repeats itself is searched for again, once,
                and then cut.
        """
        self._num_beams = num_beams
        self._max_tokens = max_tokens
        self._stop_ids = stop_ids
        self._guards_loops = guards_loops
        self._retried = False
        self._begin()

    def _begin(self) -> None:
        self._beams = [Beam()]
        self._finished: list[tuple[Beam, FinishReason]] = []
        self.finish_reason: FinishReason | None = None

    @property
    def answers(self) -> tuple[Beam, ...]:
        """Finished answers, the best first."""
        return tuple(beam for beam, _ in self._finished)

    @property
    def token_ids(self) -> Sequence[int]:
        """The best answer."""
        return self._finished[0][0].token_ids

    @property
    def logprobs(self) -> Sequence[float]:
        """Of the best answer's tokens."""
        return self._finished[0][0].logprobs

    def push(self, candidates: Sequence[Candidates]) -> list[Branch]:
        """Take each beam's likeliest next tokens.

        Returns:
            The beams that go on, the best first. Without any, the search has ended, or it begins
            again, under a repetition penalty, if there is no finish reason.
        """
        length = len(self._beams[0].token_ids) + 1
        ranked = sorted(
            (
                (self._beams[parent].score + score, parent, token_id, logprob)
                for parent, each in enumerate(candidates)
                for token_id, score, logprob in zip(
                    each.token_ids, each.scores, each.logprobs, strict=True
                )
            ),
            key=lambda candidate: -candidate[0],
        )
        ranked = ranked[: candidates_per_beam(self._num_beams, len(self._stop_ids))]
        is_capped = length == self._max_tokens
        running: list[tuple[Branch, Beam]] = []
        for rank, (score, parent, token_id, logprob) in enumerate(ranked):
            ends = token_id in self._stop_ids
            beam = self._extend(parent, score, None if ends else (token_id, logprob))
            if not (ends or is_capped):
                running.append((Branch(parent, token_id), beam))
            elif rank < self._num_beams:  # the rest only stand by for those that end
                mean = Beam(beam.token_ids, beam.logprobs, score / length)
                self._finished.append((mean, "stop" if ends else "length"))
        self._finished.sort(key=lambda finished: -finished[0].score)
        del self._finished[self._num_beams :], running[self._num_beams :]
        if not running or self._cannot_improve(running[0][1].score / length):
            self._end()
            return []
        self._beams = [beam for _, beam in running]
        return [branch for branch, _ in running]

    def _extend(self, parent: int, score: float, token: tuple[int, float] | None) -> Beam:
        beam = self._beams[parent]
        if token is None:
            return Beam(beam.token_ids, beam.logprobs, score)
        return Beam((*beam.token_ids, token[0]), (*beam.logprobs, token[1]), score)

    def _cannot_improve(self, best_running_mean: float) -> bool:
        is_full = len(self._finished) == self._num_beams
        return is_full and best_running_mean <= self._finished[-1][0].score

    def _end(self) -> None:
        best, self.finish_reason = self._finished[0]
        kept = _length_before_loop(best.token_ids) if self._guards_loops else None
        if kept is None:
            return
        if not self._retried:
            self._retried = True
            self._begin()
            return
        cut = Beam(best.token_ids[:kept], best.logprobs[:kept], best.score)
        self._finished[0] = cut, "loop"
        self.finish_reason = "loop"


def _length_before_loop(token_ids: Sequence[int]) -> int | None:
    """Tokens up to one copy of the loop that these run into; None without a loop."""
    detector = RepetitionDetector()
    for place, token_id in enumerate(token_ids):
        if repeated := detector.push(token_id, token_ids[:place], place):
            return place + 1 - repeated
    return None


def place(rows: Sequence[int], parents: Sequence[int], fresh: Sequence[int]) -> list[int]:
    """Choose the row of each beam that goes on, so that few have to be copied.

    Args:
        rows: of the beams so far.
        parents: of those that go on, as indices into `rows`.
        fresh: free rows, taken where there are more beams than before.

    Returns:
        Rows of those that go on: the first child of a beam stays in its row.
    """
    stayed: set[int] = set()
    placed: list[int | None] = []
    for parent in parents:
        placed.append(rows[parent] if parent not in stayed else None)
        stayed.add(parent)
    left = iter([*(row for beam, row in enumerate(rows) if beam not in stayed), *fresh])
    return [next(left) if row is None else row for row in placed]
