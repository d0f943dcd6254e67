"""The engine: an asynchronous front, and one thread that owns the device and iterates."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from server.engine.core import EngineCore, Outcome
from server.engine.intake import Gate, Pending
from server.engine.interface import ALL_GUARDS, EngineResult, EngineStats
from server.errors import (
    DeadlineExceededError,
    InferenceFailedError,
    NotReadyError,
    ServerError,
    ShuttingDownError,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    import numpy as np
    from numpy.typing import NDArray

    from server.engine.admission import Admission, Ticket
    from server.engine.interface import (
        Capabilities,
        EngineRequest,
        Guards,
        IterationReport,
        Runner,
    )
    from server.engine.scheduler import ScheduleLimits

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

Answer = EngineResult | ServerError

_MAX_RESTARTS = 1
_DEADLINE_GRACE_S = 5.0  # for the iteration under way; longer, and the device hangs
_STOP_TIMEOUT_S = 20.0  # likewise; what the process leaves behind ends with it


class ContinuousEngine:
    """Implements `Engine`. The event loop never waits on the device."""

    def __init__(
        self,
        load: Callable[[], Runner],
        limits: ScheduleLimits,
        admission: Admission,
        *,
        guards: Guards = ALL_GUARDS,
        on_iteration: Callable[[IterationReport], None] = lambda _report: None,
    ) -> None:
        """Prepare; `start` loads.

        Args:
            load: makes the runner, in the device's thread; again after the engine has died.
            limits: of an iteration.
            admission: bounds what holds a ticket and does not run yet.
            guards: against what LLM decoders are prone to.
            on_iteration: told of each iteration, in the device's thread.
        """
        self._load = load
        self._limits = limits
        self._guards = guards
        self._on_iteration = on_iteration
        self._admission = admission
        self._waiting: dict[int, _Submitted] = {}
        self._keys = itertools.count()
        self._thread: _DeviceThread | None = None
        self._core: EngineCore | None = None
        self._shared: list[NDArray[np.float32]] = []
        self._left: deque[NDArray[np.float32]] = deque()
        self._restarts = 0
        self._restarting: asyncio.Task[None] | None = None
        self._death: asyncio.Future[Exception] | None = None
        self._gate = Gate(admission)

    @property
    def capabilities(self) -> Capabilities:
        """What the checkpoint can be asked for."""
        if self._core is None:
            raise NotReadyError("the model is not loaded")
        return self._core.runner.capabilities

    async def start(self) -> None:
        """Load and warm up in the device's thread."""
        self._death = asyncio.get_running_loop().create_future()
        await self._launch()

    async def _launch(self) -> None:
        self._thread = _DeviceThread(self._make_core, self._deliver, self._on_death)
        self._core = await self._thread.start()
        if not self._gate.is_open:
            self._thread.post(EngineCore.hurry)

    def _make_core(self) -> EngineCore:
        runner = self._load()
        runner.warm_up()
        self._share_with(runner)
        return EngineCore(
            runner,
            self._limits,
            guards=self._guards,
            on_iteration=self._on_iteration,
        )

    def admit(self, audio_s: float) -> AbstractContextManager[Ticket]:
        """Hold a ticket."""
        core = self._core
        return self._gate.admit(
            audio_s,
            running=core.running if core else 0,
            running_audio_s=core.running_audio_s if core else 0.0,
        )

    async def submit(self, request: EngineRequest) -> EngineResult:
        """Queue a clip and wait for its transcript."""
        waiting = Pending(request.on_piece)
        key = self.begin(replace(request, on_piece=request.on_piece and waiting.tell), waiting.end)
        patience_s = None
        if request.deadline_s is not None:
            patience_s = max(0.0, request.deadline_s - time.monotonic()) + _DEADLINE_GRACE_S
        try:
            # The device's thread answers at the deadline, unless it hangs.
            async with asyncio.timeout(patience_s):
                answer: EngineResult = await waiting.answer
                return answer
        except TimeoutError as error:
            raise DeadlineExceededError("the device did not answer in time") from error
        finally:
            self.cancel(key)

    def begin(self, request: EngineRequest, end: Callable[[Answer], None]) -> int:
        """Queue a clip; for those who have many, and a loop of their own.

        Args:
            request: what is wanted.
            end: called with the answer or the error in its place, once, on the event loop; not if
                the clip is cancelled before.

        Returns:
            What `cancel` takes.

        Raises:
            NotReadyError: the engine is not running.
        """
        if self._core is None or self._thread is None:
            raise NotReadyError("the engine is not running")
        key = next(self._keys)
        self._waiting[key] = _Submitted(request, end)
        arrived_s = time.monotonic()
        self._thread.post(lambda core: core.submit(key, request, arrived_s))
        return key

    def cancel(self, key: int) -> None:
        """Take a clip out of the queue or its slot, if it has not ended."""
        if self._waiting.pop(key, None) is not None and self._thread is not None:
            self._thread.post(lambda core: core.cancel(key))

    def _end_all(self, error: ServerError) -> None:
        """Answer everybody with an error."""
        for key, submitted in list(self._waiting.items()):
            self.cancel(key)
            submitted.end(error)

    def share(self, samples: NDArray[np.float32]) -> None:
        """Let the device read clips that lie in `samples` (N,) where they are."""
        self._shared.append(samples)
        self._tell_of_memory()

    def forget(self, samples: NDArray[np.float32]) -> None:
        """No clip lies in `samples` any more."""
        self._shared = [each for each in self._shared if each is not samples]
        self._left.append(samples)
        self._tell_of_memory()

    def _tell_of_memory(self) -> None:
        if self._thread is not None:
            self._thread.post(lambda core: self._share_with(core.runner))

    def _share_with(self, runner: Runner) -> None:
        """Let a runner know, in its thread, what memory there is, and what it may read no more."""
        while self._left:  # where it stays mapped until then, be it through an engine's death
            runner.forget(self._left[0])
            self._left.popleft()
        for samples in self._shared:
            runner.share(samples)

    async def drain(self, timeout_s: float) -> None:
        """Finish what is admitted; after `timeout_s`, refuse the rest."""
        self._gate.close()
        if self._thread is not None:
            self._thread.post(EngineCore.hurry)
        await self._gate.wait_until_empty(timeout_s)
        self._end_all(ShuttingDownError("the server shut down before this request was done"))

    async def stop(self) -> None:
        """End after the running iteration, and wait for the device's thread, but not for ever."""
        self._gate.close()
        if self._restarting is not None:
            self._restarting.cancel()
            await asyncio.wait([self._restarting])
        self._core = None
        self._end_all(ShuttingDownError("the server is shutting down"))
        if self._thread is not None:
            await self._thread.stop()

    async def failed(self) -> Exception:
        """Wait until the engine has died for good, and return why."""
        if self._death is None:
            raise NotReadyError("the engine has not been started")
        return await asyncio.shield(self._death)

    def stats(self) -> EngineStats:
        """Return what is where."""
        core = self._core
        return EngineStats(
            alive=core is not None,
            admitted=self._admission.requests,
            admitted_audio_s=self._admission.audio_s,
            queued=core.waiting if core else 0,
            running=core.running if core else 0,
            running_audio_s=core.running_audio_s if core else 0.0,
            slots=core.runner.n_slots if core else 0,
            kv_cache_bytes=core.runner.kv_cache_bytes if core else 0,
            rtfx=self._admission.rate.rtfx,
        )

    def _deliver(self, outcome: Outcome) -> None:
        for key, piece in outcome.pieces:
            submitted = self._waiting.get(key)
            if submitted is not None and submitted.request.on_piece is not None:
                submitted.request.on_piece(piece)
        finished_s = 0.0
        for key, answer in outcome.answers:
            # Gone: its client has left meanwhile.
            if (submitted := self._waiting.pop(key, None)) is None:
                continue
            submitted.end(answer)
            # Silence took no work, and says nothing of how fast work is done.
            if not isinstance(answer, ServerError) and answer.batch_size:
                finished_s += submitted.request.audio_s
        self._admission.rate.record(audio_s=finished_s, busy_s=outcome.busy_s)

    def _on_death(self, error: Exception) -> None:
        """Answer everybody; start again once."""
        self._core = None
        self._end_all(InferenceFailedError("the engine has died"))
        if self._restarts < _MAX_RESTARTS:
            self._restarts += 1
            self._restarting = asyncio.create_task(self._restart())
        else:
            self._die(error)

    async def _restart(self) -> None:
        try:
            await self._launch()
        except Exception as error:  # noqa: BLE001 - a loader may raise anything; handed on
            self._die(error)
        else:
            _log.warning("the engine runs again")

    def _die(self, error: Exception) -> None:
        if self._death is not None and not self._death.done():
            self._death.set_result(error)


