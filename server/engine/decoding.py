"""How one request's tokens are chosen, and how its answer may end. No tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from server.errors import InvalidRequestError

FinishReason = Literal["stop", "length", "loop", "cancelled", "deadline"]
"""`stop`: the end token; `length`: the token cap; `loop`: it repeated itself, under a penalty too;
`cancelled`: its client left; `deadline`: the answer would have come too late."""

MAX_BEAMS = 8

NO_ID = -1
"""Instead of a token's id, where the model's output is not finite."""

_MAX_TEMPERATURE = 2.0
_MAX_SEED = 2**63 - 1
_PENALTIES = (0.1, 10.0)


@dataclass(frozen=True)  # no slots: with them, Python's own code pickles it, field by field
class Decoding:
    """How to choose tokens.

    Attributes:
        temperature: of sampling; 0 takes the likeliest token.
        top_p: sample among the likeliest tokens that have this much probability together.
        seed: of sampling; the same seed gives the same answer in any batch. None draws one.
        repetition_penalty: divides the logits (multiplies negative ones) of tokens that were
            generated before; 1 for none. The prompt's tokens are not penalised.
        max_tokens: cap besides the one from the audio's duration; None for only that.
        logprobs: also report each token's log-probability under the model.
        num_beams: of beam search, each of which takes a slot; 1 for none.
        n_best: how many of the beams' answers to report, with their scores.

    Raises:
        InvalidRequestError: a value out of range, or beams with sampling; names it.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    max_tokens: int | None = None
    logprobs: bool = False
    num_beams: int = 1
    n_best: int = 1

    def __post_init__(self) -> None:
        """Check the ranges; NaN is in none of them."""
        in_range = {
            "temperature": 0.0 <= self.temperature <= _MAX_TEMPERATURE,
            "top_p": 0.0 < self.top_p <= 1.0,
            "seed": self.seed is None or 0 <= self.seed <= _MAX_SEED,
            "repetition_penalty": _PENALTIES[0] <= self.repetition_penalty <= _PENALTIES[1],
            "max_tokens": self.max_tokens is None or self.max_tokens >= 1,
            "num_beams": 1 <= self.num_beams <= MAX_BEAMS,
            "n_best": self.n_best >= 1,
        }
        for name, is_in_range in in_range.items():
            if not is_in_range:
                value = getattr(self, name)
                raise InvalidRequestError(f"{name} is out of range: {value}", param=name)
        if self.n_best > self.num_beams:
            raise InvalidRequestError(
                f"n_best is at most num_beams: {self.n_best} answers of {self.num_beams}",
                param="n_best",
            )
        if self.num_beams > 1 and self.temperature > 0:
            raise InvalidRequestError(
                "beam search does not sample: it takes a temperature of 0", param="num_beams"
            )

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is taken as it is and nothing besides is asked for."""
        is_greedy = self.temperature == 0 and self.num_beams == 1
        return is_greedy and self.repetition_penalty == 1 and not self.logprobs


GREEDY = Decoding()


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token.

    Attributes:
        id: in the LLM's vocabulary.
        logprob: natural logarithm of its probability under the model; None if not asked for.
    """

    id: int
    logprob: float | None = None


@dataclass(frozen=True, slots=True)
class Candidates:
    """The likeliest next tokens of one beam, the best first.

    Attributes:
        token_ids: in the LLM's vocabulary.
        scores: natural logarithms of their probabilities, after the repetition penalty, and
            weighed with the CTC head's where the checkpoint decodes jointly.
        logprobs: of the LLM alone, without a penalty.
    """

    token_ids: tuple[int, ...]
    scores: tuple[float, ...]
    logprobs: tuple[float, ...]
