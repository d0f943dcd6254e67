"""From logits to tokens, each row by its own request's wishes.

Axis legend: R rows, V vocabulary.
"""

from __future__ import annotations

from copy import copy
from math import isfinite
from typing import TYPE_CHECKING

import numpy as np
import torch

from model.ctc_prefix import CTCPrefix, extend_prefixes, joint_scores
from server.engine.beams import candidates_per_beam
from server.engine.decoding import NO_ID, Candidates, Decoding, Token

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from model.ctc_prefix import ClipPosteriors


class TokenSampler:
    """Chooses the tokens of one sequence. Its randomness is its own, so a batch changes none."""

    def __init__(
        self,
        decoding: Decoding,
        stop_ids: Collection[int],
        posteriors: ClipPosteriors | None = None,
    ) -> None:
        """Begin a sequence.

        Args:
            decoding: what was asked for.
            stop_ids: tokens that end it.
            posteriors: of the CTC head, to decode jointly with; None for the LLM alone.
        """
        self.decoding = decoding
        self.is_plain = decoding.is_plain and posteriors is None  # needs to know of no token
        self.stop_ids = stop_ids
        self.posteriors = posteriors
        self.prefix = CTCPrefix.begin(posteriors) if posteriors is not None else None
        self.n_candidates = candidates_per_beam(decoding.num_beams, len(stop_ids))
        self._generated: set[int] = set()
        self._generator: torch.Generator | None = None
        if decoding.temperature > 0:
            self._generator = torch.Generator()
            if decoding.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(decoding.seed)

    def note(self, token_id: int, prefix: CTCPrefix | None) -> None:
        """Count a chosen token as generated; `prefix` is the answer with it."""
        self._generated.add(token_id)
        self.prefix = prefix

    def branch(self, token_id: int, prefix: CTCPrefix | None) -> TokenSampler:
        """Return the sampler of a beam that goes on from this one's with a token."""
        child = copy(self)
        child._generated = {*self._generated, token_id}
        child.prefix = prefix
        return child

    def choose(self, scores: Tensor, logits: Tensor) -> Token:
        """Choose from one row.

        Args:
            scores: (V,) float32, penalised and joint.
            logits: (V,) of the LLM.
        """
        if self._generator is None:
            token_id = int(scores.argmax())
        else:
            token_id = self._draw(scores / self.decoding.temperature, self._generator)
        logprob = None
        if self.decoding.logprobs:
            logprob = float(logits.float().log_softmax(-1)[token_id])
        return Token(token_id, logprob)

    def penalise(self, scores: Tensor) -> Tensor:
        """Apply the repetition penalty to one row of logits or log-probabilities (V,).

        Source: CTRL, arXiv 1909.05858, in transformers' form.
        """
        penalty = self.decoding.repetition_penalty
        if penalty == 1 or not self._generated:
            return scores
        ids = torch.tensor(sorted(self._generated), device=scores.device)
        chosen = scores[ids]
        return scores.index_copy(
            0, ids, torch.where(chosen < 0, chosen * penalty, chosen / penalty)
        )

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


def plain_ids(best: NDArray[np.float64]) -> NDArray[np.int64]:
    """The likeliest token of each row (R,), `NO_ID` where its logits are not finite.

    Args:
        best: the `likeliest` of the logits, (2, R).
    """
    largest, token_ids = best
    return np.where(np.isfinite(largest), token_ids, NO_ID).astype(np.int64)


