"""A pool of decoding processes, driven from the event loop without threads.

Each process handles one upload at a time, so a crash or a hang concerns one request: its process is
ended and replaced, the others go on. The process of a long recording waits for its reader again
and again; before that keeps others waiting, another process takes its place. The processes import
no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from server import errors
from server.audio import wire
from server.audio.clip import SAMPLE_RATE_HZ, Excerpt, Progress
from server.children import environment

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Coroutine

    from server.audio.limits import AudioLimits

_log = logging.getLogger(__name__)

_START_TIMEOUT_S = 60.0
_RESTART_PAUSE_S = 1.0
_WRITTEN_BYTES = 1 << 20  # at once
_CLOSED = -1
_LEND_AFTER_S = 1.0  # that a process has waited for its reader; starting another takes as long
_AUDIO_ERRORS: dict[str, type[errors.AudioError]] = {
    kind.__name__: kind for kind in errors.AudioError.__subclasses__()
}


class DecodePool:
    """Decodes uploads in `size` processes, and one more for each that waits for its reader."""

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
            ExceptionGroup: of OSError: they cannot be started.
        """
        # Unlike `gather`, a group waits for those that it cancels, and so for their pipes to close.
        async with asyncio.TaskGroup() as group:
            for _ in range(self._size):
                group.create_task(self._add())

    async def _add(self) -> None:
        worker = await _Worker.spawn()
        self._workers.add(worker)
        try:
            await worker.wait_until_ready()
        except BaseException:
            await self._end(worker)
            raise
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

    async def stream(  # noqa: PLR0913 - what a worker is asked for
        self,
        data: bytes,
        limits: AudioLimits,
        *,
        max_clip_s: float,
        max_excerpt_s: float,
        finds_speech: bool = True,
        places_speech: bool = True,
    ) -> AsyncGenerator[Excerpt | Progress, None]:
        """Decode an upload, and cut it into excerpts; waits for a free process.

        Nothing is decoded ahead of the reader but one excerpt. Close the generator:
        then the process of a short upload finishes unheard, and that of a long one is ended.

        Args:
            data: the file.
            limits: of the whole recording.
            max_clip_s: longest recording that stays in one piece.
            max_excerpt_s: longest piece of one that does not; no longer than that.
            finds_speech: leave out what is no speech.
            places_speech: in a recording that stays in one piece, find where speech begins and
                ends; else only whether there is any, which takes less time.

        Yields:
            Excerpts in order, and how far the decoding has come; the last one is done.

        Raises:
            AudioError: the upload cannot be decoded within the limits.
            DecoderCrashedError: the process died of it.
            DecodeTimeoutError: it took too long.
        """
        request = {
            "limits": dataclasses.asdict(limits),
            "whole_samples": int(max_clip_s * SAMPLE_RATE_HZ),
            "max_samples": int(max_excerpt_s * SAMPLE_RATE_HZ),
            "finds_speech": finds_speech,
            "places_speech": places_speech,
        }
        job = _Job(request, data, await self._idle.get())
        self._spawn(self._run(job))
        try:
            while True:
                answer = await job.answers.get()
                if isinstance(answer, errors.ServerError):
                    raise answer
                yield answer
                if isinstance(answer, Progress) and answer.is_done:
                    return
        finally:
            job.abandon()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, job: _Job) -> None:
        """Hand on a process's answers to one upload, and return the process."""
        is_usable = False
        try:
            is_usable = await self._hand_on(job)
        except TimeoutError:
            reason = f"decoding took more than {self._timeout_s:g} s and was given up"
            await job.put(errors.DecodeTimeoutError(reason))
        except Exception:  # noqa: BLE001 - a decoder that a file has taken over may say anything
            await job.put(errors.DecoderCrashedError("the decoder crashed on this file"))
        if job.is_lent:  # another has taken its place
            await self._end(job.worker)
        elif is_usable:
            self._idle.put_nowait(job.worker)
        else:
            await self._replace(job.worker)

    async def _hand_on(self, job: _Job) -> bool:
        """Returns whether the process can take another upload."""
        async with asyncio.timeout(self._timeout_s):
            await job.worker.send(job.request, job.data)
        job.data = b""
        while True:
            async with asyncio.timeout(self._timeout_s):
                answer = await job.worker.receive(job.request["whole_samples"])
            is_done = isinstance(answer, errors.AudioError)
            if isinstance(answer, Progress):
                job.is_long, is_done = answer.is_long, answer.is_done
            await self._put(job, answer)
            if is_done:
                return True
            if job.is_abandoned and job.is_long:  # to its end it may take long
                return False

    async def _put(self, job: _Job, answer: Excerpt | Progress | errors.ServerError) -> None:
        """Wait until there is room; a process that waits for long gets a substitute."""
        began_s = time.monotonic()
        patience_s = max(0.0, _LEND_AFTER_S - job.waited_s)
        lending = asyncio.get_running_loop().call_later(patience_s, self._lend, job)
        try:
            await job.put(answer)
        finally:
            lending.cancel()
            job.waited_s += time.monotonic() - began_s

    def _lend(self, job: _Job) -> None:
        if not job.is_lent:
            job.is_lent = True
            self._spawn(self._add_until_it_works())

    async def _replace(self, worker: _Worker) -> None:
        _log.warning("decoding process %d is replaced", worker.process.pid)
        await self._end(worker)
        await self._add_until_it_works()

    async def _end(self, worker: _Worker) -> None:
        await worker.end()
        self._workers.discard(worker)

    async def _add_until_it_works(self) -> None:
        while True:
            try:
                await self._add()
            except OSError:
                _log.exception("cannot start a decoding process")
                await asyncio.sleep(_RESTART_PAUSE_S)
            else:
                return