@dataclass(frozen=True, slots=True)
class _Submitted:
    """A request in the core, and who waits for its answer."""

    request: EngineRequest
    end: Callable[[Answer], None]


class _DeviceThread:
    """Loads a core, obeys commands and iterates until it is stopped or the core raises."""

    def __init__(
        self,
        make_core: Callable[[], EngineCore],
        deliver: Callable[[Outcome], None],
        on_death: Callable[[Exception], None],
    ) -> None:
        """Made on the event loop that `deliver` and `on_death` are called on."""
        self._make_core = make_core
        self._deliver = deliver
        self._on_death = on_death
        self._loop = asyncio.get_running_loop()
        self._loaded: asyncio.Future[EngineCore] = self._loop.create_future()
        self._ended = asyncio.Event()
        self._inbox: queue.SimpleQueue[Callable[[EngineCore], None] | None] = queue.SimpleQueue()
        # A daemon: a device that hangs must not keep a process that has given up from ending.
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)

    async def start(self) -> EngineCore:
        """Begin, and wait until the core is loaded."""
        self._thread.start()
        return await self._loaded

    def post(self, command: Callable[[EngineCore], None]) -> None:
        """Have a command obeyed before the next iteration."""
        self._inbox.put(command)

    async def stop(self) -> None:
        """End after the running iteration, or leave a thread behind that hangs."""
        self._inbox.put(None)
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await self._ended.wait()
        except TimeoutError:
            _log.error("the device's thread did not end in %g s", _STOP_TIMEOUT_S)

    def _run(self) -> None:
        self._live()
        self._call(asyncio.Event.set, self._ended)

    def _live(self) -> None:
        try:
            core = self._make_core()
        except Exception as error:  # noqa: BLE001 - a loader may raise anything; handed on
            self._call(self._fail_to_load, error)
            return
        self._call(self._finish_load, core)
        try:
            while self._obey(core):
                outcome = core.iterate()
                if outcome:
                    self._call(self._deliver, outcome)
        except Exception as error:  # noqa: BLE001 - a broken device may raise anything
            _log.critical("the engine has died", exc_info=error)
            # Its frames hold the model, which must be gone before another is loaded.
            self._call(self._on_death, RuntimeError(f"{type(error).__name__}: {error}"))

    def _obey(self, core: EngineCore) -> bool:
        """Run what commands there are, and wait for one if nothing else is to do."""
        idle_s = core.idle_s()
        with contextlib.suppress(queue.Empty):
            command = self._inbox.get(block=idle_s != 0, timeout=idle_s)
            while True:
                if command is None:
                    return False
                command(core)
                command = self._inbox.get_nowait()
        return True

    def _finish_load(self, core: EngineCore) -> None:
        if not self._loaded.done():
            self._loaded.set_result(core)

    def _fail_to_load(self, error: Exception) -> None:
        if not self._loaded.done():
            self._loaded.set_exception(error)

    def _call(self, function: Callable[[_T], None], argument: _T) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits
            self._loop.call_soon_threadsafe(function, argument)
