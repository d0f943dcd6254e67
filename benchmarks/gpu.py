"""One table for a GPU: decode steps against the rooflines, the engine, and the server over HTTP.

    python -m benchmarks.gpu

Shape, precision and clips are those of the figures to reach: Qwen2.5-0.5B's shape behind
whisper-tiny's encoder, bf16, clips of 8 s, 3 tokens a second. The rooflines are what this GPU
reads and multiplies by measurement, not by its data sheet. One front end cannot feed a GPU: each
number of them is a server of its own.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import torch
import typer

from benchmarks.decode_step import (
    BYTES,
    ENGINE,
    GENERATE,
    LinearLayers,
    measure,
)
from benchmarks.load import ClientProcesses, Measurement, make_clips, run_clients
from benchmarks.offline import run_engine, run_generate
from benchmarks.report import describe_machine, markdown_table
from benchmarks.servers import our_server
from benchmarks.shapes import Shape, make_checkpoint
from model.transcription import Transcriber
from server.engine.audio_encoder import AudioEncoder, RecordedAudioEncoder
from server.engine.recordings import CudaGraphs
from server.engine.runner import SpeechRunner

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.load import Clip
    from server.engine.recordings import Run

CLIP_S = 8.0
TOKENS_PER_AUDIO_S = 3.0
STEPS = 20
ROUNDS = 3
WAVES_OFFLINE = 3
ENCODED_TOGETHER = (1, 30)
ENCODINGS = 20
CLIPS_PER_CLIENT = 16
MOST_CORES = 32
# Of the issue: the best published figures for this model class on an H100, and beyond.
STEPS_TO_REACH = {1: 0.6, 256: 0.5}
RTFX_TO_REACH = {1: 156, 2: 296, 4: 539, 8: 867, 256: 3400, 512: 10_000}
SLOTS = 512
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Row(NamedTuple):
    """A figure, and what is to be reached."""

    name: str
    measured: float
    aim: float | None = None


def usable_cores() -> int:
    """Cores that this process may use; of many, as many as are of use."""
    return min(MOST_CORES, len(os.sched_getaffinity(0)))


def measure_products(device: torch.device, dtype: torch.dtype, width: int = 8192) -> float:
    """Floating-point operations a second of a large matrix product; the best of some."""
    left, right = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        (left @ right)[0, 0].item()
        seconds.append(time.perf_counter() - started)
    return 2 * width**3 / min(seconds)


def roofline_share(step_s: float, read_s: float, operations: float, per_s: float) -> float:
    """How much of a step is the longer of reading its bytes and multiplying.

    Args:
        step_s: what the step takes.
        read_s: what reading its bytes takes.
        operations: of its matrix products.
        per_s: operations that the machine does in a second.
    """
    return max(read_s, operations / per_s) / step_s


def measure_steps(transcriber: Transcriber, rows: int) -> list[Row]:
    """A decode step: its time, its share of the roofline, and `generate`'s beside it."""
    times = measure(
        transcriber, rows, generating=transcriber, steps=STEPS, rounds=ROUNDS, clip_s=CLIP_S
    )
    linear = LinearLayers(transcriber, rows)
    operations = 2 * rows * linear.bytes / transcriber.model.llm.dtype.itemsize
    per_s = measure_products(transcriber.device, transcriber.model.llm.dtype)
    step_s, read_s = times[ENGINE].wall_ms / 1000, times[BYTES].wall_ms / 1000
    share = roofline_share(step_s, read_s, operations, per_s)
    name = f"decode step, {rows} rows"
    return [
        Row(f"{name}, ms", 1000 * step_s),
        Row(f"{name}, share of the roofline", share, STEPS_TO_REACH.get(rows)),
        Row(f"{name}, of `generate` / ours", times[GENERATE].wall_ms / times[ENGINE].wall_ms),
    ]


def measure_encoding(transcriber: Transcriber, clips: Sequence[Clip]) -> list[Row]:
    """What clips cost until they are encoder frames, recorded and not, in turns."""
    record: Callable[[Run], Run] = CudaGraphs() if transcriber.device.type == "cuda" else _as_it_is
    parts = transcriber.model, transcriber.processor
    ways: dict[str, AudioEncoder] = {
        "recorded": RecordedAudioEncoder(*parts, record, most_clips=len(clips)),
        "launched one by one": AudioEncoder(*parts),
    }
    waveforms = [clip.waveform for clip in clips]
    taken_ms: defaultdict[str, list[float]] = defaultdict(list)
    with torch.inference_mode():
        for timed in range(-1, ENCODINGS):
            for way, encode in ways.items():
                started = time.perf_counter()
                _, lens = encode(waveforms)
                lens.tolist()  # waits
                if timed >= 0:
                    taken_ms[way].append(1000 * (time.perf_counter() - started))
    name = f"encoding {len(clips)} clips" if len(clips) > 1 else "encoding one clip"
    return [Row(f"{name}, {way}, ms", statistics.median(ms)) for way, ms in taken_ms.items()]


def _as_it_is(run: Run) -> Run:
    return run


