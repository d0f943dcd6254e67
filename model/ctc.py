"""The auxiliary CTC head, its loss and its greedy reading.

Axis legend: B clips, F encoder frames, D encoder width, K outputs of the head.

What the head puts out is counted in indices of its own; `CTCHead` alone knows which tokens of the
LLM they are.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from model.encoder import length_mask

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor


class CTCHead(nn.Linear):
    """Logits (B, F, K) of the blank and of tokens, from encoder frames (B, F, D).

    A head over the LLM's whole vocabulary has the blank at the pad token, which never occurs in a
    transcript. A hub LLM's has 150,000 entries, 0.9 GB of logits for 30 s of audio, most of which
    a language never uses; a head over some of them has the blank first.

    Attributes:
        token_ids: (K,) int64, the LLM's token of each output: the pad token, standing for the
            blank, then the others in ascending order. None: the whole vocabulary.
        blank: index of the blank.
    """

    token_ids: Tensor | None

    def __init__(
        self, d_encoder: int, vocab_size: int, blank_id: int, n_tokens: int | None = None
    ) -> None:
        """Make a head with random weights.

        Args:
            d_encoder: D.
            vocab_size: of the LLM, as many as its embedding table has rows.
            blank_id: the pad token's id.
            n_tokens: K, if not the whole vocabulary; the first tokens there are, until others are
                loaded or chosen.
        """
        super().__init__(d_encoder, vocab_size if n_tokens is None else n_tokens)
        self.vocab_size = vocab_size
        self.blank = blank_id if n_tokens is None else 0
        self._blank_id = blank_id
        self._indices: dict[int, int] | None = None
        token_ids = None
        if n_tokens is not None:
            others = torch.arange(n_tokens - 1)
            token_ids = torch.cat([torch.tensor([blank_id]), others + (others >= blank_id)])
        self.register_buffer("token_ids", token_ids)

    def choose(self, tokens: Iterable[int]) -> None:
        """Cover these K - 1 tokens, and the blank."""
        self.token_ids = torch.tensor([self._blank_id, *sorted(tokens)])
        self._indices = None
        self.check()

    def check(self) -> None:
        """Compare the recorded tokens with the vocabulary.

        Raises:
            ValueError: `token_ids` are no integers, do not begin with the blank, do not ascend, or
                lie outside the vocabulary.
        """
        if self.token_ids is None:
            return
        if self.token_ids.dtype != torch.int64:
            raise ValueError(f"ctc_head.token_ids are {self.token_ids.dtype}, wanted torch.int64")
        first, *others = self.token_ids.tolist()
        if first != self._blank_id:
            raise ValueError(
                f"ctc_head.token_ids begin with {first}, wanted the pad token {self._blank_id}"
            )
        if others != sorted(set(others)) or first in others:
            raise ValueError("ctc_head.token_ids do not ascend behind the blank, each of them once")
        if others and not 0 <= others[0] <= others[-1] < self.vocab_size:
            raise ValueError(
                f"ctc_head.token_ids lie in [{others[0]}, {others[-1]}], the LLM's in "
                f"[0, {self.vocab_size})"
            )

    def fingerprint(self) -> str | None:
        """What the tokens are known by; None for the whole vocabulary."""
        if self.token_ids is None:
            return None
        return hashlib.sha256(repr(self.token_ids.tolist()).encode()).hexdigest()

    def covered(self) -> dict[int, int]:
        """Index of every token that the head can put out, by its id."""
        ids: Iterable[int] = range(self.vocab_size)
        if self.token_ids is not None:
            ids = self.token_ids.tolist()
        return {token_id: index for index, token_id in enumerate(ids)}

    def index_of(self, token_id: int) -> int | None:
        """Index of a token; None for the blank and for what the head cannot put out."""
        if token_id == self._blank_id or not 0 <= token_id < self.vocab_size:
            return None
        if self.token_ids is None:
            return token_id
        if self._indices is None:  # on the host: asked for at every token
            self._indices = self.covered()
        return self._indices.get(token_id)

    def to_token_ids(self, indices: Sequence[int]) -> list[int]:
        """The LLM's tokens of the head's indices."""
        if self.token_ids is None:
            return list(indices)
        ids: list[int] = self.token_ids[list(indices)].tolist()
        return ids

    def rows_of(self, table: Tensor) -> Tensor:
        """The rows (K, …) of an embedding table (V, …) that belong to the head's outputs."""
        return table if self.token_ids is None else table[self.token_ids]

    @torch.no_grad()
    def take_over(self, weight: Tensor, bias: Tensor, token_ids: Iterable[int]) -> None:
        """Copy the outputs that another head (K', D), (K',) has for the same tokens."""
        own = self.covered()
        pairs = [(own[token], row) for row, token in enumerate(token_ids) if token in own]
        mine, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
        self.weight[mine] = weight[theirs].to(self.weight)
        self.bias[mine] = bias[theirs].to(self.bias)


def ctc_loss(
    logits: Tensor, frame_lens: Tensor, targets: Tensor, target_lens: Tensor, blank: int
) -> Tensor:
    """CTC loss, averaged over target tokens.

    Args:
        logits: (B, F, K).
        frame_lens: (B,) valid frames.
        targets: (B, L) indices, right-padded.
        target_lens: (B,) valid ones; 0 is a clip without speech.
        blank: index of the blank.

    Returns:
        Scalar float32. Clips whose tokens do not fit their frames add nothing.

    Source: Graves et al. 2006.
    """
    log_probs = logits.float().log_softmax(-1).transpose(0, 1)  # (F, B, K)
    losses = functional.ctc_loss(
        log_probs, targets, frame_lens, target_lens, blank, "none", zero_infinity=True
    )
    return losses.sum() / target_lens.clamp(min=1).sum()


def ctc_token_counts(logits: Tensor, frame_lens: Tensor, blank: int, stack_size: int) -> Tensor:
    """Tokens on the best path from a clip's start to the end of each stack of frames.

    Args:
        logits: (B, F, K).
        frame_lens: (B,) valid frames.
        blank: index of the blank.
        stack_size: frames in a stack; an incomplete one counts.

    Returns:
        (B, ceil(F / stack_size)) int64, growing along each row.
    """
    paths = logits.argmax(-1)  # (B, F)
    before = functional.pad(paths, (1, 0), value=blank)[:, :-1]
    begins = (paths != blank) & (paths != before) & length_mask(frame_lens, paths.shape[1])
    counts = begins.long().cumsum(1)
    # The last stack ends with the last frame there is.
    ends = torch.arange(stack_size, paths.shape[1] + stack_size, stack_size, device=paths.device)
    return counts[:, (ends - 1).clamp(max=paths.shape[1] - 1)]


def ctc_greedy(logits: Tensor, frame_lens: Tensor, blank: int) -> list[list[int]]:
    """Best path of each row, as indices: repeats merged, blanks removed.

    Args:
        logits: (B, F, K).
        frame_lens: (B,) valid frames.
        blank: index of the blank.
    """
    paths = logits.argmax(-1).cpu()
    return [
        [int(index) for index in torch.unique_consecutive(path[:length]) if index != blank]
        for path, length in zip(paths, frame_lens.tolist(), strict=True)
    ]
