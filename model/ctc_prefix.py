"""Joint decoding: how well an answer so far fits what the CTC head hears.

An LLM that reads audio by attention may leap ahead, stop early or go round in circles; a CTC head
cannot, for it must account for every frame in order. The score of a token is a weighted sum of
both logarithms.

Axis legend: B clips, R rows (B clips of one or more beams), F frames, K outputs of the head,
V vocabulary.

Source: Watanabe et al. 2017, "Hybrid CTC/Attention Architecture for End-to-End Speech Recognition",
and Hori et al. 2017, "Joint CTC/attention decoding for end-to-end speech recognition". Own code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import LogitsProcessor

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from model.ctc import CTCHead
    from model.modeling import EmbeddedAudio

_NEVER = -1e30  # logarithm of a probability of nothing; differences of it stay finite
_LEAST_POSTERIOR = 1e-30
_LEAST_SCORE = -40.0  # of a token: what the head is sure not to hear, the LLM may still write
_SURELY_BLANK = 0.999


class HeardClip:
    """What the CTC head hears in one clip, on the host.

    Of a run of frames that are surely blank only the first is kept: it parts equal tokens, and the
    others would add nothing but work. Of 50 frames in a second that leaves some 20.
    """

    def __init__(
        self, ctc_logits: Tensor, head: CTCHead, stop_ids: Collection[int], weight: float
    ) -> None:
        """Keep the posteriors of a clip.

        Args:
            ctc_logits: (F, K) valid frames, at least one.
            head: what they are of.
            stop_ids: tokens of the LLM that end an answer.
            weight: of what is heard in a joint score, in [0, 1).
        """
        posteriors = ctc_logits.float().softmax(-1)
        silent = posteriors[:, head.blank] > _SURELY_BLANK
        again = torch.zeros_like(silent)
        again[1:] = silent[1:] & silent[:-1]
        self.posteriors = posteriors[~again].cpu()  # (F', K)
        self.by_output: NDArray[np.float32] = self.posteriors.T.contiguous().numpy()
        self.blank = head.blank
        self.log_blank = _log(self.by_output[head.blank])
        self.head = head
        self.stop_ids = sorted(stop_ids)
        self.weight = weight


@dataclass(frozen=True, slots=True, eq=False)
class CTCPrefix:
    """An answer so far, and where in its clip it may end.

    Attributes:
        clip: what was heard.
        token: (F' + 1,) float64, log-probability that the frames before each say the answer and
            the last of them its last token.
        blank: (F' + 1,) the same with a blank in the last frame.
        last: output of the head for its last token; None before the first.
        log_prob: that the clip begins with the answer.
    """

    clip: HeardClip
    token: NDArray[np.float64]
    blank: NDArray[np.float64]
    last: int | None = None
    log_prob: float = 0.0

    @classmethod
    def begin(cls, clip: HeardClip) -> CTCPrefix:
        """The empty answer."""
        blank = np.concatenate([[0.0], clip.log_blank.cumsum()])
        return cls(clip, np.full_like(blank, _NEVER), blank)

    def scores(self, vocab_size: int) -> Tensor:
        """Log-probability of each next token, given the answer so far: (V,) float32.

        An end token has the probability that nothing more is said. What the head has no output
        for, and its blank, have the least score there is.
        """
        clip = self.clip
        before = np.logaddexp(self.token, self.blank)  # that the next token begins in a frame
        peak = float(before[:-1].max())
        weights = torch.from_numpy(np.exp(before[:-1] - peak).astype(np.float32))
        heard = weights @ clip.posteriors  # (K,)
        if self.last is not None:  # the same token again needs a blank between
            apart = torch.from_numpy(np.exp(self.blank[:-1] - peak).astype(np.float32))
            heard[self.last] = apart @ clip.posteriors[:, self.last]
        heard[clip.blank] = 0.0
        scores = heard.clamp(min=_LEAST_POSTERIOR).log() + (peak - self.log_prob)
        scores = clip.head.to_vocabulary(scores, vocab_size, _LEAST_SCORE)
        scores[clip.stop_ids] = float(before[-1]) - self.log_prob
        return scores.clamp(min=_LEAST_SCORE, max=0.0)

    def extend(self, token_id: int) -> CTCPrefix:
        """The answer with one more token; one that the head has no output for is passed over."""
        clip = self.clip
        index = clip.head.index_of(token_id)
        if index is None:
            return self
        log_token = _log(clip.by_output[index])
        before = self.blank if index == self.last else np.logaddexp(self.token, self.blank)
        enters = before[:-1] + log_token
        token = _accumulate(enters, log_token)
        blank = _accumulate(token[:-1] + clip.log_blank, clip.log_blank)
        return CTCPrefix(clip, token, blank, index, float(np.logaddexp.reduce(enters)))


def _log(probabilities: NDArray[np.float32]) -> NDArray[np.float64]:
    clamped = np.maximum(probabilities, _LEAST_POSTERIOR)
    logarithms: NDArray[np.float64] = np.log(clamped, dtype=np.float64)
    return logarithms


def _accumulate(enters: NDArray[np.float64], stays: NDArray[np.float64]) -> NDArray[np.float64]:
    """Solve x[t] = log(exp(x[t-1] + stays[t]) + exp(enters[t])) from nothing on: (F' + 1,)."""
    total = stays.cumsum()
    inside = total + np.logaddexp.accumulate(enters - total)
    return np.concatenate([[_NEVER], np.maximum(inside, _NEVER)])


def heard_clips(
    audio: EmbeddedAudio, head: CTCHead, stop_ids: Collection[int], weight: float
) -> list[HeardClip]:
    """What the head hears in each of B clips; needs `audio.ctc_logits`."""
    if audio.ctc_logits is None:
        raise ValueError("the audio was embedded without the CTC head")
    return [
        HeardClip(logits[:length], head, stop_ids, weight)
        for logits, length in zip(audio.ctc_logits, audio.frame_lens.tolist(), strict=True)
    ]


def joint_scores(scores: Tensor, prefixes: Sequence[CTCPrefix]) -> Tensor:
    """Weigh the LLM's scores (R, V), logits or log-probabilities, with those of the CTC head.

    Args:
        scores: of the next tokens.
        prefixes: R answers so far, all of one weight.

    Returns:
        (R, V) float32; what the LLM excludes stays excluded.
    """
    heard = torch.stack([prefix.scores(scores.shape[-1]) for prefix in prefixes])
    weight = prefixes[0].clip.weight
    return scores.float() * (1 - weight) + heard.to(scores.device) * weight


class JointDecoding(LogitsProcessor):
    """Has `generate` decode jointly, greedily or with beams."""

    def __init__(self, clips: Sequence[HeardClip], prompt_len: int) -> None:
        """Begin the answers to B clips behind prompts of one length."""
        self._n_clips = len(clips)
        self._prompt_len = prompt_len
        self._prefixes: dict[tuple[int, tuple[int, ...]], CTCPrefix] = {
            (row, ()): CTCPrefix.begin(clip) for row, clip in enumerate(clips)
        }
        self._stop_ids = set(clips[0].stop_ids)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Weigh the scores (R, V) of answers that have not ended."""
        n_beams = len(scores) // self._n_clips
        prefixes: dict[tuple[int, tuple[int, ...]], CTCPrefix] = {}
        rows: list[int] = []
        answers: list[tuple[int, tuple[int, ...]]] = []
        for row, ids in enumerate(input_ids[:, self._prompt_len :].tolist()):
            if not self._stop_ids.isdisjoint(ids):
                continue
            key = (row // n_beams, tuple(ids))
            if key not in prefixes:
                known = self._prefixes.get(key)
                if known is None:
                    known = self._prefixes[key[0], key[1][:-1]].extend(ids[-1])
                prefixes[key] = known
            rows.append(row)
            answers.append(key)
        self._prefixes = prefixes
        if rows:
            scores = scores.float().clone()
            scores[rows] = joint_scores(scores[rows], [prefixes[key] for key in answers])
        return scores
