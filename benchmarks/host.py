"""What the engine costs its host beside the model's own work, and whether a GPU waits for that.

    python -m benchmarks.host

On a GPU the device's thread does nothing else, and shares its interpreter with the event loop of
its process. Here a stand-in takes the GPU's place (`benchmarks.stand_in`): it computes nothing, and
is busy for as long as an H100 was. In turns, the engine gets clips by itself, and from two front
ends in processes of their own, as with `--front-ends`; those only hand clips over.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import typer
import uvloop

from benchmarks.report import describe_machine, markdown_table
from benchmarks.shapes import make_checkpoint
from benchmarks.stand_in import make_runner
from model.log_mel import SAMPLE_RATE_HZ
from server.board import Board, Seat
from server.engine.admission import Admission
from server.engine.continuous import ContinuousEngine
from server.engine.core import EngineCore
from server.engine.interface import EngineRequest
from server.engine.remote import EngineHost, RemoteEngine
from server.engine.scheduler import ScheduleLimits
from server.engine.shared_samples import SharedSamples
from server.metrics import Metrics, merge_metrics

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.synchronize import Barrier

    from server.engine.runner import SpeechRunner

CLIP_S = 8.0
TOKENS_PER_AUDIO_S = 3.0
FRONT_ENDS = 2
_PATIENCE_S = 1000.0
_PARTS = {
    "plan": "plan",
    "start": "launch encoder and prefill",
    "begin_step": "launch steps",
    "finish_step": "await tokens",
    "release": "free rows",
    "text": "tokens to text",
}
_REST = "schedule, answers, guards"


class TimedRunner:
    """Hands everything on to a runner, and counts the thread's CPU time of each part."""

    def __init__(self, runner: SpeechRunner) -> None:
        """Begin at nothing."""
        self._runner = runner
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the runner has
        found = getattr(self._runner, name)
        return self._timed(name, found) if name in _PARTS else found

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: object, **options: object) -> Any:  # noqa: ANN401 - likewise
            began_s = time.thread_time()
            try:
                return call(*args, **options)
            finally:
                self.seconds[_PARTS[name]] += time.thread_time() - began_s

        return run


@dataclass(frozen=True)
class Measured:
    """One round.

    Attributes:
        device_ms: CPU time of the device's thread, a clip.
        others_ms: of the other threads of its process.
        clips_per_s: clips answered in a second of wall time.
    """

    device_ms: float
    others_ms: float
    clips_per_s: float


def _noise() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(0, 0.1, round(CLIP_S * SAMPLE_RATE_HZ)).astype(np.float32)


def transcribe(runner: TimedRunner, clips: int) -> Measured:
    """Keep all slots of the engine busy with clips, as fast as it takes them."""
    core, waveform = EngineCore(runner, ScheduleLimits(runner.n_slots)), _noise()
    cpu_s, wall_s = time.thread_time(), time.perf_counter()
    submitted = answered = 0
    while answered < clips:
        while submitted < min(clips, answered + runner.n_slots):
            now_s = time.monotonic()
            request = EngineRequest("", waveform, CLIP_S, deadline_s=now_s + _PATIENCE_S)
            core.submit(submitted, request, now_s)
            submitted += 1
        answered += len(core.iterate().answers)
    while core.idle_s() is not None:
        core.iterate()
    wall_s = time.perf_counter() - wall_s
    return Measured(1000 * (time.thread_time() - cpu_s) / clips, 0.0, clips / wall_s)


def _feed(  # what a front end's process runs
    end: socket.socket, board: Board, place: int, file: int, clips: int, at_once: int, gate: Barrier
) -> None:
    seat, waveform = Seat(board, place), _noise()
    admission = Admission(
        max_requests=clips,
        max_audio_s=clips * CLIP_S,
        requests=seat.tally("requests"),
        audio_s=seat.tally("audio_s"),
    )
    remote = RemoteEngine(end, board, SharedSamples(file), admission, own_metrics=lambda: b"")

    async def feed() -> None:
        await remote.start()
        free = asyncio.Semaphore(at_once)

        async def ask() -> None:
            async with free:
                deadline_s = time.monotonic() + _PATIENCE_S
                await remote.submit(EngineRequest("", waveform, CLIP_S, deadline_s=deadline_s))

        while True:
            # A broken gate: there are no more rounds.
            gate.wait()
            await asyncio.gather(*(ask() for _ in range(clips)))
            gate.wait()

    try:
        uvloop.run(feed())
    except threading.BrokenBarrierError:
        return


