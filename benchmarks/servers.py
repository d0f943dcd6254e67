"""Processes of the servers that are compared, and the first thing that people build.

    python -m benchmarks.servers --model weights/default --port 8001

This command is FastAPI over `generate`, one upload after another. The other peer is
`benchmarks.litserve_server`.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import httpx
import soundfile
import typer
import uvicorn
from fastapi import FastAPI, UploadFile

from model.transcription import Transcriber
from server.engine.runner import use_cpu_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ROOT = Path(__file__).resolve().parent.parent
READY_TIMEOUT_S = 600.0
READY_INTERVAL_S = 0.05
END_TIMEOUT_S = 60.0

Peer = Literal["sequential generate", "LitServe"]

_PEERS: dict[Peer, tuple[str, str]] = {
    "sequential generate": ("benchmarks.servers", "/health/live"),
    "LitServe": ("benchmarks.litserve_server", "/health"),
}
"""Modules, and paths that answer once they are ready."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server process that is ready.

    Attributes:
        url: where it listens.
        process_id: of its first process.
        ready_s: how long that took, from starting the process.
    """

    url: str
    process_id: int
    ready_s: float


@contextlib.contextmanager
def plain_server(model: Path, device: str, options: Sequence[str]) -> Iterator[Server]:
    """Run `speechllm serve` as it comes, but for `options`; yield once it is ready."""
    port = _free_port()
    command = ["-m", "server.cli", "serve", "--model", str(model), "--device", device]
    command += ["--port", str(port), "--log-level", "warning", *options]
    with _process(command, port, "/health/ready") as server:
        yield server


@contextlib.contextmanager
def our_server(
    model: Path,
    device: str,
    dtype: str,
    threads: int,
    *,
    max_batch_size: int = 32,
    options: Sequence[str] = (),
) -> Iterator[Server]:
    """Run `speechllm serve`; yield it once it is ready."""
    port = _free_port()
    command = ["-m", "server.cli", "serve", "--model", str(model), "--device", device]
    command += ["--dtype", dtype, "--port", str(port), "--log-level", "warning"]
    command += ["--cpu-threads", str(threads), "--max-batch-size", str(max_batch_size)]
    command += ["--num-beams", "1"]  # as the peers search
    # As many clients as there are slots may wait besides.
    command += ["--max-queue-size", str(max(128, 2 * max_batch_size))]
    command += ["--max-queue-audio-s", str(max(1800, 60 * max_batch_size))]
    command += ["--max-uploads", str(max(128, 2 * max_batch_size))]
    # Random weights repeat themselves, and must not be cut for it.
    command += ["--no-loop-guard", *options]
    with _process(command, port, "/health/ready") as server:
        yield server


@contextlib.contextmanager
def peer_server(peer: Peer, model: Path, device: str, dtype: str, threads: int) -> Iterator[Server]:
    """Run another server; yield it once it is ready."""
    port = _free_port()
    module, path = _PEERS[peer]
    command = ["-m", module, "--model", str(model), "--device", device, "--dtype", dtype]
    with _process([*command, "--port", str(port), "--threads", str(threads)], port, path) as server:
        yield server


def missing(peer: Peer) -> str | None:
    """Why a server cannot run here; None if it can."""
    if peer == "LitServe" and find_spec("litserve") is None:
        return "LitServe is not installed: pip install -c constraints.txt -e '.[bench]'"
    return None


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextlib.contextmanager
def _process(arguments: Sequence[str], port: int, ready_path: str) -> Iterator[Server]:
    url = f"http://127.0.0.1:{port}"
    started_s = time.monotonic()
    process = subprocess.Popen(  # noqa: S603 - our own command lines
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        _wait_until_ready(process, url + ready_path)
        yield Server(url, process.pid, time.monotonic() - started_s)
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_TIMEOUT_S)
        # LitServe leaves its workers behind.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    with httpx.Client(timeout=5) as client:  # to make one anew each time would cost the server
        while time.monotonic() < deadline_s:
            if process.poll() is not None:
                sys.exit(f"error: the server of {url} ended before it was ready")
            with contextlib.suppress(httpx.TransportError):
                if client.get(url).status_code == httpx.codes.OK:
                    return
            time.sleep(READY_INTERVAL_S)
    sys.exit(f"error: {url} was not ready within {READY_TIMEOUT_S:g} s")


def sequential_app(load: Callable[[], Transcriber], threads: int = 0) -> FastAPI:
    """Make an app that transcribes one upload at a time, off the event loop.

    Args:
        load: called once, in the thread that computes.
        threads: that torch computes with; 0 takes all cores.
    """
    app = FastAPI()
    # One thread for all of torch's work, loading included; see `use_cpu_threads`.
    device_thread = ThreadPoolExecutor(1, initializer=use_cpu_threads, initargs=(threads,))
    transcriber = device_thread.submit(load).result()

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    def generate(upload: bytes) -> str:
        waveform, _ = soundfile.read(io.BytesIO(upload), dtype="float32")
        return transcriber.transcribe([waveform]).transcripts[0].text

    @app.post("/transcribe")
    async def transcribe(file: UploadFile) -> dict[str, str]:
        loop = asyncio.get_running_loop()
        text = await loop.run_in_executor(device_thread, generate, await file.read())
        return {"text": text}

    return app


def main(
    model: Annotated[Path, typer.Option()],
    port: Annotated[int, typer.Option()],
    device: Annotated[str, typer.Option()] = "auto",
    dtype: Annotated[str, typer.Option()] = "auto",
    threads: Annotated[int, typer.Option(help="0: all cores.")] = 0,
) -> None:
    """Serve one upload after another."""
    app = sequential_app(partial(Transcriber.from_pretrained, model, device, dtype), threads)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    typer.run(main)