class _Job:
    """One upload in its process, and what has come out and is not read yet.

    Attributes:
        waited_s: how long its process has waited for the reader.
        is_lent: another process has taken its place.
        is_long: it does not fit into one excerpt.
        is_abandoned: nobody reads on.
    """

    def __init__(self, request: dict[str, Any], data: bytes, worker: _Worker) -> None:
        self.request, self.data, self.worker = request, data, worker
        self.answers: asyncio.Queue[Excerpt | Progress | errors.ServerError] = asyncio.Queue(1)
        self.waited_s = 0.0
        self.is_lent = self.is_long = self.is_abandoned = False

    def abandon(self) -> None:
        self.is_abandoned = True
        if not self.answers.empty():
            self.answers.get_nowait()  # lets a process that waits for room go on

    async def put(self, answer: Excerpt | Progress | errors.ServerError) -> None:
        if not self.is_abandoned:
            await self.answers.put(answer)


class _Worker:
    """A process, the pipes to it, and the files in memory that both have open."""

    def __init__(self, process: asyncio.subprocess.Process, upload: int, samples: int) -> None:
        if process.stdin is None or process.stdout is None:
            raise OSError("a decoding process has no pipes")
        self.process = process
        self._stdin, self._stdout = process.stdin, process.stdout
        self._upload, self._samples = upload, samples

    @classmethod
    async def spawn(cls) -> _Worker:
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        with contextlib.ExitStack() as opened:
            files = []
            for _ in range(2):
                files.append(wire.open_memory())
                opened.callback(os.close, files[-1])
            # A session of its own: Ctrl+C in a terminal must not end the decoders while we drain.
            creation = asyncio.create_subprocess_exec(
                sys.executable, "-m", "server.audio.worker", *map(str, files),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                pass_fds=files, env=environment() | one_thread, start_new_session=True,
            )  # fmt: skip
            creating = asyncio.ensure_future(creation)
            try:
                worker = cls(await asyncio.shield(creating), *files)
            except asyncio.CancelledError:
                # Cancelled itself, asyncio may leave a pipe open that it was about to connect.
                worker = cls(await creating, *files)
                opened.pop_all()
                await worker.end()
                raise
            opened.pop_all()
            return worker

    async def wait_until_ready(self) -> None:
        """Raises OSError if the process does not start."""
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                await wire.read_async(self._stdout)
        except (asyncio.IncompleteReadError, TimeoutError, ValueError) as error:
            raise OSError("a decoding process does not start") from error

    async def send(self, request: dict[str, Any], data: bytes) -> None:
        for place in range(0, len(data), _WRITTEN_BYTES):
            if place:
                await asyncio.sleep(0)  # the event loop has more to do
            wire.write_at(self._upload, memoryview(data)[place : place + _WRITTEN_BYTES], place)
        await self._tell(request | {"bytes": len(data)})

    async def receive(self, max_samples: int) -> Excerpt | Progress | errors.AudioError:
        # Whoever asks for more has taken what there was.
        while "waits" in (message := await wire.read_async(self._stdout)):
            await self._tell({"goes_on": True})
        if "error" in message:
            return _AUDIO_ERRORS[message["error"]](message["message"])
        if "decoded_s" in message:
            return Progress(**message)
        count = message["samples"]
        if not 0 <= count <= max_samples:
            raise ValueError(f"an excerpt of {count} samples")
        speech_start, speech_end = message["speech"]
        waveform = wire.read_samples(self._samples, count)
        return Excerpt(waveform, int(message["start"]), int(speech_start), int(speech_end))

    async def _tell(self, message: dict[str, Any]) -> None:
        self._stdin.write(wire.pack(message))
        await self._stdin.drain()

    async def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self._stdin.close()
        try:
            await self.process.wait()
            # The pipes close behind the process; nothing of it is to be open when the loop ends.
            with contextlib.suppress(OSError):
                await self._stdout.read()
                await self._stdin.wait_closed()
        finally:
            self._close_files()

    def _close_files(self) -> None:
        """Close what is open; once, since others may have these numbers then."""
        files, self._upload, self._samples = (self._upload, self._samples), _CLOSED, _CLOSED
        for file in files:
            if file != _CLOSED:
                os.close(file)
