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

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from transformers import LogitsProcessor

from model.lexicon import BEGIN, Spelling

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from model.ctc import CTCHead
    from model.lexicon import Lexicon
    from model.modeling import EmbeddedAudio

_NEVER = -1e30  # logarithm of a probability of nothing; differences of it stay finite
_NEGLIGIBLE = 60.0  # what is less likely than the likeliest by e to this power is left out
_LEAST_POSTERIOR = 1e-30
_LEAST_SCORE = -40.0  # of a token: what the head is sure not to hear, the LLM may still write
_SURELY_BLANK = 0.999
_MOST_MERGED = 8  # frames of silence, in each of which hardly anything is heard
_LOOK_AHEAD = 64  # frames, before the rest of a clip is looked at


class ClipPosteriors:
    """What the CTC head hears in one clip, on the host, and how it is used.

    Of 50 frames in a second more than half are surely blank. Runs of them are merged into one for
    each `_MOST_MERGED`, in which each token is as likely as in all of them together.
    """

    def __init__(
        self,
        ctc_logits: Tensor,
        head: CTCHead,
        stop_ids: Collection[int],
        weight: float,
        lexicon: Lexicon | None = None,
    ) -> None:
        """Keep the posteriors of a clip.

        Args:
            ctc_logits: (F, K) valid frames, at least one.
            head: what they are of.
            stop_ids: tokens of the LLM that end an answer.
            weight: of the head in a joint score, in [0, 1).
            lexicon: of which the answer is likely made, over the LLM's vocabulary; None for any.

        Raises:
            ValueError: the logits are not finite.
        """
        posteriors = ctc_logits.float().softmax(-1)
        blank = posteriors[:, head.blank]
        silent = blank > _SURELY_BLANK
        frames = torch.arange(len(posteriors), device=posteriors.device)
        last_sound = torch.where(silent, -1, frames).cummax(0).values
        begins = ~silent | ((frames - last_sound - 1) % _MOST_MERGED == 0)
        group = begins.long().cumsum(0) - 1
        n_groups = int(group[-1]) + 1
        merged = posteriors.new_zeros(n_groups, posteriors.shape[1])
        merged.index_add_(0, group, posteriors)
        log_blank = posteriors.new_zeros(n_groups).index_add_(0, group, blank.log())
        merged[:, head.blank] = log_blank.exp()
        self.posteriors = merged.cpu()  # (F', K)
        if not self.posteriors.isfinite().all():
            raise ValueError("the logits of the CTC head are not finite")
        self.array: NDArray[np.float32] = self.posteriors.numpy()
        self.blank = head.blank
        self.log_blank = _log(self.array[:, head.blank])
        self.head = head
        self.stop_ids = sorted(stop_ids)
        self.weight = weight
        self.lexicon = lexicon

    def __len__(self) -> int:
        """Frames that are left, F'."""
        return len(self.log_blank)


