"""Load test: concurrent clients over real sockets against a sequential `generate` loop.

Both run in turns on the same clips, one round after another, so that the machine's drift hits
both. RTFx is audio seconds transcribed in a second of wall time.

    python -m benchmarks.load --model weights/default --concurrency 1,4,16
"""

from __future__ import annotations

import io
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import httpx
import soundfile
import torch
import typer
from rich.console import Console
from rich.table import Table

from model.data.audio import load_audio
from model.data.manifest import read_manifest
from model.transcription import Transcriber

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

ROOT = Path(__file__).resolve().parent.parent
READY_TIMEOUT_S = 120.0
REQUEST_TIMEOUT_S = 300.0
SAMPLE_RATE_HZ = 16_000
SENTENCES = (
    "The load test speaks when there is no recording at hand.",
    "A short one.",
    "Clients post their clips at the same time and wait for the words that come back.",
)


@dataclass(slots=True)
class Measurement:
    """One way of transcribing the clips, over all rounds."""

    name: str
    audio_s: float = 0.0
    wall_s: float = 0.0
    errors: int = 0
    latencies_s: list[float] = field(default_factory=list)

    @property
    def rtfx(self) -> float:
        """Audio seconds in a second."""
        return self.audio_s / self.wall_s if self.wall_s else 0.0

    def percentile_ms(self, percent: int) -> float:
        """Latency that `percent` of the requests stay below, milliseconds."""
        if len(self.latencies_s) < 2:  # noqa: PLR2004 - nothing to divide
            return 1000 * sum(self.latencies_s)
        cuts = statistics.quantiles(self.latencies_s, n=100, method="inclusive")
        return 1000 * cuts[percent - 1]


def read_clips(manifest: Path | None, audio_root: Path | None, count: int) -> list[np.ndarray]:
    """Clips of a manifest, of the shared recordings, or spoken by espeak-ng, in this order."""
    if manifest is None:
        shared = Path(os.environ.get("SPEECHLLM_SHARED_DATA", ROOT.parent / "shared" / "data"))
        if (shared / "manifests" / "kathleen_test.jsonl").exists():
            manifest, audio_root = shared / "manifests" / "kathleen_test.jsonl", shared
    if manifest is not None:
        utterances = read_manifest(manifest, audio_root)[:count]
        return [load_audio(utterance.audio) for utterance in utterances]
    if shutil.which("espeak-ng") is None:
        sys.exit("error: no recordings: give --manifest, or install espeak-ng to have some spoken")
    return [
        _speak(SENTENCES[number % len(SENTENCES)], 130 + number % 60) for number in range(count)
    ]


def _speak(text: str, words_per_minute: int) -> np.ndarray:
    command = ["espeak-ng", "-s", str(words_per_minute), "--stdout", text]
    wav = subprocess.run(command, check=True, capture_output=True).stdout  # noqa: S603
    path = io.BytesIO(wav)
    waveform, rate_hz = soundfile.read(path, dtype="float32")
    import soxr  # noqa: PLC0415 - only where nothing is recorded

    resampled: np.ndarray = soxr.resample(waveform, rate_hz, SAMPLE_RATE_HZ)
    return resampled


