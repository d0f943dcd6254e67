"""What the LLM does on the device: prefills, and decode steps from ids to the likeliest tokens.

On a CUDA device both are recorded once for each of few shapes. The rows that rounding up to one
adds are free slots, since used ones come first; what is written there, a prompt overwrites.

Axis legend: R rows, B prompts, L their positions, S slots, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from server.engine.recordings import Recordings, bucket, buckets

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from server.engine.decoder_pass import DecoderPass
    from server.engine.kv_slots import KVSlots
    from server.engine.recordings import Run

_MIN_LIVE_TOKENS = 128
_MIN_PROMPT_TOKENS = 64
_MOST_PREFILL_TOKENS = 4096  # of a recording; with more, a GPU takes longer than Python


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Of some rows.

    Attributes:
        token_ids: to feed; of rows at the last position of their prompts, anything.
        columns: where in their slots the tokens stand.
        offsets: of their position ids from that.
        last_embeds: (D,) of rows at the last position of their prompts, by index.
    """

    token_ids: Sequence[int]
    columns: Sequence[int]
    offsets: Sequence[int]
    last_embeds: Mapping[int, Tensor]


def likeliest(logits: Tensor) -> Tensor:
    """The largest of the logits (R, V) and where it stands, (2, R) float64: one to transfer.

    A NaN is the largest of its row.
    """
    return torch.stack([each.double() for each in logits.max(-1)])