@dataclass(frozen=True, slots=True, eq=False)
class CTCPrefix:
    """An answer so far, and where in its clip it may end.

    Of the F' + 1 places before, between and behind the frames, W in a row are kept: those where it
    may be with more than a negligible probability.

    Attributes:
        clip: what was heard.
        start: first of the places.
        blank: (W,) float64, log-probability that the frames before each place say the answer and
            the last of them is blank.
        either: (W,) the same whether the last of them is blank or the answer's last token.
        last: output of the head for its last token; None before the first.
        log_prob: that the clip begins with the answer.
        spelling: where it stands in a word; of use where the clip has a lexicon.
    """

    clip: ClipPosteriors
    start: int
    blank: NDArray[np.float64]
    either: NDArray[np.float64]
    last: int | None = None
    log_prob: float = 0.0
    spelling: Spelling = BEGIN

    @classmethod
    def begin(cls, clip: ClipPosteriors) -> CTCPrefix:
        """The empty answer."""
        blank = np.concatenate([[0.0], clip.log_blank.cumsum()])
        return cls(clip, 0, blank, blank)

    @property
    def end_log_prob(self) -> float:
        """That the clip says the answer and nothing more."""
        reaches_end = self.start + len(self.either) == len(self.clip) + 1
        return float(self.either[-1]) if reaches_end else _NEVER

    def paths_of(
        self, index: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Log-probabilities of the next frames, as many as a token may take: three of (N,).

        That the token of output `index` begins in each; that a frame says it; that one is blank.
        """
        clip, start = self.clip, self.start
        n_begin = min(len(self.either), len(clip) - start)
        stop = min(len(clip), start + n_begin + _LOOK_AHEAD)
        while True:
            log_token = _log(clip.array[start:stop, index])
            log_blank = clip.log_blank[start:stop]
            # Behind the last place it stays in each frame at most as likely as that frame allows.
            stays = np.maximum(log_token[n_begin:], log_blank[n_begin:]).cumsum()
            n_frames = n_begin + int(np.searchsorted(-stays, _NEGLIGIBLE))
            if n_frames < stop - start or stop == len(clip):
                break
            stop = len(clip)
        before = self.blank if index == self.last else self.either  # equal ones need a blank
        enters = np.full(n_frames, _NEVER)
        enters[:n_begin] = before[:n_begin] + log_token[:n_begin]
        return enters, log_token[:n_frames], log_blank[:n_frames]

    def extend(self, token_id: int) -> CTCPrefix:
        """The answer with one more token."""
        return extend_prefixes([self], [token_id])[0]


def extend_prefixes(prefixes: Sequence[CTCPrefix], token_ids: Sequence[int]) -> list[CTCPrefix]:
    """Add a token to each of R answers.

    One that the head has no output for, or no frame left, is passed over: the answer goes on from
    where it was. All are added together, for the arrays are short, and what costs is the number of
    calls.
    """
    extended = [_respelt(*each) for each in zip(prefixes, token_ids, strict=True)]
    grown: list[tuple[int, int]] = []  # row, output of its token
    paths: list[tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]] = []
    for row, (prefix, token_id) in enumerate(zip(prefixes, token_ids, strict=True)):
        index = prefix.clip.head.index_of(token_id)
        if index is not None:
            grown.append((row, index))
            paths.append(prefix.paths_of(index))
    if not grown:
        return extended
    lengths = [len(path[0]) for path in paths]
    enters = np.full((len(paths), max(1, *lengths)), _NEVER)
    log_token, log_blank = np.zeros_like(enters), np.zeros_like(enters)
    for row, (first, second, third) in enumerate(paths):
        enters[row, : len(first)] = first
        log_token[row, : len(second)] = second
        log_blank[row, : len(third)] = third
    token = _accumulate(enters, log_token)
    blank = np.full_like(token, _NEVER)
    blank[:, 1:] = token[:, :-1]
    blank = _accumulate(blank + log_blank, log_blank)
    either = np.logaddexp(token, blank)
    either[np.arange(either.shape[1]) >= np.array(lengths)[:, None]] = _NEVER
    peaks = enters.max(1, keepdims=True)
    log_probs = (peaks[:, 0] + np.log(np.exp(enters - peaks).sum(1))).tolist()
    kept = either > either.max(1, keepdims=True) - _NEGLIGIBLE
    firsts = kept.argmax(1).tolist()
    ends = (kept.shape[1] - kept[:, ::-1].argmax(1)).tolist()
    for at, (row, index) in enumerate(grown):
        if log_probs[at] < _NEVER / 2:
            continue
        before, window = prefixes[row], slice(firsts[at], ends[at])
        extended[row] = CTCPrefix(
            before.clip,
            before.start + 1 + firsts[at],
            blank[at, window],
            either[at, window],
            index,
            log_probs[at],
            extended[row].spelling,
        )
    return extended


def _respelt(prefix: CTCPrefix, token_id: int) -> CTCPrefix:
    """The answer as it was, but for where one more token leaves it in a word."""
    lexicon = prefix.clip.lexicon
    if lexicon is None:
        return prefix
    return replace(prefix, spelling=lexicon.read(prefix.spelling, token_id))


def prefix_scores(prefixes: Sequence[CTCPrefix]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of what comes next, given R answers so far, all of one head.

    Returns:
        Of each of the head's outputs (R, K), the least there is for its blank, and of the end, that
        nothing more is said (R,); float32, on the host.
    """
    clip = prefixes[0].clip
    scores = torch.empty(len(prefixes), clip.posteriors.shape[1])
    array = scores.numpy()
    offsets: list[float] = []
    for row, prefix in enumerate(prefixes):
        own, first, peak = prefix.clip, prefix.start, float(prefix.either.max())
        frames = own.posteriors[first : first + len(prefix.either)]  # none behind the last place
        n_frames = frames.shape[0]
        weights = np.exp(prefix.either[:n_frames] - peak).astype(np.float32)
        torch.mv(frames.T, torch.from_numpy(weights), out=scores[row])
        if prefix.last is not None:  # the same token again needs a blank between
            apart = np.exp(prefix.blank[:n_frames] - peak)
            array[row, prefix.last] = apart @ own.array[first : first + n_frames, prefix.last]
        offsets.append(peak - prefix.log_prob)
    array[:, clip.blank] = 0.0
    scores = scores.clamp_(min=_LEAST_POSTERIOR).log_().add_(torch.tensor(offsets)[:, None])
    ends = torch.tensor([prefix.end_log_prob - prefix.log_prob for prefix in prefixes])
    return scores.clamp_(min=_LEAST_SCORE, max=0.0), ends.clamp_(min=_LEAST_SCORE, max=0.0)


def _log(probabilities: NDArray[np.float32]) -> NDArray[np.float64]:
    clamped = np.maximum(probabilities, _LEAST_POSTERIOR)
    logarithms: NDArray[np.float64] = np.log(clamped, dtype=np.float64)
    return logarithms


def _accumulate(enters: NDArray[np.float64], stays: NDArray[np.float64]) -> NDArray[np.float64]:
    """Solve x[t] = log(exp(x[t-1] + stays[t]) + exp(enters[t])) from nothing on: (R, N)."""
    total = stays.cumsum(1)
    inside: NDArray[np.float64] = total + np.logaddexp.accumulate(enters - total, axis=1)
    return np.maximum(inside, _NEVER)


def clip_posteriors(
    audio: EmbeddedAudio,
    head: CTCHead,
    stop_ids: Collection[int],
    weight: float,
    lexicons: Sequence[Lexicon | None],
) -> list[ClipPosteriors]:
    """What the head hears in each of B clips, each with its lexicon; needs `audio.ctc_logits`."""
    if audio.ctc_logits is None:
        raise ValueError("the audio was embedded without the CTC head")
    return [
        ClipPosteriors(logits[:length], head, stop_ids, weight, lexicon)
        for logits, length, lexicon in zip(
            audio.ctc_logits, audio.frame_lens.tolist(), lexicons, strict=True
        )
    ]


def joint_scores(scores: Tensor, prefixes: Sequence[CTCPrefix]) -> Tensor:
    """Weigh the LLM's scores (R, V), logits or log-probabilities, with those of the CTC head.

    An end token has the score of the end. What the head has no output for gets the best score of
    the row, so that it is left to the LLM. What brings a word outside a clip's lexicon costs its
    penalty.

    Args:
        scores: of the next tokens.
        prefixes: R answers so far, of one head, with the same weight and the same end tokens, and
            all with lexicons of one penalty or none with one.

    Returns:
        (R, V) float32; what the LLM excludes stays excluded.
    """
    clip = prefixes[0].clip
    head, weight = clip.head, clip.weight
    heard, ends = (each.to(scores.device) for each in prefix_scores(prefixes))
    alone = scores.float() * (1 - weight)
    if head.token_ids is None:
        jointly = alone.clone()
        jointly[:, : heard.shape[1]] += heard * weight
    else:
        best = torch.maximum(heard.max(-1).values, ends)[:, None]
        jointly = alone + best * weight
        jointly[:, head.token_ids] += (heard - best) * weight
    jointly[:, clip.stop_ids] = alone[:, clip.stop_ids] + ends[:, None] * weight
    if clip.lexicon is not None:
        jointly -= _outside(prefixes).to(jointly.device) * clip.lexicon.penalty
    return jointly


def _outside(prefixes: Sequence[CTCPrefix]) -> Tensor:
    """Which next tokens (R, V) bring a word outside, behind answers to clips with lexicons."""
    lexicons = [cast("Lexicon", prefix.clip.lexicon) for prefix in prefixes]
    places = list(zip(lexicons, (prefix.spelling for prefix in prefixes), strict=True))
    outside = np.stack([lexicon.brings_outside(spelling) for lexicon, spelling in places])
    ends = np.array([lexicon.ends_outside(spelling) for lexicon, spelling in places])
    outside[:, prefixes[0].clip.stop_ids] = ends[:, None]
    return torch.from_numpy(outside)


class JointDecoding(LogitsProcessor):
    """Has `generate` decode jointly, greedily or with beams."""

    def __init__(self, clips: Sequence[ClipPosteriors], prompt_len: int) -> None:
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
        answers = {
            row: (row // n_beams, tuple(ids))
            for row, ids in enumerate(input_ids[:, self._prompt_len :].tolist())
            if self._stop_ids.isdisjoint(ids)
        }
        if not answers:
            return scores
        new = [each for each in dict.fromkeys(answers.values()) if each not in self._prefixes]
        parents = [self._prefixes[clip, ids[:-1]] for clip, ids in new]
        grown = extend_prefixes(parents, [ids[-1] for _, ids in new])
        known = self._prefixes | dict(zip(new, grown, strict=True))
        self._prefixes = {each: known[each] for each in answers.values()}
        rows = [*answers]
        scores = scores.float().clone()
        scores[rows] = joint_scores(scores[rows], [known[each] for each in answers.values()])
        return scores