def choose_tokens(
    logits: Tensor, best: NDArray[np.float64], samplers: Sequence[TokenSampler]
) -> list[Token | Candidates | None]:
    """Choose every row's next token, or a beam's candidates.

    Args:
        logits: (R, V), in the model's dtype.
        best: the `likeliest` of them, (2, R), on the host.
        samplers: one a row.

    Returns:
        One a row; None where its logits are not finite.
    """
    if all(sampler.is_plain for sampler in samplers):
        ids = plain_ids(best).tolist()
        return [Token(token_id) if token_id != NO_ID else None for token_id in ids]
    largest, token_ids = best.tolist()
    plain = [int(token_id) for token_id in token_ids]
    scores = _adjusted(logits, samplers)
    jointly = [row for row in scores if samplers[row].prefix is not None]
    if jointly:
        values, ids = torch.stack([scores[row] for row in jointly]).max(-1)
        for row, token_id, value in zip(jointly, ids.tolist(), values.tolist(), strict=True):
            plain[row] = token_id
            largest[row] += value  # so that it is finite where both are
    beams = [row for row, sampler in enumerate(samplers) if sampler.decoding.num_beams > 1]
    candidates = _rank(logits, scores, beams, samplers) if beams else {}
    chosen: list[Token | Candidates | None] = []
    for row, sampler in enumerate(samplers):
        if not isfinite(largest[row]):
            chosen.append(None)
        elif row in candidates:
            chosen.append(candidates[row])
        elif sampler.decoding.is_plain:  # be it jointly
            chosen.append(Token(plain[row]))
        else:
            chosen.append(sampler.choose(scores[row], logits[row]))
    _note(samplers, chosen)
    return chosen


def branch_samplers(
    samplers: Sequence[TokenSampler], token_ids: Sequence[int]
) -> list[TokenSampler]:
    """Return the samplers of beams that go on from these, each with a token."""
    prefixes = _extended(samplers, token_ids)
    return [
        sampler.branch(token_id, prefix)
        for sampler, token_id, prefix in zip(samplers, token_ids, prefixes, strict=True)
    ]


def _adjusted(logits: Tensor, samplers: Sequence[TokenSampler]) -> dict[int, Tensor]:
    """Scores (V,) of the rows that want more than their logits: penalised, then joint.

    As in transformers, those of beams are log-probabilities.
    """
    scores: dict[int, Tensor] = {}
    prefixes: dict[int, CTCPrefix] = {}
    for row, sampler in enumerate(samplers):
        if sampler.prefix is not None:
            prefixes[row] = sampler.prefix
        elif sampler.decoding.is_plain:
            continue
        own = logits[row].float()
        scores[row] = sampler.penalise(
            own.log_softmax(-1) if sampler.decoding.num_beams > 1 else own
        )
    if prefixes:
        joint = joint_scores(torch.stack([scores[row] for row in prefixes]), [*prefixes.values()])
        scores |= zip(prefixes, joint, strict=True)
    return scores


def _note(samplers: Sequence[TokenSampler], chosen: Sequence[Token | Candidates | None]) -> None:
    """Let the samplers know which tokens they have chosen."""
    tokens = {
        row: each.id
        for row, each in enumerate(chosen)
        if isinstance(each, Token) and not samplers[row].is_plain
    }
    noted = [samplers[row] for row in tokens]
    # Whatever fails does so before any of them has changed.
    prefixes = _extended(noted, [*tokens.values()])
    for sampler, token_id, prefix in zip(noted, tokens.values(), prefixes, strict=True):
        sampler.note(token_id, prefix)


def _extended(samplers: Sequence[TokenSampler], token_ids: Sequence[int]) -> list[CTCPrefix | None]:
    """Each sampler's prefix with a token; an end token adds nothing."""
    prefixes = [sampler.prefix for sampler in samplers]
    growing = {
        index: prefix
        for index, (sampler, prefix) in enumerate(zip(samplers, prefixes, strict=True))
        if prefix is not None and token_ids[index] not in sampler.stop_ids
    }
    grown = extend_prefixes([*growing.values()], [token_ids[index] for index in growing])
    for index, prefix in zip(growing, grown, strict=True):
        prefixes[index] = prefix
    return prefixes


def _rank(
    logits: Tensor,
    scores: dict[int, Tensor],
    rows: Sequence[int],
    samplers: Sequence[TokenSampler],
) -> dict[int, Candidates]:
    """Candidates of each beam's row."""
    logprobs = logits[rows].float().log_softmax(-1)
    count = min(max(samplers[row].n_candidates for row in rows), logits.shape[-1])
    top, ids = torch.stack([scores[row] for row in rows]).topk(count)
    columns = zip(rows, ids.tolist(), top.tolist(), logprobs.gather(-1, ids).tolist(), strict=True)
    return {
        row: Candidates(tuple(token_ids), tuple(values), tuple(plain))
        for row, token_ids, values, plain in columns
    }
