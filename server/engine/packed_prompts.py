"""Prompts one behind another, without the padding that a rectangle of them has.

Axis legend: B prompts, L the longest of them, T the tokens of all, D width, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from model.log_mel import to_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from server.engine.kv_slots import KVSlots


@dataclass(frozen=True, slots=True)
class PackedPrompts:
    """Prompts to prefill, and tokens of none behind them, which attend to themselves.

    Attributes:
        embeds: (T, D).
        position_ids: (T,).
        slots: (T,) which each token goes to; S where it goes to none.
        columns: (T,) where in its slot.
        begins: (T,) where in T its prompt begins.
    """

    embeds: Tensor
    position_ids: Tensor
    slots: Tensor
    columns: Tensor
    begins: Tensor


class PromptBuffers:
    """Where recordings read prompts."""

    def __init__(self, most_tokens: int, like: Tensor) -> None:
        """Allocate; `like` is (..., D), of the embeddings' dtype and device."""
        self._embeds = like.new_zeros(most_tokens, like.shape[-1])
        self._numbers = torch.zeros(5, most_tokens, dtype=torch.int64, device=like.device)

    def first(self, n_tokens: int) -> PackedPrompts:
        """So many tokens of them."""
        _, *numbers = self._numbers[:, :n_tokens]
        return PackedPrompts(self._embeds[:n_tokens], *numbers)

    def fill(
        self,
        n_tokens: int,
        embeds: Tensor,
        position_ids: Tensor,
        slots: KVSlots,
        lens: Sequence[int],
    ) -> None:
        """Make `first(n_tokens)`, no fewer than there are, what `pack` gives and no one's tokens.

        Args:
            n_tokens: T.
            embeds: (B, L, D), right-padded.
            position_ids: (B, L).
            slots: that a prefill of theirs has begun for.
            lens: (B,) tokens of each.
        """
        prompts = self.first(n_tokens)
        numbers = _numbers(lens, embeds.shape[1], slots, n_tokens)
        self._numbers[:, :n_tokens] = to_device(torch.from_numpy(numbers), embeds.device)
        sources = self._numbers[0, :n_tokens]
        torch.index_select(embeds.flatten(0, 1), 0, sources, out=prompts.embeds)
        torch.index_select(position_ids.flatten(), 0, sources, out=prompts.position_ids)


def pack(
    embeds: Tensor, position_ids: Tensor, slots: KVSlots, lens: Sequence[int]
) -> PackedPrompts:
    """Take the padding out of prompts (B, L, D) at (B, L), as `PromptBuffers.fill` does."""
    numbers = _numbers(lens, embeds.shape[1], slots, sum(lens))
    sources, _, *places = to_device(torch.from_numpy(numbers), embeds.device)
    packed = embeds.flatten(0, 1)[sources]
    return PackedPrompts(packed, position_ids.flatten()[sources], *places)


def _numbers(lens: Sequence[int], longest: int, slots: KVSlots, n_tokens: int) -> NDArray[np.int64]:
    """(5, T): where in (B * L) each token stands, zeros, then `slots`, `columns`, `begins`."""
    count = sum(lens)
    prompts = np.repeat(np.arange(len(lens)), lens)
    begins = np.arange(n_tokens)
    begins[:count] = np.repeat(np.cumsum(lens) - lens, lens)
    columns = np.arange(n_tokens) - begins
    numbers = np.zeros((5, n_tokens), np.int64)
    numbers[0, :count] = prompts * longest + columns[:count]
    numbers[2, :count], numbers[2, count:] = slots.next_slot + prompts, slots.plan.n_slots
    numbers[3], numbers[4] = columns, begins
    return numbers
