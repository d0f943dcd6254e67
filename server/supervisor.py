"""One engine in this process, and front ends in others that feed it.

They accept from one socket, so that the kernel hands connections to whoever is free. A front end
that dies costs the requests it had, and is replaced; an engine that dies for good ends them all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pickle
import signal
import socket
import sys
from typing import TYPE_CHECKING

from server.app import build_engine
from server.audio.clip import SAMPLE_RATE_HZ
from server.board import Board
from server.children import environment
from server.engine.remote import EngineHost
from server.engine.shared_samples import SharedSamples
from server.front_end import Orders
from server.metrics import Metrics, merge_metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from server.settings import Settings

_log = logging.getLogger(__name__)

_RESTART_PAUSE_S = 1.0
_LONGEST_CLIP_S = 30.0  # Whisper's window
_MOST_ROOM_S = 36_000.0  # 2.3 GB, of which what was never used takes no memory
_END_GRACE_S = 15.0  # beyond the drain, for connections to close and processes to end


async def supervise(settings: Settings, listener: socket.socket, *, keys: int) -> Exception | None:
    """Serve until a signal or until the engine has failed.

    Args:
        settings: with more than one front end.
        listener: bound.
        keys: whose use is counted.

    Returns:
        Why the engine failed, None after a signal.
    """
    board = Board.create(settings.front_ends, keys)
    metrics = Metrics()
    engine = build_engine(settings, metrics)
    host = EngineHost(engine, board, own_metrics=metrics.render, merge_metrics=merge_metrics)
    front_ends = _FrontEnds(settings, listener, host, board)
    loop = asyncio.get_running_loop()
    told_to_end = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        # The second one does not wait for what is in flight.
        loop.add_signal_handler(
            number, lambda: front_ends.kill() if told_to_end.is_set() else told_to_end.set()
        )
    front_ends.start()
    failure = asyncio.create_task(_failure(host, engine.failed))
    ending = asyncio.create_task(told_to_end.wait())
    await asyncio.wait([failure, ending], return_when=asyncio.FIRST_COMPLETED)
    failed = failure.result() if failure.done() else None
    if failed is not None:
        host.die(failed)
    told_to_end.set()
    await front_ends.end()
    failure.cancel()
    await asyncio.wait([failure, ending])
    await host.stop()
    os.close(board.file)
    return failed


async def _failure(
    host: EngineHost, failed: Callable[[], Coroutine[None, None, Exception]]
) -> Exception:
    """Load the model, and wait until it cannot be loaded or has died."""
    try:
        await host.start()
    except Exception as error:  # noqa: BLE001 - a loader may raise anything
        return error
    return await failed()


class _FrontEnds:
    """The processes."""

    def __init__(
        self, settings: Settings, listener: socket.socket, host: EngineHost, board: Board
    ) -> None:
        self._settings = settings
        self._listener = listener
        self._host = host
        self._board = board
        self._processes: set[asyncio.subprocess.Process] = set()
        self._keeping: list[asyncio.Task[None]] = []
        self._ending = asyncio.Event()

    def start(self) -> None:
        """Start all of them, and keep them."""
        places = range(self._settings.front_ends)
        self._keeping = [asyncio.create_task(self._keep(place)) for place in places]

    async def end(self) -> None:
        """Have them finish what is in flight, and wait for that."""
        self._ending.set()
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        patience_s = self._settings.drain_timeout_s + _END_GRACE_S
        _, late = await asyncio.wait(self._keeping, timeout=patience_s)
        if late:
            _log.error("%d front ends did not end in %g s", len(late), patience_s)
            self.kill()
            await asyncio.wait(late)

    def kill(self) -> None:
        """End them at once."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    async def _keep(self, place: int) -> None:
        """Run one front end after another until all are to end."""
        while not self._ending.is_set():
            try:
                status = await self._run(place)
            except Exception:  # noqa: BLE001 - whatever it is, a server without one is none
                _log.exception("cannot start a front end")
            else:
                if not self._ending.is_set():
                    _log.error("front end %d ended with status %d; it is replaced", place, status)
            self._board.clear(place)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RESTART_PAUSE_S):
                    await self._ending.wait()

    async def _run(self, place: int) -> int:
        # A new one each time: in that of one that has died, the engine may still read.
        samples = SharedSamples.create(_most_samples(self._settings))
        ours, theirs = socket.socketpair()
        files = (self._listener.fileno(), theirs.fileno(), self._board.file, samples.file)
        orders = Orders(self._settings, place, self._board.keys, *files)
        try:
            # A session of its own: Ctrl+C in a terminal ends this process, which ends the others.
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "server.front_end",
                stdin=asyncio.subprocess.PIPE, pass_fds=files, env=environment(),
                start_new_session=True,
            )  # fmt: skip
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(samples.file)  # the mapping stays
        self._processes.add(process)
        serving = asyncio.create_task(self._host.serve(ours, samples))
        if self._ending.is_set():
            process.terminate()
        try:
            if process.stdin is not None:
                process.stdin.write(pickle.dumps(orders))
                process.stdin.close()
            await serving  # until the other end is closed
        except Exception:  # noqa: BLE001 - what came is no message
            _log.exception("front end %d can no longer be served", place)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        finally:
            status = await process.wait()
            self._processes.discard(process)
        return status


def _most_samples(settings: Settings) -> int:
    """Room for what waits and runs, twice: gaps between clips are lost.

    What long recordings and live sessions send is not in this. Where there is none, a clip waits.
    """
    running_s = _LONGEST_CLIP_S * (settings.max_batch_size + 1)
    audio_s = min(2 * (settings.max_queue_audio_s + running_s), _MOST_ROOM_S)
    return int(audio_s * SAMPLE_RATE_HZ)
