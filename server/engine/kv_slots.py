"""Keys and values of the running sequences, in slots that are allocated once.

A slot is a row of every layer's buffer. Used rows are the first ones, without a gap: a sequence
joins behind the last, and when some leave, the last ones take their rows. So a decode step reads a
plain slice, up to the longest live length, and writes each new key in place; nothing is gathered.

transformers' models see it as their `Cache`, whatever their architecture. What differs between
rows, their lengths, reaches them as position ids and as masks.

Axis legend: S slots, R rows of a step, H key heads, C slot capacity in tokens, W width of a head.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from model.log_mel import to_device
from server.engine.interface import refill

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

_LIVE_BUCKET_TOKENS = 32  # attended lengths are multiples, so that few shapes occur
_MOVED_TOGETHER = 8  # rows, which are copied aside for it
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What a token takes in one layer: key heads, and the widths of a key and of a value."""

    n_heads: int
    key_width: int
    value_width: int


@dataclass(frozen=True, slots=True)
class SlotPlan:
    """How the memory for keys and values is laid out.

    Attributes:
        n_slots: sequences that can run together.
        slot_tokens: longest sequence, prompt and answer.
        layers: of the LLM.
        dtype: of keys and values.
    """

    n_slots: int
    slot_tokens: int
    layers: tuple[LayerShape, ...]
    dtype: torch.dtype

    @property
    def slot_bytes(self) -> int:
        """Memory of one slot."""
        widths = (each.n_heads * (each.key_width + each.value_width) for each in self.layers)
        return self.slot_tokens * self.dtype.itemsize * sum(widths)

    @property
    def total_bytes(self) -> int:
        """Memory of all slots."""
        return self.n_slots * self.slot_bytes


@torch.inference_mode()
def layer_shapes(llm: PreTrainedModel) -> tuple[LayerShape, ...]:
    """Ask the LLM itself what it caches, by one token.

    Raises:
        ValueError: it keeps something else than keys and values of every token.
    """
    embeddings = llm.get_input_embeddings().weight
    token = embeddings.new_zeros(1, 1, embeddings.shape[1])
    cache = llm(inputs_embeds=token, use_cache=True).past_key_values
    layers = getattr(cache, "layers", [])
    for layer in layers:
        if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
            raise ValueError(
                f"the engine cannot serve {llm.config.model_type} models: they cache "
                f"{type(layer).__name__}, not keys and values of every token"
            )
    if not layers:
        raise ValueError(f"the engine cannot serve {llm.config.model_type} models: they cache none")
    return tuple(
        LayerShape(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])
        for layer in layers
    )


