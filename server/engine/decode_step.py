"""What the LLM does on the device: prefills, and decode steps from ids to the likeliest tokens.

A step may be launched before the tokens of the one before it are known to the host: it takes them
where that one left them.

On a CUDA device both are recorded once for each of few shapes. The rows that rounding up to one
adds are free slots, since used ones come first; what is written there, a prompt overwrites.

Axis legend: R rows, B prompts, L the longest of them, S slots, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from model.log_mel import to_device
from server.engine.decoder_pass import PackingPass
from server.engine.packed_prompts import PromptBuffers
from server.engine.recordings import Recordings, bucket, buckets

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from server.engine.decoder_pass import DecoderPass
    from server.engine.kv_slots import KVSlots
    from server.engine.recordings import Run

_MIN_LIVE_TOKENS = 128
_MIN_PROMPT_TOKENS = 64
_MOST_PREFILL_TOKENS = 4096  # of a recording; with more, a GPU takes longer than Python


HELD = -1
"""Instead of a token id: the embedding that is held for the row."""

NO_SOURCE = -1


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Of some rows, (R,) each.

    Attributes:
        token_ids: to feed, or `HELD`.
        columns: where in their slots the tokens stand.
        offsets: of their position ids from that.
        sources: rows of the step launched before, counted from its first, whose tokens are fed
            instead; `NO_SOURCE` for those with an id.
    """

    token_ids: NDArray[np.int64]
    columns: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sources: NDArray[np.int64]


class Launched:
    """A step on its way."""

    def __init__(self, logits: Tensor, best: Tensor, landed: torch.cuda.Event | None) -> None:
        """Of a step that is launched.

        Args:
            logits: (R, V), which hold until the next step is launched.
            best: (2, R) on the host, where the `likeliest` of them land.
            landed: when they have; None for already.
        """
        self.logits = logits
        self._lands, self._landed = best, landed
        self._best: NDArray[np.float64] | None = None

    def best(self) -> NDArray[np.float64]:
        """Wait for the `likeliest` of the logits, (2, R).

        First asked for before the step after the next is launched, which lands in the same place.
        """
        if self._best is None:
            if self._landed is not None:
                self._landed.synchronize()
            self._best = self._lands.numpy().copy()
        return self._best


