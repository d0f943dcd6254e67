"""The auxiliary CTC head's loss and greedy reading, over the LLM's own vocabulary.

Axis legend: B clips, F encoder frames, V vocabulary entries (the blank is the pad token, which
never occurs in a transcript).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from model.encoder import length_mask

if TYPE_CHECKING:
    from torch import Tensor


def ctc_loss(
    logits: Tensor, frame_lens: Tensor, targets: Tensor, target_lens: Tensor, blank_id: int
) -> Tensor:
    """CTC loss, averaged over target tokens.

    Args:
        logits: (B, F, V).
        frame_lens: (B,) valid frames.
        targets: (B, L) token ids, right-padded.
        target_lens: (B,) valid tokens; 0 is a clip without speech.
        blank_id: vocabulary entry of the blank.

    Returns:
        Scalar float32. Clips whose tokens do not fit their frames add nothing.

    Source: Graves et al. 2006.
    """
    log_probs = logits.float().log_softmax(-1).transpose(0, 1)  # (F, B, V)
    losses = functional.ctc_loss(
        log_probs, targets, frame_lens, target_lens, blank_id, "none", zero_infinity=True
    )
    return losses.sum() / target_lens.clamp(min=1).sum()


def ctc_token_counts(logits: Tensor, frame_lens: Tensor, blank_id: int, stack_size: int) -> Tensor:
    """Tokens on the best path from a clip's start to the end of each stack of frames.

    Args:
        logits: (B, F, V).
        frame_lens: (B,) valid frames.
        blank_id: vocabulary entry of the blank.
        stack_size: frames in a stack; an incomplete one counts.

    Returns:
        (B, ceil(F / stack_size)) int64, growing along each row.
    """
    paths = logits.argmax(-1)  # (B, F)
    before = functional.pad(paths, (1, 0), value=blank_id)[:, :-1]
    begins = (paths != blank_id) & (paths != before) & length_mask(frame_lens, paths.shape[1])
    counts = begins.long().cumsum(1)
    # The last stack ends with the last frame there is.
    ends = torch.arange(stack_size, paths.shape[1] + stack_size, stack_size, device=paths.device)
    return counts[:, (ends - 1).clamp(max=paths.shape[1] - 1)]


def ctc_greedy(logits: Tensor, frame_lens: Tensor, blank_id: int) -> list[list[int]]:
    """Best path of each row: repeats merged, blanks removed.

    Args:
        logits: (B, F, V).
        frame_lens: (B,) valid frames.
        blank_id: vocabulary entry of the blank.
    """
    paths = logits.argmax(-1).cpu()
    return [
        [int(token) for token in torch.unique_consecutive(path[:length]) if token != blank_id]
        for path, length in zip(paths, frame_lens.tolist(), strict=True)
    ]
