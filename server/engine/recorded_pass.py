"""Decode steps in few fixed shapes, each recorded once: CUDA graphs.

A step of a small model is hundreds of short kernels, which a GPU runs faster than Python launches
them. A recording launches all at once, but its tensors are always the same ones: a step's inputs
are copied into them, and rows and attended length are rounded up to a bucket. The rows that this
adds are free slots, since used ones come first; what is written there, a prompt overwrites.

Axis legend: R rows, D width, V vocabulary.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

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


def record_cuda_graph(run: Run) -> Run:
    """Record what `run` launches; what is returned launches it again on the same tensors."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_RUNS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


class RecordedPass:
    """Runs another pass from recordings."""

    def __init__(
        self, inner: DecoderPass, record: Callable[[Run], Run] = record_cuda_graph
    ) -> None:
        """Begin without a recording.

        Args:
            inner: what is recorded.
            record: runs a function as often as it likes, and returns one that does the same.
        """
        self._inner = inner
        self._record = record
        self._steps: dict[tuple[int, int], _Step] = {}
        self._is_able = True

    def __call__(self, embeds: Tensor, position_ids: Tensor, slots: KVSlots) -> Tensor:
        """Map embeddings (R, 1, D) at `position_ids` (R, 1) to logits (R, V).

        The logits hold until the next call.
        """
        rows, live, columns = slots.decode_step()
        if rows.start != 0 or not self._is_able:  # a part of the rows: something went wrong
            return self._inner(embeds, position_ids, slots)
        shape = (
            bucket(rows.stop, 1, slots.plan.n_slots),
            bucket(live, _MIN_LIVE_TOKENS, slots.plan.slot_tokens),
        )
        if shape not in self._steps:
            self._steps[shape] = _Step(self._inner, slots, shape, embeds, self._record)
        try:
            return self._steps[shape].run(embeds, position_ids, columns)
        except RuntimeError:
            _log.exception("a decode step could not be recorded; steps run unrecorded from now on")
            self._is_able = False
            self._steps.clear()
        slots.begin_decode(rows)
        return self._inner(embeds, position_ids, slots)


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
        self._embeds = like.new_zeros(rows, *like.shape[1:])
        self._position_ids = torch.zeros(rows, 1, dtype=torch.int64, device=like.device)
        self._columns = torch.zeros(rows, dtype=torch.int64, device=like.device)
        self._record = record
        self._replay: Run | None = None

        def run() -> Tensor:
            slots.begin_padded(self._columns, live)
            return inner(self._embeds, self._position_ids, slots)

        self._run = run

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