def plan_slots(
    layers: tuple[LayerShape, ...],
    dtype: torch.dtype,
    *,
    slot_tokens: int,
    max_slots: int,
    budget_bytes: int,
) -> SlotPlan:
    """Fit as many slots as are wanted into a budget.

    Args:
        layers: of the LLM.
        dtype: of keys and values.
        slot_tokens: longest sequence.
        max_slots: most that are of use.
        budget_bytes: memory for all of them.

    Raises:
        ValueError: not one slot fits; the message says what it takes.
    """
    one = SlotPlan(1, slot_tokens, layers, dtype)
    n_slots = min(max_slots, budget_bytes // one.slot_bytes)
    if n_slots < 1:
        raise ValueError(
            f"a sequence of {slot_tokens} tokens takes {one.slot_bytes / 2**20:.1f} MiB of keys "
            f"and values, and the budget is {budget_bytes / 2**20:.1f} MiB (--kv-cache-mib)"
        )
    return SlotPlan(n_slots, slot_tokens, layers, dtype)


class KVSlots(Cache):
    """The slots, as transformers' cache. One forward pass at a time, announced beforehand.

    `begin_prefill` or `begin_decode` names the rows of the pass that follows; `join` and `advance`
    count what it wrote, once it has succeeded. A pass that fails changes nothing that is counted.
    """

    def __init__(self, plan: SlotPlan, device: torch.device | str) -> None:
        """Allocate."""
        self.plan = plan
        self._access = _Access()
        self._buffers, parts = _allocate(plan, torch.device(device))
        layers = [_SlotLayer(keys, values, self._access) for keys, values in parts]
        super().__init__(layers=layers)
        self._device = device
        self._columns = torch.arange(plan.slot_tokens, device=device)
        self._lens = np.zeros(plan.n_slots, np.int64)
        self._used = 0

    @property
    def lens(self) -> NDArray[np.int64]:
        """Tokens in each used row; changes with the slots."""
        return self._lens[: self._used]

    @property
    def used(self) -> int:
        """Rows in use, from the first on."""
        return self._used

    @property
    def free(self) -> int:
        """Slots that nobody uses."""
        return self.plan.n_slots - self._used

    def begin_prefill(self, n_rows: int, *, after: int = 0) -> None:
        """Let the next pass write `n_rows` prompts, right-padded, behind the used rows.

        Args:
            n_rows: of the pass.
            after: rows behind the used ones that were written and have not joined yet.

        Raises:
            ValueError: not so many slots are free.
        """
        if after + n_rows > self.free:
            raise ValueError(f"{after + n_rows} slots are wanted, {self.free} are free")
        first = self._used + after
        self._access.begin(slice(first, first + n_rows))

    @property
    def next_slot(self) -> int:
        """The first of the begun prefill's."""
        start: int = self._access.rows.start
        return start

    def join(self, lens: Sequence[int]) -> None:
        """Count the rows just written as used, with so many tokens each."""
        self._lens[self._used : self._used + len(lens)] = lens
        self._used += len(lens)

    def begin_decode(self, rows: slice, columns: Tensor) -> None:
        """Let the next pass write one token to each of `rows`.

        Args:
            rows: of the pass.
            columns: (R,) `lens[rows]`, on the device: where in its row each is written.
        """
        longest = int(self.lens[rows].max()) + 1
        bucket = math.ceil(longest / _LIVE_BUCKET_TOKENS) * _LIVE_BUCKET_TOKENS
        self._access.begin(rows, columns, min(bucket, self.plan.slot_tokens))

    def decode_step(self) -> tuple[slice, int, Tensor]:
        """The begun decode step: its rows, the length that it attends to, its columns (R,)."""
        if self._access.positions is None:
            raise ValueError("no decode step has begun")
        return self._access.rows, self._access.live, self._access.positions

    def begin_padded(self, columns: Tensor, live: int) -> None:
        """Let the next pass write one token to each of the first rows, used or free.

        Args:
            columns: (R,) where in its row each is written; read when the pass runs.
            live: length that is attended to.
        """
        self._access.begin(slice(0, len(columns)), columns, live)

    def decode_mask(self, window: int | None = None) -> Tensor:
        """Which tokens each row of the begun decode step attends to.

        Args:
            window: most tokens back, the row's own included; None for all.

        Returns:
            (R, 1, 1, live) bool.
        """
        positions = self._access.positions
        if positions is None:
            raise ValueError("no decode step has begun")
        columns = self._columns[: self._access.live]
        mask = columns <= positions[:, None]
        if window is not None:
            mask &= columns > positions[:, None] - window
        return mask[:, None, None]

    def advance(self, rows: slice) -> None:
        """Count the token just written to each of `rows`."""
        self.lens[rows] += 1

    def rewind(self, row: int, length: int) -> None:
        """Forget what a row holds past `length` tokens."""
        self._lens[row] = min(int(self._lens[row]), length)

    def branch(self, rows: Sequence[int], parents: Sequence[int], shared_len: int) -> None:
        """Let each of `rows` hold what `parents[i]` holds; free rows, in order, come into use.

        Args:
            rows: that are written; none twice.
            parents: used rows, all equally long.
            shared_len: tokens that used rows among `rows` have in common with their parents.
        """
        length = int(self._lens[parents[0]])
        fresh = [row for row in rows if row >= self._used]
        pairs = [pair for pair in zip(rows, parents, strict=True) if pair[0] != pair[1]]
        # What is new first: its parents are still as they were.
        for is_new, start in ((True, 0), (False, shared_len)):
            targets = [row for row, _ in pairs if (row in fresh) is is_new]
            sources = [parent for row, parent in pairs if (row in fresh) is is_new]
            if targets and start < length:
                for buffer in self._buffers:
                    # Indexing by lists copies before it writes: a source may be a target as well.
                    buffer[:, targets, :, start:length] = buffer[:, sources, :, start:length]
        self.join([length] * len(fresh))

    def release(self, rows: Sequence[int], *, wipe: Collection[int] = ()) -> list[tuple[int, int]]:
        """Free rows; others take their places.

        Args:
            rows: which are free now.
            wipe: those of them that may hold NaN, which would reach a later sequence even through
                a mask.

        Returns:
            Rows that others have taken, and these, as `refill` says.
        """
        moves = refill(self._used, rows)
        for first in range(0, len(moves), _MOVED_TOGETHER):
            self._move(moves[first : first + _MOVED_TOGETHER])
        for target, source in moves:
            self._lens[target] = self._lens[source]
        taken = {target for target, _ in moves}
        for row in wipe:
            # What took its place may be too short to overwrite all of it.
            kept = int(self._lens[row]) if row in taken else 0
            for buffer in self._buffers:
                buffer[:, row, :, kept:] = 0
        self._used -= len(rows)
        return moves

    def _move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy rows to others, none of which is one of them."""
        length = max(int(self._lens[source]) for _, source in moves)
        if len(moves) == 1:
            ((target, source),) = moves
            for buffer in self._buffers:
                buffer[:, target, :, :length] = buffer[:, source, :, :length]
            return
        targets, sources = to_device(torch.tensor(moves), self._device).t()
        for buffer in self._buffers:
            live = buffer[:, :, :, :length]
            live.index_copy_(1, targets, live.index_select(1, sources))


class _Access:
    """Which rows the running pass reads and writes; shared by all layers."""

    def __init__(self) -> None:
        self.rows = slice(0, 0)
        self.indices: Tensor | None = None
        self.positions: Tensor | None = None
        self.live = 0

    def begin(self, rows: slice, positions: Tensor | None = None, live: int = 0) -> None:
        self.rows, self.positions, self.live = rows, positions, live
        if positions is not None:
            self.indices = torch.arange(rows.start, rows.stop, device=positions.device)


class _SlotLayer(CacheLayerMixin):
    """One layer's keys and values, (S, H, C, W) each."""

    is_sliding = False  # a sliding window is masked, not forgotten

    def __init__(self, keys: Tensor, values: Tensor, access: _Access) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self._access = access

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the buffers are there."""

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *_args: Any,  # noqa: ANN401 - transformers' signature
        **_kwargs: Any,  # noqa: ANN401 - transformers' signature
    ) -> tuple[Tensor, Tensor]:
        """Write (R, H, L, W) states; return those to attend to."""
        access = self._access
        if access.positions is None:  # prefill: the prompts attend to nothing but themselves
            length = key_states.shape[2]
            self.keys[access.rows, :, :length] = key_states
            self.values[access.rows, :, :length] = value_states
            return key_states, value_states
        self.keys[access.indices, :, access.positions] = key_states[:, :, 0]
        self.values[access.indices, :, access.positions] = value_states[:, :, 0]
        return self.keys[access.rows, :, : access.live], self.values[access.rows, :, : access.live]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a prefill attends to, and the position of the first."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Tokens before a prefill."""
        return 0

    def get_max_length(self) -> int:
        """Tokens that fit into a row."""
        return int(self.keys.shape[2])


def _allocate(
    plan: SlotPlan, device: torch.device
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Make room for keys and values: all buffers, and each layer's two parts (S, H, C, W) of them.

    What is equally large in several layers is one buffer (N, S, H, C, W), so that a row of all of
    them moves at once.
    """
    sizes = [
        (shape.n_heads, width)
        for shape in plan.layers
        for width in (shape.key_width, shape.value_width)
    ]
    buffers = {
        (n_heads, width): _zeros(
            (count, plan.n_slots, n_heads, plan.slot_tokens, width), plan.dtype, device
        )
        for (n_heads, width), count in Counter(sizes).items()
    }
    rest = {size: iter(buffer) for size, buffer in buffers.items()}
    parts = [next(rest[size]) for size in sizes]
    return [*buffers.values()], list(zip(parts[::2], parts[1::2], strict=True))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeroes, since a masked NaN is still a NaN; on a CPU, memory that is used when touched."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)


class DecodeMasks:
    """Builds the attention masks of decode steps in the form that an LLM takes."""

    def __init__(self, config: PreTrainedConfig, *, additive: bool = False) -> None:
        """Look at the LLM's layers.

        Args:
            config: of the LLM.
            additive: whether the masks are to be added to scores, whatever the LLM takes.

        Raises:
            ValueError: they attend in a way that slots cannot offer; the message names it.
        """
        self._window: int | None = getattr(config, "sliding_window", None)
        default = _FULL if self._window is None else _SLIDING
        self._kinds = set(getattr(config, "layer_types", None) or [default])
        unknown = sorted(self._kinds - {_FULL, _SLIDING})
        if unknown:
            raise ValueError(
                f"the engine cannot serve {config.model_type} models with layers of "
                f"{', '.join(unknown)}"
            )
        implementation = config._attn_implementation
        if implementation not in {"sdpa", "eager"}:
            raise ValueError(
                f"the engine takes the attention implementations sdpa and eager, not "
                f"{implementation!r}"
            )
        self._is_additive = additive or implementation == "eager"

    @property
    def kinds(self) -> frozenset[str]:
        """What the LLM's layers attend to: everything, a sliding window, or both."""
        return frozenset(self._kinds)

    @property
    def window(self) -> int | None:
        """Tokens that layers which are all of one kind attend to at most; None for all."""
        return self._window if self._kinds == {_SLIDING} else None

    def build(self, slots: KVSlots, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """Masks for the begun decode step: one, or one for each kind of layer."""
        masks = {kind: self._mask(slots, kind, dtype) for kind in self._kinds}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def build_one(self, slots: KVSlots, dtype: torch.dtype) -> Tensor:
        """The mask for the begun decode step of an LLM whose layers are all of one kind."""
        (kind,) = self._kinds
        return self._mask(slots, kind, dtype)

    def _mask(self, slots: KVSlots, kind: str, dtype: torch.dtype) -> Tensor:
        mask = slots.decode_mask(self._window if kind == _SLIDING else None)
        if not self._is_additive:
            return mask
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(
            ~mask, torch.finfo(dtype).min
        )