@dataclass(frozen=True, slots=True)
class _Computation:
    """What a step launches; a recording holds it, and none of what holds the recording."""

    embed: nn.Module
    decoder_pass: DecoderPass
    slots: KVSlots
    held: Tensor  # (S, D)
    said: Tensor  # (S,) token ids of the step before; only read, since recording runs this again

    def __call__(self, first: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Run the begun step of (4, R) token ids, columns, offsets and sources from row `first`."""
        ids, columns, offsets, sources = numbers
        ids = torch.where(sources < 0, ids, self.said[sources.clamp(min=0)])
        held = self.held[first : first + len(ids)]
        embeds = torch.where((ids < 0)[:, None], held, self.embed(ids.clamp(min=0)))
        logits = self.decoder_pass(embeds[:, None], (columns + offsets)[:, None], self.slots)
        return logits, self.decoder_pass.likeliest(logits)


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
        n_slots = slots.plan.n_slots
        self._slots, self._device = slots, weight.device
        self._held = weight.new_zeros(n_slots, weight.shape[1])
        self._said = torch.zeros(n_slots, dtype=torch.int64, device=self._device)
        self._compute = _Computation(embed, decoder_pass, slots, self._held, self._said)
        self._numbers = torch.zeros(4, n_slots, dtype=torch.int64, device=self._device)
        # Two of what goes up and what comes down: while one step runs, the next is launched.
        self._stages = [self._stage(n_slots) for _ in range(2)]

    def hold(self, rows: Sequence[int] | slice, embeds: Tensor) -> None:
        """Keep embeddings (R, D) for rows until they are fed; they move as their rows do."""
        self._held[rows] = embeds.to(self._held.dtype)

    def move(self, rows: Sequence[int], sources: Sequence[int]) -> None:
        """Keep for each of `rows` what is held for `sources[i]`."""
        if len(rows) == 1:
            self._held[rows[0]] = self._held[sources[0]]  # which transfers no indices
            return
        places = to_device(torch.tensor([rows, sources]), self._device)
        self._held[places[0]] = self._held[places[1]]

    def __call__(self, rows: slice, inputs: StepInputs) -> Launched:
        """Launch the next step of some rows; what the one before the last says must have landed."""
        stage = self._stages[0]
        count = rows.stop - rows.start
        stage.numbers[:, :count] = torch.from_numpy(
            np.stack([inputs.token_ids, inputs.columns, inputs.offsets, inputs.sources])
        )
        logits, best = self._run(rows, stage.numbers)
        self._said[: best.shape[1]] = best[1]
        # Both sides without gaps, or the host would wait for a copy in between.
        lands = stage.best[: best.numel()].view_as(best)
        lands.copy_(best, non_blocking=True)
        if stage.landed is not None:
            stage.landed.record()
        self._stages.reverse()
        return Launched(logits, lands[:, :count], stage.landed)

    def prefill(self, embeds: Tensor, position_ids: Tensor, lens: Sequence[int]) -> None:
        """Write keys and values of prompts (B, L, D), (B,) long, to the slots that have begun."""
        self._compute.decoder_pass.prefill(embeds, position_ids, self._slots, lens)

    def warm_up(self) -> None:
        """Prepare what can be; no slot is in use."""

    def _run(self, rows: slice, host: Tensor) -> tuple[Tensor, Tensor]:
        """Run a step, given what (4, S) `host` begins with.

        Returns:
            Its logits (R, V), and the `likeliest` of them, (2, R) or of padding rows besides.
        """
        self._numbers.copy_(host, non_blocking=True)
        numbers = self._numbers[:, : rows.stop - rows.start]
        self._slots.begin_decode(rows, numbers[1])
        return self._compute(rows.start, numbers)

    def _stage(self, n_slots: int) -> _Stage:
        numbers = torch.zeros(4, n_slots, dtype=torch.int64)
        best = torch.zeros(2 * n_slots, dtype=torch.float64)
        if self._device.type != "cuda":
            return _Stage(numbers, best, None)
        return _Stage(numbers.pin_memory(), best.pin_memory(), torch.cuda.Event())


@dataclass(frozen=True, slots=True)
class _Stage:
    """A step's numbers on the host: (4, S) going up, (2 * S,) coming down, and when they landed."""

    numbers: Tensor
    best: Tensor
    landed: torch.cuda.Event | None


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
        capacity = slots.plan.slot_tokens
        self._min_live = capacity if decoder_pass.reads_own_lengths else _MIN_LIVE_TOKENS
        self._packing_pass = decoder_pass if isinstance(decoder_pass, PackingPass) else None
        self._prompts = PromptBuffers(_MOST_PREFILL_TOKENS, self._held)
        self._recordings = Recordings(record, "what the LLM does")

    def warm_up(self) -> None:
        """Record every shape before the first request, the largest first, whose memory all use."""
        plan = self._slots.plan
        for rows in buckets(1, plan.n_slots):
            for live in buckets(self._min_live, plan.slot_tokens):
                self._replay_step(rows, live)
        if self._packing_pass is not None:
            for n_tokens in buckets(_MIN_PROMPT_TOKENS, _MOST_PREFILL_TOKENS):
                self._replay_prefill(self._packing_pass, n_tokens)

    def prefill(self, embeds: Tensor, position_ids: Tensor, lens: Sequence[int]) -> None:
        """Do as `DecodeStep` does, from a recording if the prompts are not too long."""
        count = sum(lens)
        if self._packing_pass is not None and count <= _MOST_PREFILL_TOKENS:
            n_tokens = bucket(count, _MIN_PROMPT_TOKENS, _MOST_PREFILL_TOKENS)
            self._prompts.fill(n_tokens, embeds, position_ids, self._slots, lens)
            if self._replay_prefill(self._packing_pass, n_tokens):
                return
        super().prefill(embeds, position_ids, lens)

    def _run(self, rows: slice, host: Tensor) -> tuple[Tensor, Tensor]:
        # Of a part of the rows, those that a bucket adds would be others that are in use.
        if rows != slice(0, self._slots.used) or not self._recordings.is_able:
            return super()._run(rows, host)
        plan, count = self._slots.plan, rows.stop
        padded = bucket(count, 1, plan.n_slots)
        host[:, count:padded] = 0
        self._numbers.copy_(host, non_blocking=True)
        live = bucket(int(self._slots.lens.max()) + 1, self._min_live, plan.slot_tokens)
        outputs = self._replay_step(padded, live)
        if outputs is None:
            return super()._run(rows, host)
        logits, best = outputs
        return logits[:count], best

    def _replay_step(self, rows: int, live: int) -> tuple[Tensor, Tensor] | None:
        numbers, compute = self._numbers[:, :rows], self._compute

        def run() -> tuple[Tensor, Tensor]:  # holds nothing that holds the recording
            compute.slots.begin_padded(numbers[1], live)
            return compute(0, numbers)

        outputs: tuple[Tensor, Tensor] | None = self._recordings.replay(("step", rows, live), run)
        return outputs

    def _replay_prefill(self, packing_pass: PackingPass, n_tokens: int) -> bool:
        prompts, slots = self._prompts.first(n_tokens), self._slots

        def run() -> bool:
            packing_pass.prefill_packed(prompts, slots)
            return True

        return bool(self._recordings.replay(("prefill", n_tokens), run))
