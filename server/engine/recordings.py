"""Recordings of what a function launches on the device: CUDA graphs, one for each of few shapes.

A small model is hundreds of short kernels, which a GPU runs faster than Python launches them. A
recording launches all at once, but its tensors are always the same ones: inputs are copied into
them, and sizes are rounded up to a bucket.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[[], Any]

_log = logging.getLogger(__name__)

_WARM_UP_RUNS = 2  # libraries allocate on the first


def bucket(count: int, smallest: int, largest: int) -> int:
    """Round up to `smallest` times a power of two, or to half more; at most `largest`."""
    size = smallest
    while size < count:
        half_more = size + size // 2
        size = half_more if count <= half_more else 2 * size
    return min(size, largest)


def buckets(smallest: int, largest: int) -> list[int]:
    """All that `bucket` rounds to, the largest first."""
    sizes = {largest}
    while smallest < largest:
        sizes |= {smallest, min(smallest + smallest // 2, largest)}
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
        graph = torch.cuda.CUDAGraph()
        try:
            # Around the recording, too: one that fails would leave its stream the current one.
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP_RUNS):
                    run()
                stream.synchronize()
                with torch.cuda.graph(graph, pool=self._pool, stream=stream):
                    output = run()
        except RuntimeError:
            # The allocator takes the pool for one that is still recorded to.
            self._stream = self._pool = None
            raise
        torch.cuda.current_stream().wait_stream(stream)

        def replay() -> Any:  # noqa: ANN401 - what `run` gives
            graph.replay()
            return output

        return replay


class Recordings:
    """What was recorded, by shape."""

    def __init__(self, record: Callable[[Run], Run], what: str) -> None:
        """Begin without any.

        Args:
            record: runs a function as often as it likes, and returns one that does the same.
            what: is recorded, for the log.
        """
        self._record = record
        self._what = what
        self._recordings: dict[tuple[object, ...], Run] = {}
        self._is_able = True

    @property
    def is_able(self) -> bool:
        """Whether no recording has failed."""
        return self._is_able

    def replay(self, shape: tuple[object, ...], run: Run) -> Any:  # noqa: ANN401 - what `run` gives
        """Run a shape from its recording, which is made if need be; None if it cannot be."""
        if not self._is_able:
            return None
        try:
            if shape not in self._recordings:
                self._recordings[shape] = self._record(run)
            return self._recordings[shape]()
        except RuntimeError:
            _log.exception("%s could not be recorded, and runs unrecorded from now on", self._what)
            self._is_able = False
            self._recordings.clear()
            return None
