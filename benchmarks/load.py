"""Clips, and clients that post them to a server over real sockets while its health is watched.

RTFx is audio seconds transcribed in a second of wall time.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import statistics
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

import httpx
import numpy as np
import soundfile

from model.data.audio import load_audio
from model.data.manifest import read_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from multiprocessing.connection import Connection
    from multiprocessing.synchronize import Barrier

    from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
REQUEST_TIMEOUT_S = 600.0
SAMPLE_RATE_HZ = 16_000
RECORDINGS = 64
HEALTH_INTERVAL_S = 0.1  # often enough to notice, seldom enough to take no time from the server
NOISE_LEVEL = 0.1
SYLLABLES_HZ = 4.0


@dataclass(frozen=True, slots=True)
class Clip:
    """A clip as it is in memory, (N,) float32, and as it is posted.

    Noise is posted with `vad=false`: a server that leaves out what is no speech would have nothing
    to do.
    """

    waveform: NDArray[np.float32]
    wav: bytes
    is_speech: bool = True

    @property
    def audio_s(self) -> float:
        """Its length, seconds."""
        return len(self.waveform) / SAMPLE_RATE_HZ


@dataclass(slots=True)
class Measurement:
    """One way of transcribing the clips, over all rounds."""

    name: str
    audio_s: float = 0.0
    wall_s: float = 0.0
    errors: int = 0
    latencies_s: list[float] = field(default_factory=list)
    health_s: list[float] = field(default_factory=list)

    @property
    def rtfx(self) -> float:
        """Audio seconds in a second."""
        return self.audio_s / self.wall_s if self.wall_s else 0.0

    def percentile_ms(self, percent: int) -> float:
        """Latency that `percent` of the requests stay below, milliseconds."""
        return percentile_ms(self.latencies_s, percent)


def percentile_ms(seconds: Sequence[float], percent: int) -> float:
    """What `percent` of some durations stay below, milliseconds; 0 without any."""
    if len(seconds) < 2:  # noqa: PLR2004 - nothing to divide
        return 1000 * sum(seconds)
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return 1000 * cuts[percent - 1]


def read_recordings(manifest: Path | None, audio_root: Path | None) -> list[NDArray[np.float32]]:
    """Recordings of a manifest, or the shared ones; none where there are neither."""
    if manifest is None:
        shared = Path(os.environ.get("SPEECHLLM_SHARED_DATA", ROOT.parent / "shared" / "data"))
        manifest, audio_root = shared / "manifests" / "kathleen_test.jsonl", shared
        if not manifest.exists():
            return []
    return [load_audio(each.audio) for each in read_manifest(manifest, audio_root)[:RECORDINGS]]


def make_clips(
    recordings: Sequence[NDArray[np.float32]], count: int, *, shortest_s: float, longest_s: float
) -> list[Clip]:
    """Clips of evenly spread lengths in a random order, always the same.

    Args:
        recordings: joined until a clip is long enough; without any, noise that swells and fades
            as syllables do.
        count: of clips.
        shortest_s: length of the shortest, seconds.
        longest_s: of the longest.
    """
    rng = np.random.default_rng(0)
    lengths_s = rng.permutation(np.linspace(shortest_s, longest_s, count))
    clips = []
    for length_s in lengths_s:
        samples = round(length_s * SAMPLE_RATE_HZ)
        waveform = _speech(recordings, samples, rng) if recordings else _noise(samples, rng)
        clips.append(Clip(waveform, to_wav(waveform), is_speech=bool(recordings)))
    return clips


def _speech(
    recordings: Sequence[NDArray[np.float32]], samples: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    parts: list[NDArray[np.float32]] = []
    while sum(map(len, parts)) < samples:
        parts.append(recordings[int(rng.integers(len(recordings)))])
    return np.concatenate(parts)[:samples]


def _noise(samples: int, rng: np.random.Generator) -> NDArray[np.float32]:
    times_s = np.arange(samples) / SAMPLE_RATE_HZ
    swell = np.sin(np.pi * SYLLABLES_HZ * times_s) ** 2
    return (NOISE_LEVEL * swell * rng.normal(size=samples)).astype(np.float32)


def to_wav(waveform: NDArray[np.float32]) -> bytes:
    """16-bit WAV."""
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, SAMPLE_RATE_HZ, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def run_clients(
    url: str, clips: Sequence[Clip], concurrency: int, measurement: Measurement
) -> None:
    """Post every clip once from `concurrency` clients, each with a connection of its own."""
    local = threading.local()
    clients: list[httpx.Client] = []

    def post(clip: Clip) -> float | None:
        if not hasattr(local, "client"):
            # Certificates, which plain HTTP does not need, take a while to load.
            local.client = httpx.Client(base_url=url, timeout=REQUEST_TIMEOUT_S, verify=False)  # noqa: S501 - a server on this machine
            clients.append(local.client)
        fields = {} if clip.is_speech else {"vad": "false"}
        upload = {"file": ("clip.wav", clip.wav)}
        started = time.perf_counter()
        try:
            answer = local.client.post("/transcribe", files=upload, data=fields)
        except httpx.TransportError:
            return None
        return time.perf_counter() - started if answer.status_code == httpx.codes.OK else None

    with ThreadPoolExecutor(concurrency) as pool:
        started = time.perf_counter()
        latencies = list(pool.map(post, clips))
        measurement.wall_s += time.perf_counter() - started
    for client in clients:
        client.close()
    for latency, clip in zip(latencies, clips, strict=True):
        if latency is None:
            measurement.errors += 1
        else:
            measurement.latencies_s.append(latency)
            measurement.audio_s += clip.audio_s


class ClientProcesses:
    """Does as `run_clients`, from several processes: one cannot post some hundred clips a second.

    They start once, since it takes each of them seconds, and nobody waits for it meanwhile.
    """

    def __init__(self, processes: int) -> None:
        """Begin to start so many."""
        context = multiprocessing.get_context("spawn")
        self._processes = processes
        # One for each number of them that run together: their own can only be inherited.
        barriers = [context.Barrier(count) for count in range(1, processes + 1)]
        self._pool = ProcessPoolExecutor(
            processes, context, initializer=_inherit, initargs=(barriers,)
        )
        for _ in range(processes):
            self._pool.submit(_meet, processes)

    def run(
        self, url: str, clips: Sequence[Clip], concurrency: int, measurement: Measurement
    ) -> None:
        """Post every clip once from `concurrency` clients, spread over the processes."""
        processes = min(self._processes, concurrency)
        shares = [clips[number::processes] for number in range(processes)]
        each = -(-concurrency // processes)
        runs = list(
            self._pool.map(
                _run_share, [url] * processes, shares, [each] * processes, [processes] * processes
            )
        )
        began_s, ended_s = min(began for _, began, _ in runs), max(ended for *_, ended in runs)
        measurement.wall_s += ended_s - began_s
        for share, _, _ in runs:
            measurement.audio_s += share.audio_s
            measurement.errors += share.errors
            measurement.latencies_s += share.latencies_s

    def __enter__(self) -> Self:
        """Nothing more to do."""
        return self

    def __exit__(self, *_error: object) -> None:
        """End them."""
        self._pool.shutdown()


_barriers: list[Barrier] = []


def _inherit(barriers: list[Barrier]) -> None:
    _barriers[:] = barriers


def _meet(processes: int) -> None:
    """Wait until so many processes are here."""
    _barriers[processes - 1].wait()


def _run_share(
    url: str, clips: Sequence[Clip], concurrency: int, processes: int
) -> tuple[Measurement, float, float]:
    _meet(processes)
    share, began_s = Measurement("share"), time.monotonic()
    run_clients(url, clips, concurrency, share)
    return share, began_s, time.monotonic()


@contextmanager
def watch_health(url: str, durations_s: list[float]) -> Iterator[None]:
    """Ask `/health/live` again and again; note how long each answer takes.

    From a process of its own: beside the clients it would wait for them, not for the server.
    """
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe()
    process = context.Process(target=_watch, args=(url, its), daemon=True)
    process.start()
    ours.recv()  # it is connected
    try:
        yield
    finally:
        ours.send(None)
        durations_s += ours.recv()
        process.join()


def _watch(url: str, pipe: Connection) -> None:
    durations_s: list[float] = []
    with httpx.Client(base_url=url, timeout=REQUEST_TIMEOUT_S) as client:
        client.get("/health/live")
        pipe.send(None)
        while not pipe.poll(HEALTH_INTERVAL_S):
            started = time.perf_counter()
            try:
                client.get("/health/live").raise_for_status()
            except httpx.HTTPError:
                durations_s.append(REQUEST_TIMEOUT_S)
                break
            durations_s.append(time.perf_counter() - started)
    pipe.send(durations_s)
