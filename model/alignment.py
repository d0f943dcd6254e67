"""When each token of a transcript was said: forced alignment to the CTC head.

Axis legend: F encoder frames (20 ms), L tokens of the transcript, D encoder width.

Source: the best path of Graves et al. 2006 (CTC) through the states of one known transcript; for
speech recognition as in Kürzinger et al. 2020, arXiv 2007.09127 (CTC segmentation). Own code.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from model.processing import SpeechLLMProcessor

ENCODER_FRAME_S = 0.02
"""One encoder frame: two mel frames of 10 ms."""


@dataclass(frozen=True, slots=True)
class WordSpan:
    """A word and the encoder frames that it was heard in, the last not included."""

    text: str
    start_frame: int
    end_frame: int


def token_scores(
    ctc_head: nn.Linear, encoder_frames: Tensor, token_ids: Sequence[int], blank_id: int
) -> NDArray[np.float32]:
    """Score a transcript's tokens, and the blank, in every frame.

    A frame's scores lack the logarithm of its softmax's sum. Every path adds it once for each
    frame, so the best one is the same, and the other entries of the vocabulary, up to hundreds of
    thousands, are never computed.

    Args:
        ctc_head: (D -> vocabulary).
        encoder_frames: (F, D) valid frames of one clip.
        token_ids: (L,) of its transcript.
        blank_id: the blank's.

    Returns:
        (F, 1 + L): the blank's logits, then the tokens'.
    """
    rows = [blank_id, *token_ids]
    weight = ctc_head.weight[rows]
    logits = encoder_frames.to(weight.dtype) @ weight.T
    if ctc_head.bias is not None:
        logits = logits + ctc_head.bias[rows]
    scores: NDArray[np.float32] = logits.float().cpu().numpy()
    return scores


def align_tokens(
    scores: NDArray[np.float32], token_ids: Sequence[int]
) -> list[tuple[int, int]] | None:
    """Find the likeliest frames of each token.

    The states of a path are blank, first token, blank, second token, …, blank. In a frame it stays,
    goes on by one, or skips a blank between two tokens that differ. All states of a frame are
    computed together.

    Args:
        scores: (F, 1 + L) as `token_scores` gives them.
        token_ids: (L,) the tokens; needed to tell repeated ones.

    Returns:
        First frame and frame behind the last of each token (L,); None where the tokens do not fit
        into the frames.
    """
    n_frames, n_tokens = len(scores), len(token_ids)
    if not n_tokens:
        return []
    repeats = sum(a == b for a, b in itertools.pairwise(token_ids))
    if n_frames < n_tokens + repeats:
        return None
    n_states = 2 * n_tokens + 1
    columns = np.zeros(n_states, np.intp)
    columns[1::2] = np.arange(1, n_tokens + 1)
    may_skip = np.zeros(n_states, bool)
    may_skip[3::2] = [a != b for a, b in itertools.pairwise(token_ids)]
    emitted = scores[:, columns]  # (F, states)
    moves = np.zeros((n_frames, n_states), np.int8)  # states behind that a frame's best came from
    best = np.full(n_states, -np.inf, np.float64)
    best[:2] = emitted[0, :2]
    candidates = np.full((3, n_states), -np.inf)
    for frame in range(1, n_frames):
        candidates[0] = best
        candidates[1, 1:] = best[:-1]
        candidates[2, 2:] = np.where(may_skip[2:], best[:-2], -np.inf)
        moves[frame] = candidates.argmax(0)
        best = candidates.max(0) + emitted[frame]
    state = n_states - 1 if best[-1] >= best[-2] else n_states - 2
    path = np.empty(n_frames, np.intp)
    for frame in range(n_frames - 1, -1, -1):
        path[frame] = state
        state -= int(moves[frame, state])
    states = 2 * np.arange(n_tokens) + 1
    starts = np.searchsorted(path, states, "left")
    ends = np.searchsorted(path, states, "right")
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def word_spans(
    text: str, offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> list[WordSpan]:
    """Put tokens together to words, which whitespace parts.

    Args:
        text: the transcript.
        offsets: where in it each token begins and ends, characters.
        spans: frames of each token.

    Returns:
        The words of the text in order. In a script that writes no spaces, whatever stands between
        two of them is a word.
    """
    words = []
    for match in re.finditer(r"\S+", text):
        own = [
            span
            for (start, end), span in zip(offsets, spans, strict=True)
            if start < match.end() and end > match.start()
        ]
        if own:
            words.append(WordSpan(match.group(), own[0][0], own[-1][1]))
    return words


def align_words(
    text: str,
    processor: SpeechLLMProcessor,
    ctc_head: nn.Linear,
    encoder_frames: Tensor,
) -> list[WordSpan] | None:
    """Find the frames of each word of a transcript.

    Args:
        text: the transcript; it is tokenised as in the head's training.
        processor: of the checkpoint.
        ctc_head: of the checkpoint.
        encoder_frames: (F, D) valid frames of the clip, as the head reads them.

    Returns:
        The words in order; None where the text is too long for the frames.
    """
    encoding = processor.tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )
    token_ids = encoding.input_ids
    blank_id = int(processor.tokenizer.pad_token_id)
    scores = token_scores(ctc_head, encoder_frames, token_ids, blank_id)
    spans = align_tokens(scores, token_ids)
    return None if spans is None else word_spans(text, encoding.offset_mapping, spans)
