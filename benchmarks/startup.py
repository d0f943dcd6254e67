"""What it takes until the server is ready, and how much memory, over what nobody can save.

    python -m benchmarks.startup --shapes default,0.5b

Time: from starting the process until `/health/ready` says so, with and without what a process takes
that only imports the same modules, over reading the weights' files. Files are dropped from the page
cache before each start and each reading, where the file system lets that happen. The server does
other things while it imports, so that with a small checkpoint the difference can be below zero: it
then says no more than that the imports are all.

Memory: the server process's peak over clips on all its slots, less the importing process's, over
weights and KV slots. Linux only.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import httpx
import torch
import typer
from matplotlib.figure import Figure

from benchmarks.load import Measurement, make_clips, run_clients
from benchmarks.report import markdown_table, write_report
from benchmarks.servers import ROOT, our_server
from benchmarks.shapes import Shape, make_checkpoint
from model.transcription import pick_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

MIB = 1 << 20
SLOTS = 32
CLIP_S = 8.0
IMPORTS = "import server.cli.serve, server.app, server.engine.runner"
HEADINGS = (
    "", "weights MiB", "read s", "imports s", "ready s", "ready / read",
    "ready without imports / read", "KV MiB", "peak MiB", "imports MiB",
    "peak without imports / weights and KV",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Startup:
    """Of one checkpoint; medians over rounds, and the largest peak.

    Attributes:
        shape: which.
        weights_bytes: its safetensors files, stored as they are served.
        read_s: reading them.
        imports_s: a process that imports what the server does.
        imports_bytes: its peak resident memory.
        ready_s: from starting the server until it is ready.
        kv_bytes: of all slots.
        peak_bytes: peak resident memory of the server process.
    """

    shape: Shape
    weights_bytes: int
    read_s: float
    imports_s: float
    imports_bytes: int
    ready_s: float
    kv_bytes: int
    peak_bytes: int

    @property
    def time_ratio(self) -> float:
        """Until ready without imports, over reading the weights."""
        return (self.ready_s - self.imports_s) / self.read_s

    @property
    def memory_ratio(self) -> float:
        """Peak without imports, over weights and KV slots."""
        return (self.peak_bytes - self.imports_bytes) / (self.weights_bytes + self.kv_bytes)


def read_files(files: Sequence[Path]) -> float:
    """Seconds that reading some files takes."""
    buffer = bytearray(16 * MIB)
    started_s = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started_s


def drop_from_page_cache(files: Sequence[Path]) -> None:
    """Have the next reading of some files come from their disk."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # a page that is not written yet stays
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak_bytes(process_id: int | str) -> int:
    """Peak resident memory of a process that lives, or of this one (`self`)."""
    return _peak_bytes(Path(f"/proc/{process_id}/status").read_text())


def _peak_bytes(status: str) -> int:
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    if found is None:
        raise RuntimeError("the kernel does not tell the process's memory")
    return 1024 * int(found[1])


def run_imports() -> tuple[float, int]:
    """Seconds and peak memory of a process that imports what the server does."""
    code = f"{IMPORTS}\nprint(open('/proc/self/status').read())"  # imports nothing else
    started_s = time.perf_counter()
    answer = subprocess.run(  # noqa: S603 - our own code
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True, text=True
    )
    return time.perf_counter() - started_s, _peak_bytes(answer.stdout)


def kv_bytes(url: str) -> int:
    """Memory of the KV slots, as the server tells."""
    metrics = httpx.get(f"{url}/metrics").raise_for_status().text
    found = re.search(r"^speechllm_kv_cache_bytes (\S+)$", metrics, re.MULTILINE)
    if found is None:
        raise RuntimeError("the server does not tell the size of its KV slots")
    return int(float(found[1]))


def measure(shape: Shape, model: Path, dtype: str, threads: int, rounds: int) -> Startup:
    """Start the server several times."""
    files = sorted(model.rglob("*.safetensors"))
    clips = make_clips([], SLOTS, shortest_s=CLIP_S, longest_s=CLIP_S)
    read_s, ready_s, peaks, kv = [], [], [], 0
    imported = [run_imports() for _ in range(rounds)]
    for _ in range(rounds):
        drop_from_page_cache(files)
        read_s.append(read_files(files))
        drop_from_page_cache(files)
        with our_server(model, "cpu", dtype, threads, max_batch_size=SLOTS) as server:
            ready_s.append(server.ready_s)
            run_clients(server.url, clips, SLOTS, Measurement("memory"))
            kv = kv_bytes(server.url)
            peaks.append(peak_bytes(server.process_id))
    return Startup(
        shape,
        weights_bytes=sum(path.stat().st_size for path in files),
        read_s=statistics.median(read_s),
        imports_s=statistics.median(seconds for seconds, _ in imported),
        imports_bytes=max(memory for _, memory in imported),
        ready_s=statistics.median(ready_s),
        kv_bytes=kv,
        peak_bytes=max(peaks),
    )


def tabulate(measured: Sequence[Startup]) -> str:
    """One row a checkpoint."""
    rows = [
        [
            each.shape,
            f"{each.weights_bytes / MIB:.0f}",
            f"{each.read_s:.3f}",
            f"{each.imports_s:.2f}",
            f"{each.ready_s:.2f}",
            f"{each.ready_s / each.read_s:.1f}",
            f"{each.time_ratio:.1f}",
            f"{each.kv_bytes / MIB:.0f}",
            f"{each.peak_bytes / MIB:.0f}",
            f"{each.imports_bytes / MIB:.0f}",
            f"{each.memory_ratio:.2f}",
        ]
        for each in measured
    ]
    return markdown_table(HEADINGS, rows)


def plot(measured: Sequence[Startup]) -> Figure:
    """What the time until ready is made of, one bar a checkpoint."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    shapes = [each.shape for each in measured]
    imports = [each.imports_s for each in measured]
    read = [each.read_s for each in measured]
    rest = [each.ready_s - each.imports_s - each.read_s for each in measured]
    axes.barh(shapes, imports, label="imports")
    axes.barh(shapes, read, left=imports, label="reading the weights")
    both = [sum(pair) for pair in zip(imports, read, strict=True)]
    axes.barh(shapes, rest, left=both, label="the rest")
    axes.set(xlabel="seconds until ready")
    axes.legend()
    return figure


def main(
    shapes: Annotated[str, typer.Option(help="default, small, 0.5b.")] = "default,0.5b",
    dtype: Annotated[str, typer.Option(help="Of the random shapes.")] = "bf16",
    threads: Annotated[int, typer.Option(min=0, help="0: all cores.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, max=20)] = 3,
    output: Annotated[Path, typer.Option(help="Without suffix.")] = Path(
        "benchmarks/results/startup"
    ),
) -> None:
    """Measure time and memory until the server is ready."""
    measured = []
    for shape in shapes.split(","):
        if shape not in get_args(Shape):
            sys.exit(f"error: unknown shape {shape}; there are {get_args(Shape)}")
        known = cast("Shape", shape)
        served = "fp32" if shape == "default" else dtype
        with tempfile.TemporaryDirectory() as folder:
            stored = pick_dtype(served, torch.device("cpu"))
            model = make_checkpoint(known, Path(folder), tokens_per_audio_s=3, dtype=stored)
            measured.append(measure(known, model, served, threads, rounds))
        print(tabulate(measured), flush=True)  # noqa: T201 - the command's answer
    data: dict[str, object] = {
        "rounds": rounds,
        "checkpoints": [asdict(each) for each in measured],
    }
    write_report(output, data, f"## Startup\n\n{tabulate(measured)}", plot(measured))


if __name__ == "__main__":
    typer.run(main)