def measure_offline(transcriber: Transcriber, clips: Sequence[Clip]) -> list[Row]:
    """RTFx of the engine without a server, and of `generate` in batches as large as its own."""
    record = CudaGraphs() if transcriber.device.type == "cuda" else None
    runner = SpeechRunner(transcriber, max_slots=len(clips), record=record)
    runner.warm_up()
    engine, batched = Measurement("engine"), Measurement("generate")
    run_engine(runner, clips, Measurement("warm-up"))
    run_generate(transcriber, clips[:32], 32, Measurement("warm-up"))
    run_engine(runner, list(clips) * WAVES_OFFLINE, engine)
    run_generate(transcriber, clips[:128], 32, batched)
    return [
        Row("engine offline, RTFx", engine.rtfx),
        Row("batches of 32 in `generate`, RTFx", batched.rtfx),
        Row("engine offline / batches in `generate`", engine.rtfx / batched.rtfx, 1.6),
    ]


def measure_server(
    url: str, clips: Sequence[Clip], front_ends: int, processes: ClientProcesses
) -> list[Row]:
    """RTFx and p95 with more and more clients."""
    rows = []
    run_clients(url, clips, len(clips), Measurement("warm-up"))
    for clients, aim in RTFX_TO_REACH.items():
        measurement = Measurement(f"{clients} clients")
        run_clients(url, list(clips[:clients]) * 2, clients, Measurement("warm-up"))
        times = clients * CLIPS_PER_CLIENT // len(clips) + 1
        posted = (list(clips) * times)[: clients * CLIPS_PER_CLIENT]
        processes.run(url, posted, clients, measurement)
        name = f"over HTTP, front ends: {front_ends}, clients: {clients}"
        failed = f" ({measurement.errors} failed)" if measurement.errors else ""
        rows += [
            Row(f"{name}, RTFx{failed}", measurement.rtfx, aim),
            Row(f"{name}, p95 ms", measurement.percentile_ms(95)),
        ]
    return rows


def _of_offline(rows: Sequence[Row], name: str) -> Row:
    """A server's largest RTFx over the engine's without a server."""
    rtfx = {row.name: row.measured for row in rows if "RTFx" in row.name}
    most = max(measured for each, measured in rtfx.items() if each.startswith(f"{name},"))
    return Row(f"{name}, largest RTFx / engine offline", most / rtfx["engine offline, RTFx"], 0.95)


def main(
    shape: Annotated[Shape, typer.Option(help="Model; see benchmarks/shapes.py.")] = "0.5b",
    device: Annotated[str, typer.Option()] = "cuda",
    dtype: Annotated[str, typer.Option()] = "bf16",
    rows: Annotated[str, typer.Option(help="Batch sizes of decode steps.")] = "1,8,32,256",
    front_ends: Annotated[str, typer.Option(help="Numbers of them, each a server.")] = "1,8",
    output: Annotated[Path, typer.Option(help="JSON; written after each part.")] = Path(
        "benchmarks/results/gpu.json"
    ),
) -> None:
    """Measure decode steps, the engine without a server, then servers."""
    measured: list[Row] = []

    def note(found: list[Row]) -> None:
        measured.extend(found)
        output.parent.mkdir(parents=True, exist_ok=True)
        figures = {
            "shape": shape,
            "dtype": dtype,
            "clip_s": CLIP_S,
            "rows": [each._asdict() for each in measured],
        }
        output.write_text(json.dumps({"machine": describe_machine(), **figures}, indent=2) + "\n")
        print(tabulate(found), flush=True)  # noqa: T201 - progress

    clips = make_clips([], SLOTS, shortest_s=CLIP_S, longest_s=CLIP_S)
    with tempfile.TemporaryDirectory() as folder:
        stored = DTYPES.get(dtype)
        model = make_checkpoint(shape, Path(folder), TOKENS_PER_AUDIO_S, dtype=stored)
        transcriber = Transcriber.from_pretrained(model, device, dtype)
        for batch in map(int, rows.split(",")):
            note(measure_steps(transcriber, batch))
        for count in ENCODED_TOGETHER:
            note(measure_encoding(transcriber, clips[:count]))
        note(measure_offline(transcriber, clips))
        del transcriber
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the server is another process
        with ClientProcesses(max(1, usable_cores() // 2)) as processes:
            for count in map(int, front_ends.split(",")):
                options = ["--front-ends", str(count), "--decode-workers", str(usable_cores())]
                server = our_server(model, device, dtype, 0, max_batch_size=SLOTS, options=options)
                with server as running:
                    note(measure_server(running.url, clips, count, processes))
                note([_of_offline(measured, f"over HTTP, front ends: {count}")])
    print(tabulate(measured))  # noqa: T201 - the command's answer
    print(describe_machine())  # noqa: T201 - the command's answer


def tabulate(measured: Sequence[Row]) -> str:
    """A line for each figure, and what is to be reached where there is an aim."""
    return markdown_table(
        ["", "measured", "to reach"],
        [
            [each.name, f"{each.measured:.4g}", "" if each.aim is None else f"{each.aim:g}"]
            for each in measured
        ],
    )


if __name__ == "__main__":
    typer.run(main)
