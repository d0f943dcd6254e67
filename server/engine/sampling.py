"""From logits to tokens, each row by its own request's wishes.

Axis legend: R rows, V vocabulary.
"""

from __future__ import annotations

from copy import copy
from math import isfinite
from typing import TYPE_CHECKING

import torch

from model.ctc_prefix import CTCPrefix, extend_prefixes, joint_scores
from server.engine.beams import candidates_per_beam
from server.engine.decoding import Candidates, Decoding, Token

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import Tensor

    from model.ctc_prefix import HeardClip


class TokenSampler:
    """Chooses the tokens of one sequence. Its randomness is its own, so a batch changes none."""

    def __init__(
        self, decoding: Decoding, stop_ids: Collection[int], heard: HeardClip | None = None
    ) -> None:
        """Begin a sequence that tokens of `stop_ids` end, decoded jointly with what is heard."""
        self.decoding = decoding
        self.stop_ids = stop_ids
        self.heard = heard
        self.prefix = CTCPrefix.begin(heard) if heard is not None else None
        self.n_candidates = candidates_per_beam(decoding.num_beams, len(stop_ids))
        self._generated: set[int] = set()
        self._generator: torch.Generator | None = None
        if decoding.temperature > 0:
            self._generator = torch.Generator()
            if decoding.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(decoding.seed)

    def note(self, token_id: int) -> None:
        """Count a chosen token as generated; `prefix` is for the caller to extend."""
        self._generated.add(token_id)

    def branch(self, token_id: int) -> TokenSampler:
        """Return the sampler of a beam that goes on from this one's with a token."""
        child = copy(self)
        child._generated = {*self._generated, token_id}
        if child.prefix is not None:
            child.prefix = child.prefix.extend(token_id)
        return child

    def choose(self, logits: Tensor) -> Token:
        """Choose from one row of logits (V,)."""
        scores = self.adjust(logits.float())
        if self._generator is None:
            token_id = int(scores.argmax())
        else:
            token_id = self._draw(scores / self.decoding.temperature, self._generator)
        logprob = None
        if self.decoding.logprobs:
            logprob = float(logits.float().log_softmax(-1)[token_id])
        return Token(token_id, logprob)

    def adjust(self, scores: Tensor) -> Tensor:
        """Apply what was asked for, and what is heard, to one row of logits or log-probabilities.

        Args:
            scores: (V,) float32.

        Source of the repetition penalty: CTRL, arXiv 1909.05858, in transformers' form.
        """
        penalty = self.decoding.repetition_penalty
        if penalty != 1 and self._generated:
            ids = torch.tensor(sorted(self._generated), device=scores.device)
            chosen = scores[ids]
            scores = scores.index_copy(
                0, ids, torch.where(chosen < 0, chosen * penalty, chosen / penalty)
            )
        if self.prefix is not None:
            scores = joint_scores(scores[None], [self.prefix])[0]
        return scores

    def _draw(self, scores: Tensor, generator: torch.Generator) -> int:
        """Invert the distribution function at one uniform number, drawn on the host."""
        weights = scores.double().softmax(-1)
        ids = None
        if self.decoding.top_p < 1:
            weights, ids = weights.sort(descending=True)
            # The smallest set that reaches top_p: a token stays while those before it do not.
            weights = weights * (weights.cumsum(0) - weights < self.decoding.top_p)
        mass = weights.cumsum(0)
        uniform = torch.rand((), generator=generator, dtype=torch.float64).item()
        index = int(torch.searchsorted(mass, mass[-1] * uniform, right=True))
        index = min(index, int(weights.nonzero()[-1]))  # rounding at the upper end
        return index if ids is None else int(ids[index])


def choose_tokens(
    logits: Tensor, samplers: Sequence[TokenSampler]
) -> list[Token | Candidates | None]:
    """Choose every row's next token, or a beam's candidates.

    Args:
        logits: (R, V), in the model's dtype.
        samplers: one a row.

    Returns:
        One a row; None where its logits are not finite.
    """
    # One transfer to the host for all rows; a NaN is the maximum of its row.
    best, ids = logits.max(-1)
    plain, largest = ids.tolist(), best.tolist()
    _listen(logits, samplers, plain)
    beams = [row for row, sampler in enumerate(samplers) if sampler.decoding.num_beams > 1]
    candidates = _rank(logits, beams, samplers) if beams else {}
    chosen: list[Token | Candidates | None] = []
    for row, sampler in enumerate(samplers):
        if not isfinite(largest[row]):
            chosen.append(None)
        elif row in candidates:
            chosen.append(candidates[row])
        else:
            is_plain = sampler.decoding.is_plain
            token = Token(plain[row]) if is_plain else sampler.choose(logits[row])
            sampler.note(token.id)
            chosen.append(token)
    _follow(samplers, chosen)
    return chosen


def _follow(samplers: Sequence[TokenSampler], chosen: Sequence[Token | Candidates | None]) -> None:
    """Extend the prefixes of those that have chosen a token and go on."""
    followed = [
        (sampler, sampler.prefix, token.id)
        for sampler, token in zip(samplers, chosen, strict=True)
        if isinstance(token, Token)
        and sampler.prefix is not None
        and token.id not in sampler.stop_ids
    ]
    extended = extend_prefixes([each[1] for each in followed], [each[2] for each in followed])
    for (sampler, _, _), prefix in zip(followed, extended, strict=True):
        sampler.prefix = prefix


def _listen(logits: Tensor, samplers: Sequence[TokenSampler], plain: list[int]) -> None:
    """Replace the likeliest tokens of those plain rows that are decoded jointly."""
    prefixes = {
        row: sampler.prefix
        for row, sampler in enumerate(samplers)
        if sampler.prefix is not None and sampler.decoding.is_plain
    }
    if prefixes:
        scores = joint_scores(logits[[*prefixes]], [*prefixes.values()])
        for row, token_id in zip(prefixes, scores.argmax(-1).tolist(), strict=True):
            plain[row] = token_id


def _rank(
    logits: Tensor, rows: Sequence[int], samplers: Sequence[TokenSampler]
) -> dict[int, Candidates]:
    """Candidates of each beam's row. As in transformers, log-probabilities are adjusted."""
    logprobs = logits[rows].float().log_softmax(-1)
    own = [samplers[row] for row in rows]
    scores = torch.stack(
        [sampler.adjust(each) for sampler, each in zip(own, logprobs, strict=True)]
    )
    count = min(max(sampler.n_candidates for sampler in own), logits.shape[-1])
    top, ids = scores.topk(count)
    columns = zip(rows, ids.tolist(), top.tolist(), logprobs.gather(-1, ids).tolist(), strict=True)
    return {
        row: Candidates(tuple(token_ids), tuple(values), tuple(plain))
        for row, token_ids, values, plain in columns
    }
