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

    from model.ctc import CTCHead
    from model.processing import SpeechLLMProcessor

ENCODER_FRAME_S = 0.02
"""One encoder frame: two mel frames of 10 ms."""

_MAX_TAIL_FRAMES = 12  # that a comma lengthens its word by: 0.24 s


@dataclass(frozen=True, slots=True)
class WordSpan:
    """A word and the encoder frames that it was heard in, the last not included."""

    text: str
    start_frame: int
    end_frame: int


def token_scores(
    ctc_head: nn.Linear, encoder_frames: Tensor, indices: Sequence[int], blank: int
) -> NDArray[np.float32]:
    """Score a transcript's tokens, and the blank, in every frame.

    A frame's scores lack the logarithm of its softmax's sum. Every path adds it once for each
    frame, so the best one is the same, and the head's other outputs, up to hundreds of thousands,
    are never computed.

    Args:
        ctc_head: (D -> its outputs).
        encoder_frames: (F, D) valid frames of one clip.
        indices: (L,) of its transcript's tokens among the outputs.
        blank: the blank's.

    Returns:
        (F, 1 + L): the blank's logits, then the tokens'.
    """
    rows = [blank, *indices]
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
    text: str,
    offsets: Sequence[tuple[int, int]],
    spans: Sequence[tuple[int, int] | None],
    n_frames: int,
) -> list[WordSpan]:
    """Put tokens together to words, which whitespace parts.

    Args:
        text: the transcript.
        offsets: where in it each token begins and ends, characters.
        spans: frames of each token; None for one that the head cannot hear.
        n_frames: of the clip.

    Returns:
        The words of the text in order. In a script that writes no spaces, whatever stands between
        two of them is a word. Words of which no token was heard share in equal parts what their
        neighbours leave.
    """
    texts, placed = [], []
    for match in re.finditer(r"\S+", text):
        own = [
            (any(map(str.isalnum, text[start:end])), span)
            for (start, end), span in zip(offsets, spans, strict=True)
            if start < match.end() and end > match.start()
        ]
        if own:
            heard = [span for _, span in own if span is not None]
            said = [span for is_said, span in own if is_said and span is not None] or heard
            texts.append(match.group())
            placed.append((said[0][0], _end_of(said[-1], heard[-1])) if said else None)
    between = _fill_gaps(placed, n_frames)
    return [WordSpan(word, *span) for word, span in zip(texts, between, strict=True)]


def _end_of(letters: tuple[int, int], last: tuple[int, int]) -> int:
    """End of a word whose last letters and last token were heard in these frames.

    The head fires early in a word's last letters, so that what follows tells better where it ends;
    but a comma may be heard anywhere in the pause behind its word.
    """
    return max(letters[1], min(last[1], letters[1] + _MAX_TAIL_FRAMES))


def _fill_gaps(spans: Sequence[tuple[int, int] | None], n_frames: int) -> list[tuple[int, int]]:
    edges = {0: 0, len(spans): n_frames}  # frame at which the n-th word begins, or the last ends
    for index, span in enumerate(spans):
        if span is not None:  # between two that were heard the later one stands, and is not read
            edges[index], edges[index + 1] = span
    at = sorted(edges)
    frames = np.interp(range(len(spans) + 1), at, [edges[index] for index in at]).round()
    shared = itertools.pairwise(frames.astype(int).tolist())
    return [gap if span is None else span for span, gap in zip(spans, shared, strict=True)]


def align_words(
    text: str,
    processor: SpeechLLMProcessor,
    ctc_head: CTCHead,
    encoder_frames: Tensor,
) -> list[WordSpan] | None:
    """Find the frames of each word of a transcript.

    Args:
        text: the transcript; it is tokenised as in the head's training.
        processor: of the checkpoint.
        ctc_head: of the checkpoint.
        encoder_frames: (F, D) valid frames of the clip, as the head reads them.

    Returns:
        The words in order; None where the text is too long for the frames, or the head covers less
        than half of its tokens, so that most times would be guesses.
    """
    encoding = processor.tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )
    covered = ctc_head.covered()
    indices = [covered.get(token) for token in encoding.input_ids]
    heard = [index for index in indices if index is not None]
    if 2 * len(heard) < len(indices):
        return None
    found = align_tokens(token_scores(ctc_head, encoder_frames, heard, ctc_head.blank), heard)
    if found is None:
        return None
    remaining = iter(found)
    spans = [None if index is None else next(remaining) for index in indices]
    return word_spans(text, encoding.offset_mapping, spans, len(encoder_frames))