@dataclass(frozen=True, slots=True)
class _Computation:
    """What a step launches; a recording holds it, and none of what holds the recording."""

    embed: nn.Module
    decoder_pass: DecoderPass
    slots: KVSlots
    last_embeds: Tensor  # (S, D)

    def __call__(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Run the begun step of (3, R) token ids, columns and offsets.

        An id is -1 where `last_embeds` holds what is to be fed.
        """
        ids, columns, offsets = numbers
        last_embeds = self.last_embeds[: len(ids)]
        embeds = torch.where((ids < 0)[:, None], last_embeds, self.embed(ids.clamp(min=0)))
        logits = self.decoder_pass(embeds[:, None], (columns + offsets)[:, None], self.slots)
        return logits, likeliest(logits)


class DecodeStep:
    """Computes decode steps, each anew."""

    def __init__(self, embed: nn.Module, decoder_pass: DecoderPass, slots: KVSlots) -> None:
        """Allocate what steps are given.

        Args:
            embed: the LLM's input embeddings.
            decoder_pass: how steps go through the LLM.
            slots: of its keys and values.
        """
        weight = next(embed.parameters())
        self._slots, self._device = slots, weight.device
        self._last_embeds = weight.new_zeros(slots.plan.n_slots, weight.shape[1])
        self._compute = _Computation(embed, decoder_pass, slots, self._last_embeds)

    def __call__(self, rows: slice, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """Run the next step of some rows.

        Returns:
            Logits (R, V), which hold until the next call, and the `likeliest` of them, (2, R).
        """
        if inputs.last_embeds:
            fresh = torch.stack([*inputs.last_embeds.values()])
            self._last_embeds[[*inputs.last_embeds]] = fresh.to(self._last_embeds.dtype)
        ids = list(inputs.token_ids)
        for index in inputs.last_embeds:
            ids[index] = -1
        return self._run(rows, torch.tensor([ids, inputs.columns, inputs.offsets]))

    def prefill(self, embeds: Tensor, position_ids: Tensor) -> None:
        """Write the keys and values of prompts (B, L, D) at (B, L) to the slots that have begun."""
        self._compute.decoder_pass.prefill(embeds, position_ids, self._slots)

    def warm_up(self) -> None:
        """Prepare what can be; no slot is in use."""

    def _run(self, rows: slice, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Run a step, given (3, R) token ids, columns and offsets, on the host."""
        if self._device.type == "cuda":
            numbers = numbers.pin_memory()
        numbers = numbers.to(self._device, non_blocking=True)
        self._slots.begin_decode(rows, numbers[1])
        return self._compute(numbers)


class RecordedStep(DecodeStep):
    """Runs decode steps from recordings."""

    def __init__(
        self,
        embed: nn.Module,
        decoder_pass: DecoderPass,
        slots: KVSlots,
        record: Callable[[Run], Run],
    ) -> None:
        """Begin without a recording.

        Args:
            embed: the LLM's input embeddings.
            decoder_pass: what is recorded.
            slots: of its keys and values.
            record: runs a function as often as it likes, and returns one that does the same.
        """
        super().__init__(embed, decoder_pass, slots)
        n_slots, capacity = slots.plan.n_slots, slots.plan.slot_tokens
        self._numbers = torch.zeros(3, n_slots, dtype=torch.int64, device=self._device)
        self._host = torch.zeros_like(self._numbers, device="cpu")
        if self._device.type == "cuda":
            self._host = self._host.pin_memory()
        self._min_live = capacity if decoder_pass.reads_own_lengths else _MIN_LIVE_TOKENS
        self._prompts = _Prompts(self._last_embeds) if decoder_pass.is_prefill_recordable else None
        self._recordings = Recordings(record, "what the LLM does")

    def warm_up(self) -> None:
        """Record every shape before the first request, the largest first, whose memory all use."""
        plan = self._slots.plan
        for rows in buckets(1, plan.n_slots):
            for live in buckets(self._min_live, plan.slot_tokens):
                self._replay_step(rows, live)
        for length in buckets(_MIN_PROMPT_TOKENS, plan.slot_tokens):
            for rows in buckets(1, plan.n_slots):
                if self._prompts is not None and rows * length <= _MOST_PREFILL_TOKENS:
                    self._replay_prefill(self._prompts, rows, length)

    def prefill(self, embeds: Tensor, position_ids: Tensor) -> None:
        """Do as `DecodeStep` does, from a recording if the prompts are not too many."""
        plan, first = self._slots.plan, self._slots.next_slot
        count, length = position_ids.shape
        rows = bucket(count, 1, plan.n_slots)
        tokens = bucket(length, _MIN_PROMPT_TOKENS, plan.slot_tokens)
        fits = rows * tokens <= _MOST_PREFILL_TOKENS and first + rows <= plan.n_slots
        if self._prompts is not None and fits:
            self._prompts.fill(embeds, position_ids, rows, tokens, first)
            if self._replay_prefill(self._prompts, rows, tokens):
                return
            self._slots.begin_prefill(count, after=first - self._slots.used)
        super().prefill(embeds, position_ids)

    def _run(self, rows: slice, numbers: Tensor) -> tuple[Tensor, Tensor]:
        # Of a part of the rows, those that a bucket adds would be others that are in use.
        if rows != slice(0, self._slots.used) or not self._recordings.is_able:
            return super()._run(rows, numbers)
        plan, count = self._slots.plan, rows.stop
        padded = bucket(count, 1, plan.n_slots)
        # The step before has been waited for: nothing reads this any more.
        self._host[:, :count] = numbers
        self._host[:, count:padded] = 0
        self._numbers.copy_(self._host, non_blocking=True)
        live = bucket(max(self._slots.lens) + 1, self._min_live, plan.slot_tokens)
        outputs = self._replay_step(padded, live)
        if outputs is None:
            return super()._run(rows, numbers)
        logits, best = outputs
        return logits[:count], best[:, :count]

    def _replay_step(self, rows: int, live: int) -> tuple[Tensor, Tensor] | None:
        numbers, compute = self._numbers[:, :rows], self._compute

        def run() -> tuple[Tensor, Tensor]:  # holds nothing that holds the recording
            compute.slots.begin_padded(numbers[1], live)
            return compute(numbers)

        outputs: tuple[Tensor, Tensor] | None = self._recordings.replay(("step", rows, live), run)
        return outputs

    def _replay_prefill(self, prompts: _Prompts, rows: int, length: int) -> bool:
        compute = self._compute
        embeds, position_ids = prompts.parts(rows, length)

        def run() -> bool:
            compute.slots.begin_prefill_at(prompts.first_slot)
            compute.decoder_pass.prefill(embeds, position_ids, compute.slots)
            return True

        return bool(self._recordings.replay(("prefill", rows, length), run))


class _Prompts:
    """Where recorded prefills read their prompts."""

    def __init__(self, like: Tensor) -> None:
        """Allocate; `like` is (..., D), of the embeddings' dtype and device."""
        self._embeds = like.new_zeros(_MOST_PREFILL_TOKENS, like.shape[-1])
        self._position_ids = torch.zeros(
            _MOST_PREFILL_TOKENS, dtype=torch.int64, device=like.device
        )
        self.first_slot = torch.zeros(1, dtype=torch.int64, device=like.device)

    def parts(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """(rows, length, D) and (rows, length)."""
        count = rows * length
        return (
            self._embeds[:count].view(rows, length, -1),
            self._position_ids[:count].view(rows, length),
        )

    def fill(
        self, embeds: Tensor, position_ids: Tensor, rows: int, length: int, first_slot: int
    ) -> None:
        """Copy prompts to the beginning of the parts of a shape; the rest may hold anything."""
        count, used = position_ids.shape
        all_embeds, all_position_ids = self.parts(rows, length)
        all_embeds[:count, :used] = embeds
        all_position_ids[:count, :used] = position_ids
        self.first_slot.fill_(first_slot)
