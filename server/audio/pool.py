"""A pool of decoding processes, driven from the event loop without threads.

Each process handles one upload at a time, so a crash or a hang concerns one request: its process is
ended and replaced, the others go on. The processes import no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from server import errors
from server.audio import wire
from server.audio.clip import SAMPLE_RATE_HZ, Clip

if TYPE_CHECKING:
    from server.audio.limits import AudioLimits

_log = logging.getLogger(__name__)

_START_TIMEOUT_S = 60.0
_RESTART_PAUSE_S = 1.0
_AUDIO_ERRORS: dict[str, type[errors.AudioError]] = {
    kind.__name__: kind for kind in errors.AudioError.__subclasses__()
}


class DecodePool:
    """Decodes uploads in `size` processes."""

    def __init__(self, size: int, timeout_s: float) -> None:
        """Prepare `size` processes, each given `timeout_s` for an upload; `start` starts them."""
        self._size = size
        self._timeout_s = timeout_s
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()
        self._workers: set[_Worker] = set()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Start the processes.

        Raises:
            OSError: they cannot be started.
        """
        await asyncio.gather(*(self._add() for _ in range(self._size)))

    async def _add(self) -> None:
        worker = await _Worker.start()
        self._workers.add(worker)
        self._idle.put_nowait(worker)

    async def stop(self) -> None:
        """End all processes, and whatever they are at."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(worker.end() for worker in self._workers))
        self._workers.clear()

    @property
    def process_ids(self) -> list[int]:
        """Of the processes that live."""
        return sorted(worker.process.pid for worker in self._workers)

    async def decode(self, data: bytes, limits: AudioLimits) -> Clip:
        """Decode an upload; waits for a free process.

        Cancelled while it waits, nothing happens; cancelled later, the process finishes unheard.

        Raises:
            AudioError: the upload cannot be decoded within the limits.
            DecoderCrashedError: the process died of it.
            DecodeTimeoutError: it took too long.
        """
        worker = await self._idle.get()
        job = self._spawn(self._run(worker, data, limits))
        return await asyncio.shield(job)

    def _spawn(self, work: Any) -> asyncio.Task[Any]:  # noqa: ANN401 - any coroutine
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # taken, so that asyncio does not report a job whose client has left

    async def _run(self, worker: _Worker, data: bytes, limits: AudioLimits) -> Clip:
        try:
            async with asyncio.timeout(self._timeout_s):
                header, payload = await worker.ask(data, limits)
        except TimeoutError as error:
            self._spawn(self._replace(worker))
            raise errors.DecodeTimeoutError(
                f"decoding took more than {self._timeout_s:g} s and was given up"
            ) from error
        except (asyncio.IncompleteReadError, OSError, ValueError) as error:
            self._spawn(self._replace(worker))
            raise errors.DecoderCrashedError("the decoder crashed on this file") from error
        self._idle.put_nowait(worker)
        if "error" in header:
            raise _AUDIO_ERRORS[header["error"]](header["message"])
        waveform = np.frombuffer(payload, np.float32).copy()  # writable, as torch wants it
        return Clip(waveform, int(header["sample_rate_hz"]), int(header["channels"]))

    async def _replace(self, worker: _Worker) -> None:
        _log.warning("decoding process %d is replaced", worker.process.pid)
        self._workers.discard(worker)
        await worker.end()
        while True:
            try:
                await self._add()
            except OSError:
                _log.exception("cannot start a decoding process")
                await asyncio.sleep(_RESTART_PAUSE_S)
            else:
                return


class _Worker:
    """A process and the pipes to it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        if process.stdin is None or process.stdout is None:
            raise OSError("a decoding process has no pipes")
        self.process = process
        self._stdin, self._stdout = process.stdin, process.stdout

    @classmethod
    async def start(cls) -> _Worker:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path or os.curdir for path in sys.path),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        # A session of its own: Ctrl+C in a terminal must not end the decoders while we drain.
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "server.audio.worker",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            limit=1 << 20, env=environment, start_new_session=True,
        )  # fmt: skip
        worker = cls(process)
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                await wire.read_async(worker._stdout, 0)
        except BaseException as error:
            await worker.end()
            if isinstance(error, asyncio.IncompleteReadError | TimeoutError | ValueError):
                raise OSError("a decoding process does not start") from error
            raise
        return worker

    async def ask(self, data: bytes, limits: AudioLimits) -> tuple[dict[str, Any], bytes]:
        self._stdin.write(wire.pack(dataclasses.asdict(limits), len(data)))
        self._stdin.write(data)
        await self._stdin.drain()
        most = int(limits.max_audio_s * SAMPLE_RATE_HZ + 1) * np.dtype(np.float32).itemsize
        return await wire.read_async(self._stdout, most)

    async def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self._stdin.close()
        await self.process.wait()
