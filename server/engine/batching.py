"""Dynamic batching: a queue, the pure scheduler, and one thread that owns the device."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from server.engine.interface import (
    Backend,
    BackendBatch,
    BatchReport,
    EngineRequest,
    EngineResult,
    EngineStats,
)
from server.engine.scheduler import BatchLimits, DrainRate, Waiting, decide
from server.errors import (
    DeadlineExceededError,
    InferenceFailedError,
    NotReadyError,
    QueueFullError,
    ServerError,
    ShuttingDownError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    """A submitted request and where its answer goes."""

    request: EngineRequest
    arrived_s: float
    answer: asyncio.Future[EngineResult]

    def fail(self, error: ServerError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class BatchingEngine:
    """Implements `Engine`. The event loop never waits on the device."""

    def __init__(
        self,
        load: Callable[[], Backend],
        limits: BatchLimits,
        *,
        max_queue_size: int,
        on_batch: Callable[[BatchReport], None] = lambda _report: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; `start` loads.

        Args:
            load: makes the backend, in the device's thread.
            limits: of a batch.
            max_queue_size: most requests that hold a slot and are not in the running batch.
            on_batch: told of every batch, on the event loop.
            clock: monotonic seconds.
        """
        self._load = load
        self._limits = limits
        self._max_queue_size = max_queue_size
        self._on_batch = on_batch
        self._clock = clock
        self._device = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")
        self._backend: Backend | None = None
        self._scheduling: asyncio.Task[None] | None = None
        self._queue: dict[int, _Entry] = {}
        self._running: dict[int, _Entry] = {}
        self._ids = itertools.count()
        self._admitted = 0
        self._changed = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._draining = False
        self._drain_rate = DrainRate()

    @property
    def max_audio_s(self) -> float:
        """Longest clip, seconds."""
        if self._backend is None:
            raise NotReadyError("the model is still loading")
        return self._backend.max_audio_s

    async def start(self) -> None:
        """Load and warm up in the device's thread."""
        loop = asyncio.get_running_loop()
        backend = await loop.run_in_executor(self._device, self._load)
        await loop.run_in_executor(self._device, backend.warm_up)
        self._backend = backend
        self._scheduling = asyncio.create_task(self._schedule(backend))
        self._scheduling.add_done_callback(self._on_end)

    @contextlib.contextmanager
    def admit(self) -> Iterator[None]:
        """Hold a slot."""
        if self._draining:
            raise ShuttingDownError("the server is shutting down")
        waiting = self._admitted - len(self._running)
        if waiting >= self._max_queue_size:
            raise QueueFullError(
                f"{waiting} requests are waiting already",
                retry_after_s=self._drain_rate.retry_after_s(waiting),
            )
        self._admitted += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._admitted -= 1
            if not self._admitted:
                self._empty.set()

    async def submit(self, request: EngineRequest) -> EngineResult:
        """Queue a clip and wait for its transcript."""
        if not self.stats().alive:
            raise NotReadyError("the engine is not running")
        entry = _Entry(request, self._clock(), asyncio.get_running_loop().create_future())
        key = next(self._ids)
        self._queue[key] = entry
        self._changed.set()
        try:
            return await entry.answer
        finally:
            self._queue.pop(key, None)

    async def drain(self, timeout_s: float) -> None:
        """Finish what is admitted; after `timeout_s`, refuse the rest."""
        self._draining = True
        # Nothing is to come that a batch could wait for.
        self._limits = replace(self._limits, max_wait_s=0.0)
        self._changed.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        self._refuse_all(ShuttingDownError("the server shut down before this request's turn"))

    async def stop(self) -> None:
        """End at once, and wait for the device's thread."""
        self._draining = True
        if self._scheduling is not None:
            self._scheduling.cancel()
            await asyncio.wait([self._scheduling])
        self._refuse_all(ShuttingDownError("the server is shutting down"))
        await asyncio.to_thread(self._device.shutdown, cancel_futures=True)

    def stats(self) -> EngineStats:
        """Return what is where."""
        return EngineStats(
            alive=self._scheduling is not None and not self._scheduling.done(),
            admitted=self._admitted,
            queued=len(self._queue),
            running=len(self._running),
            drain_rate=self._drain_rate.requests_per_s,
        )

    def _on_end(self, scheduling: asyncio.Task[None]) -> None:
        if not scheduling.cancelled() and (error := scheduling.exception()) is not None:
            _log.critical("the engine has died", exc_info=error)
            self._refuse_all(InferenceFailedError("the engine has died"))

    def _refuse_all(self, error: ServerError) -> None:
        for entry in [*self._queue.values(), *self._running.values()]:
            entry.fail(error)
        self._queue.clear()

    async def _schedule(self, backend: Backend) -> None:
        while True:
            now_s = self._clock()
            decision = decide(self._waiting(), now_s, self._limits)
            for key in decision.expired:
                late = DeadlineExceededError("the request still waited at its deadline")
                self._queue.pop(key).fail(late)
            if decision.batch:
                await self._run(backend, {key: self._queue.pop(key) for key in decision.batch})
                continue
            self._changed.clear()
            pause_s = None if decision.wake_s is None else decision.wake_s - now_s
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._changed.wait()

    def _waiting(self) -> list[Waiting]:
        return [
            Waiting(
                id=key,
                arrived_s=entry.arrived_s,
                audio_s=entry.request.audio_s,
                deadline_s=entry.request.deadline_s,
                prompt=entry.request.prompt,
            )
            for key, entry in self._queue.items()
        ]

    async def _run(self, backend: Backend, entries: dict[int, _Entry]) -> None:
        """Run a batch; if it fails, run its clips one by one, so that only the guilty one fails."""
        self._running = entries
        batch = list(entries.values())
        if not await self._attempt(backend, batch, is_last=len(batch) == 1):
            for entry in batch:
                if not entry.answer.done():
                    await self._attempt(backend, [entry], is_last=True)
        # Not in a finally: if this task dies or is cancelled, these are still to be answered.
        self._running = {}

    async def _attempt(self, backend: Backend, batch: list[_Entry], *, is_last: bool) -> bool:
        """Run clips together and answer them; returns whether nothing is left to try."""
        started_s = self._clock()
        loop = asyncio.get_running_loop()
        try:
            output = await loop.run_in_executor(self._device, _transcribe, backend, batch)
        except Exception:  # noqa: BLE001 - a model may raise anything; logged below
            ids = " ".join(entry.request.id for entry in batch)
            _log.exception("the model failed on a batch of %d: %s", len(batch), ids)
            self._report(batch, self._clock() - started_s, failed=True)
            if is_last:
                for entry in batch:
                    entry.fail(InferenceFailedError("the model failed on this audio"))
            return is_last
        busy_s = self._clock() - started_s
        self._drain_rate.record(len(batch), busy_s)
        self._report(batch, busy_s, failed=False)
        _answer(batch, output, started_s)
        return True

    def _report(self, batch: Sequence[_Entry], busy_s: float, *, failed: bool) -> None:
        durations_s = [entry.request.audio_s for entry in batch]
        padded_s = len(batch) * max(durations_s)
        self._on_batch(BatchReport(len(batch), sum(durations_s), padded_s, busy_s, failed))


def _transcribe(backend: Backend, batch: Sequence[_Entry]) -> BackendBatch:
    output = backend.transcribe(
        [entry.request.waveform for entry in batch], batch[0].request.prompt
    )
    if len(output.transcripts) != len(batch):
        raise RuntimeError(f"{len(output.transcripts)} transcripts for {len(batch)} clips")
    return output


def _answer(batch: Sequence[_Entry], output: BackendBatch, started_s: float) -> None:
    for entry, transcript in zip(batch, output.transcripts, strict=True):
        if entry.answer.done():  # its client has left meanwhile
            continue
        entry.answer.set_result(
            EngineResult(
                text=transcript.text,
                language=transcript.language,
                finish_reason=transcript.finish_reason,
                tokens=transcript.tokens,
                queue_s=started_s - entry.arrived_s,
                encode_s=output.encode_s,
                generate_s=output.generate_s,
                batch_size=len(batch),
            )
        )