@contextmanager
def server(model: str, device: str) -> Iterator[str]:
    """Start `speechllm serve` on a free port; yield its URL once it is ready; end it."""
    command = [sys.executable, "-m", "server.cli", "serve", "--model", model, "--device", device]
    process = subprocess.Popen(  # noqa: S603 - our own command line
        [*command, "--port", "0", "--log-level", "warning"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None  # noqa: S101 - a pipe was asked for
        url = process.stdout.readline().partition(" at ")[2].split(" ")[0]
        _wait_until_ready(process, url)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_until_ready(process: subprocess.Popen[str], url: str) -> None:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            sys.exit("error: the server ended before it was ready")
        try:
            if httpx.get(f"{url}/health/ready", timeout=5).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    sys.exit(f"error: the server was not ready within {READY_TIMEOUT_S:g} s")


def run_clients(
    url: str, clips: list[tuple[float, bytes]], concurrency: int, measurement: Measurement
) -> None:
    """Post every clip once from `concurrency` clients, each with a connection of its own."""
    local = threading.local()

    def post(clip: tuple[float, bytes]) -> float | None:
        if not hasattr(local, "client"):
            local.client = httpx.Client(base_url=url, timeout=REQUEST_TIMEOUT_S)
        started = time.perf_counter()
        try:
            answer = local.client.post("/transcribe", files={"file": ("clip.wav", clip[1])})
        except httpx.TransportError:
            return None
        return time.perf_counter() - started if answer.status_code == httpx.codes.OK else None

    with ThreadPoolExecutor(concurrency) as pool:
        started = time.perf_counter()
        latencies = list(pool.map(post, clips))
        measurement.wall_s += time.perf_counter() - started
    for latency, (seconds, _) in zip(latencies, clips, strict=True):
        if latency is None:
            measurement.errors += 1
        else:
            measurement.latencies_s.append(latency)
            measurement.audio_s += seconds


def run_loop(transcriber: Transcriber, clips: list[np.ndarray], measurement: Measurement) -> None:
    """Transcribe one clip after another."""
    for clip in clips:
        started = time.perf_counter()
        transcriber.transcribe([clip])
        latency = time.perf_counter() - started
        measurement.latencies_s.append(latency)
        measurement.wall_s += latency
        measurement.audio_s += clip.size / SAMPLE_RATE_HZ


def to_wav(waveform: np.ndarray) -> bytes:
    """16-bit WAV."""
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, SAMPLE_RATE_HZ, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def describe_machine() -> dict[str, object]:
    """What the figures depend on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def print_table(measurements: list[Measurement]) -> None:
    """Print every way against the first."""
    table = Table(title="Load test")
    for heading in ("", "RTFx", "x loop", "p50 ms", "p95 ms", "p99 ms", "errors"):
        table.add_column(heading, justify="right" if heading else "left")
    for measurement in measurements:
        table.add_row(
            measurement.name,
            f"{measurement.rtfx:.1f}",
            f"{measurement.rtfx / measurements[0].rtfx:.2f}",
            *(f"{measurement.percentile_ms(percent):.0f}" for percent in (50, 95, 99)),
            str(measurement.errors),
        )
    Console(width=100).print(table)


def main(
    model: Annotated[str, typer.Option(help="Checkpoint.")] = "weights/default",
    manifest: Annotated[Path | None, typer.Option(help="Clips to post.")] = None,
    audio_root: Annotated[Path | None, typer.Option()] = None,
    clips: Annotated[int, typer.Option(min=1, max=2000)] = 48,
    rounds: Annotated[int, typer.Option(min=1, max=20)] = 3,
    concurrency: Annotated[str, typer.Option(help="Numbers of clients.")] = "1,4,16",
    device: Annotated[str, typer.Option()] = "auto",
    output: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
) -> None:
    """Compare the server under load with a sequential generate loop."""
    waveforms = read_clips(manifest, audio_root, clips)
    posted = [(waveform.size / SAMPLE_RATE_HZ, to_wav(waveform)) for waveform in waveforms]
    transcriber = Transcriber.from_pretrained(model, device=device)
    loop = Measurement("sequential generate")
    servers = [(int(n), Measurement(f"server, {n} clients")) for n in concurrency.split(",")]
    with server(model, device) as url:
        run_loop(transcriber, waveforms[:2], Measurement("warm-up"))
        run_clients(url, posted[:2], 1, Measurement("warm-up"))
        for _ in range(rounds):
            run_loop(transcriber, waveforms, loop)
            for n_clients, measurement in servers:
                run_clients(url, posted, n_clients, measurement)
    measurements = [loop, *(measurement for _, measurement in servers)]
    print_table(measurements)
    if output is not None:
        report = {
            "machine": describe_machine(),
            "model": model,
            "clips": len(waveforms),
            "rounds": rounds,
            "audio_s": sum(seconds for seconds, _ in posted),
            "measurements": [{**asdict(m), "rtfx": m.rtfx} for m in measurements],
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=2) + "\n")
    if any(measurement.errors for measurement in measurements):
        sys.exit("error: some requests failed")


if __name__ == "__main__":
    typer.run(main)