class Served:
    """The engine behind two front ends."""

    def __init__(self, runner: SpeechRunner, clips: int) -> None:
        """Start the front ends' processes, each of which will send its share of the clips."""
        forking = multiprocessing.get_context("fork")
        self._clips = clips
        self._gate = forking.Barrier(FRONT_ENDS + 1)
        self._board = Board.create(FRONT_ENDS, 1)
        self._ends = []
        self._processes = []
        at_once = runner.n_slots // FRONT_ENDS
        for place in range(FRONT_ENDS):
            ours, theirs = socket.socketpair()
            samples = SharedSamples.create(2 * runner.n_slots * len(_noise()))
            share = (clips // FRONT_ENDS, at_once, self._gate)
            process = forking.Process(
                target=_feed, args=(theirs, self._board, place, samples.file, *share), daemon=True
            )
            process.start()
            theirs.close()
            os.close(samples.file)
            self._ends.append((ours, samples))
            self._processes.append(process)
        self._device_thread = 0
        self._engine = ContinuousEngine(
            lambda: self._load(runner),
            ScheduleLimits(runner.n_slots),
            Admission(max_requests=1, max_audio_s=1.0),
            on_iteration=Metrics().iterated,
        )
        self._host = EngineHost(
            self._engine, self._board, own_metrics=lambda: b"", merge_metrics=merge_metrics
        )

    def _load(self, runner: SpeechRunner) -> SpeechRunner:
        self._device_thread = threading.get_native_id()
        return runner

    async def measure(self, rounds: int, between: Callable[[], None]) -> list[Measured]:
        """Serve some rounds, with something else before each; the first warms up."""
        serving = [asyncio.create_task(self._host.serve(*end)) for end in self._ends]
        await self._host.start()
        loop = asyncio.get_running_loop()
        measured = []
        for _ in range(rounds + 1):
            between()
            await loop.run_in_executor(None, self._gate.wait)
            wall_s, all_s, device_s = time.perf_counter(), time.process_time(), self._device_s()
            await loop.run_in_executor(None, self._gate.wait)
            wall_s, all_s = time.perf_counter() - wall_s, time.process_time() - all_s
            device_ms = 1000 * (self._device_s() - device_s) / self._clips
            others_ms = 1000 * all_s / self._clips - device_ms
            measured.append(Measured(device_ms, others_ms, self._clips / wall_s))
        self._gate.abort()
        await asyncio.gather(*serving)
        await self._host.stop()
        for process in self._processes:
            process.join()
        return measured[1:]

    def _device_s(self) -> float:
        """CPU time of the device's thread."""
        stat = Path(f"/proc/self/task/{self._device_thread}/schedstat").read_text()
        return int(stat.split()[0]) / 1e9


def main(
    clips: Annotated[int, typer.Option(min=FRONT_ENDS)] = 2048,
    slots: Annotated[int, typer.Option(min=FRONT_ENDS)] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="Medians are told.")] = 5,
) -> None:
    """Print CPU ms a clip, and clips a second."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint("thin", Path(folder) / "thin", TOKENS_PER_AUDIO_S)
        runner = make_runner(checkpoint, slots=slots, clip_s=CLIP_S)
        # First of all: a process that has computed should not be forked.
        served = Served(runner, clips - clips % FRONT_ENDS)
        runner.warm_up()
        timed = TimedRunner(runner)
        alone: list[Measured] = []
        parts: list[dict[str, float]] = []

        def measure_alone() -> None:
            timed.seconds.clear()
            alone.append(transcribe(timed, clips))
            parts.append({part: 1000 * spent_s / clips for part, spent_s in timed.seconds.items()})

        behind = uvloop.run(served.measure(rounds, measure_alone))
    alone, parts = alone[1:], parts[1:]
    typer.echo(describe_machine())
    part_rows = [[part, f"{median(each[part] for each in parts):.3f}"] for part in parts[0]]
    whole_ms = median(each.device_ms for each in alone)
    rest_ms = whole_ms - median(sum(each.values()) for each in parts)
    part_rows += [[_REST, f"{rest_ms:.3f}"], ["all", f"{whole_ms:.3f}"]]
    typer.echo(markdown_table([f"{clips} clips, {slots} slots", "CPU ms a clip"], part_rows))
    rows = [
        [
            name,
            f"{median(each.device_ms for each in measured):.3f}",
            f"{median(each.others_ms for each in measured):.3f}",
            f"{median(each.clips_per_s for each in measured):.0f}",
            f"{CLIP_S * median(each.clips_per_s for each in measured):.0f}",
        ]
        for name, measured in (("engine alone", alone), ("behind front ends", behind))
    ]
    headings = ["", "device's thread, CPU ms a clip", "its process's others", "clips/s", "RTFx"]
    typer.echo(markdown_table(headings, rows))


if __name__ == "__main__":
    typer.run(main)
