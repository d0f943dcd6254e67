"""What handing a clip over costs a front end and the engine's process, without a model.

`python -m benchmarks.channel` prints CPU time a clip on either side, the event loop's included, and
clips a second. An engine that answers at once stands behind the channel.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import socket
import time
from typing import TYPE_CHECKING, cast

import numpy as np
import uvloop

from server.board import Board, Seat
from server.engine.admission import Admission
from server.engine.interface import Capabilities, EngineRequest, EngineResult, EngineStats
from server.engine.remote import EngineHost, RemoteEngine
from server.engine.shared_samples import SharedSamples
from server.metrics import merge_metrics

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from server.engine.continuous import ContinuousEngine

SAMPLE_RATE_HZ = 16_000
WARM_UP_CLIPS = 50


class _InstantEngine:
    """Answers at once."""

    capabilities = Capabilities(max_audio_s=30.0)

    async def start(self) -> None:
        """Nothing to load."""

    async def stop(self) -> None:
        """Nothing to end."""

    def begin(self, request: EngineRequest, end: Callable[[EngineResult], None]) -> int:
        """Look at the first and the last sample, as a model would at all of them."""
        if not float(request.waveform[0]) == float(request.waveform[-1]) == 1.0:
            raise ValueError("these are not the samples that were sent")
        result = EngineResult(
            text="a",
            language=None,
            finish_reason="stop",
            token_ids=tuple(range(24)),
            queue_s=0.0,
            encode_s=0.0,
            prefill_s=0.0,
            generate_s=0.0,
            first_token_s=0.0,
            batch_size=1,
        )
        asyncio.get_running_loop().call_soon(end, result)
        return 0

    def share(self, samples: NDArray[np.float32]) -> None:
        """No device fetches anything."""

    def forget(self, samples: NDArray[np.float32]) -> None:
        """No device has fetched anything."""

    def cancel(self, key: int) -> None:
        """Answered already."""

    def stats(self) -> EngineStats:
        """Nothing ever waits."""
        return EngineStats(
            alive=True,
            admitted=0,
            admitted_audio_s=0.0,
            queued=0,
            running=0,
            running_audio_s=0.0,
            slots=1,
            kv_cache_bytes=1,
            rtfx=None,
        )


def _serve(
    ends: tuple[socket.socket, socket.socket], board: Board, samples: SharedSamples, clips: int
) -> None:
    others, own = ends
    others.close()  # or it would never be seen to end

    async def serve() -> None:
        host = EngineHost(
            cast("ContinuousEngine", _InstantEngine()),
            board,
            own_metrics=lambda: b"",
            merge_metrics=merge_metrics,
        )
        serving = asyncio.create_task(host.serve(own, samples))
        await host.start()
        began_s = time.process_time()
        await serving
        cost_ms = (time.process_time() - began_s) / (clips + WARM_UP_CLIPS) * 1000
        await host.stop()
        print(f"engine's process: {cost_ms:.3f} ms of CPU a clip", flush=True)  # noqa: T201 - result

    uvloop.run(serve())


async def _ask(remote: RemoteEngine, audio_s: float, clips: int, at_once: int) -> None:
    waveform = np.zeros(int(audio_s * SAMPLE_RATE_HZ), np.float32)
    waveform[[0, -1]] = 1.0
    gate = asyncio.Semaphore(at_once)

    async def ask() -> None:
        async with gate:
            await remote.submit(EngineRequest("clip", waveform, audio_s))

    await remote.start()
    await asyncio.gather(*(ask() for _ in range(WARM_UP_CLIPS)))
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    await asyncio.gather(*(ask() for _ in range(clips)))
    cost_ms = (time.process_time() - cpu_s) / clips * 1000
    rate = clips / (time.perf_counter() - wall_s)
    await remote.stop()
    print(f"front end: {cost_ms:.3f} ms of CPU a clip; {rate:.0f} clips/s")  # noqa: T201 - result


def main() -> None:
    """Measure once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=800)
    parser.add_argument("--audio-s", type=float, default=8.0, help="of a clip")
    parser.add_argument("--at-once", type=int, default=16, help="clips under way")
    options = parser.parse_args()
    board = Board.create(1, 1)
    room = int(2 * options.at_once * (options.audio_s + 1) * SAMPLE_RATE_HZ)
    samples = SharedSamples.create(room)
    ours, theirs = socket.socketpair()
    process = multiprocessing.get_context("fork").Process(
        target=_serve, args=((ours, theirs), board, samples, options.clips)
    )
    process.start()
    theirs.close()
    seat = Seat(board, 0)
    admission = Admission(
        max_requests=1000,
        max_audio_s=1e6,
        requests=seat.tally("requests"),
        audio_s=seat.tally("audio_s"),
    )
    front_end = RemoteEngine(
        ours, board, SharedSamples(samples.file), admission, own_metrics=lambda: b""
    )
    os.close(samples.file)
    uvloop.run(_ask(front_end, options.audio_s, options.clips, options.at_once))
    process.join()


if __name__ == "__main__":
    main()
