"""Decode steps in few fixed shapes, each recorded once: CUDA graphs.

A step of a small model is hundreds of short kernels, which a GPU runs faster than Python launches
them. A recording launches all at once, but its tensors are always the same ones: a step's inputs
are copied into them, and rows and attended length are rounded up to a bucket. The rows that this
adds are free slots, since used ones come first; what is written there, a prompt overwrites.

Axis legend: R rows, D width, V vocabulary.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from server.engine.decoder_pass import DecoderPass
    from server.engine.kv_slots import KVSlots

    Run = Callable[[], Tensor]

_log = logging.getLogger(__name__)

_MIN_LIVE_TOKENS = 128
_WARM_UP_RUNS = 2  # libraries allocate on the first


def bucket(count: int, smallest: int, largest: int) -> int:
    """Round up to `smallest` times a power of two, at most `largest`."""
    size = smallest
    while size < count:
        size *= 2
    return min(size, largest)


def buckets(smallest: int, largest: int) -> list[int]:
    """All that `bucket` rounds to, the largest first."""
    sizes = {largest}
    while smallest < largest:
        sizes.add(smallest)
        smallest *= 2
    return sorted(sizes, reverse=True)


class CudaGraphs:
    """Records what a function launches, on the thread's current device.

    All recordings share a stream, and the memory in between: the output of one holds until the
    next one is launched.
    """

    def __init__(self) -> None:
        """Touch no device yet."""
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def __call__(self, run: Run) -> Run:
        """Record `run`; what is returned launches it again on the same tensors."""
        if self._stream is None:
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        # Around the recording, too: one that fails would leave its stream the current one.
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_RUNS):
                run()
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=stream):
                output = run()
        torch.cuda.current_stream().wait_stream(stream)

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


class RecordedPass:
    """Runs another pass from recordings."""

    def __init__(self, inner: DecoderPass, record: Callable[[Run], Run] | None = None) -> None:
        """Begin without a recording.

        Args:
            inner: what is recorded.
            record: runs a function as often as it likes, and returns one that does the same; None
                records CUDA graphs.
        """
        self._inner = inner
        self._record = record or CudaGraphs()
        self._steps: dict[tuple[int, int], _Step] = {}
        self._is_able = True

    def __call__(self, embeds: Tensor, position_ids: Tensor, slots: KVSlots) -> Tensor:
        """Map embeddings (R, 1, D) at `position_ids` (R, 1) to logits (R, V).

        The logits hold until the next call.
        """
        rows, live, columns = slots.decode_step()
        # Of a part of the rows, those that a bucket adds would be others that are in use.
        if rows != slice(0, slots.used) or not self._is_able:
            return self._inner(embeds, position_ids, slots)
        shape = (
            bucket(rows.stop, 1, slots.plan.n_slots),
            bucket(live, _MIN_LIVE_TOKENS, slots.plan.slot_tokens),
        )
        logits = self._run(shape, embeds, position_ids, columns, slots)
        if logits is not None:
            return logits
        slots.begin_decode(rows, columns)
        return self._inner(embeds, position_ids, slots)

    def record_all(self, like: Tensor, slots: KVSlots) -> None:
        """Record every shape before the first request, the largest first, whose memory all use.

        Args:
            like: (1, 1, D), an embedding.
            slots: of which none is in use.
        """
        for rows in buckets(1, slots.plan.n_slots):
            columns = torch.zeros(rows, dtype=torch.int64, device=like.device)
            embeds = like.new_zeros(rows, *like.shape[1:])
            for live in buckets(_MIN_LIVE_TOKENS, slots.plan.slot_tokens):
                if self._is_able:
                    self._run((rows, live), embeds, columns[:, None], columns, slots)

    def _run(
        self,
        shape: tuple[int, int],
        embeds: Tensor,
        position_ids: Tensor,
        columns: Tensor,
        slots: KVSlots,
    ) -> Tensor | None:
        """Run a step from its shape's recording, which is made if need be; None if it cannot be."""
        try:
            if shape not in self._steps:
                self._steps[shape] = _Step(self._inner, slots, shape, embeds, self._record)
            return self._steps[shape].run(embeds, position_ids, columns)
        except RuntimeError:
            _log.exception("a decode step could not be recorded; steps run unrecorded from now on")
            self._is_able = False
            self._steps.clear()
            return None


class _Step:
    """One shape's tensors and its recording."""

    def __init__(
        self,
        inner: DecoderPass,
        slots: KVSlots,
        shape: tuple[int, int],
        like: Tensor,
        record: Callable[[Run], Run],
    ) -> None:
        rows, live = shape
        embeds = like.new_zeros(rows, *like.shape[1:])
        position_ids = torch.zeros(rows, 1, dtype=torch.int64, device=like.device)
        columns = torch.zeros(rows, dtype=torch.int64, device=like.device)

        def run() -> Tensor:  # knows nothing of the step, whose memory it would keep alive
            slots.begin_padded(columns, live)
            return inner(embeds, position_ids, slots)

        self._embeds, self._position_ids, self._columns = embeds, position_ids, columns
        self._run, self._record = run, record
        self._replay: Run | None = None

    def run(self, embeds: Tensor, position_ids: Tensor, columns: Tensor) -> Tensor:
        n_rows = len(embeds)
        self._embeds[:n_rows] = embeds
        self._position_ids[:n_rows] = position_ids
        self._columns[:n_rows] = columns
        self._columns[n_rows:] = 0
        if self._replay is None:
            # Only now: recording runs the step, which writes what this one is to write.
            self._replay = self._record(self._run)
        return self._replay()[:n_rows]
