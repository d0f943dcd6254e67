"""The load's arithmetic, its clips, and its clients against a real server."""

import json
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import uvicorn
from fastapi import FastAPI, HTTPException, UploadFile

from benchmarks.load import (
    HEALTH_INTERVAL_S,
    REQUEST_TIMEOUT_S,
    ClientProcesses,
    Clip,
    Measurement,
    make_clips,
    read_recordings,
    run_clients,
    to_wav,
    watch_health,
)


def test_rtfx_is_audio_over_wall_time() -> None:
    assert Measurement("loop", audio_s=30.0, wall_s=2.0).rtfx == 15.0
    assert Measurement("nothing").rtfx == 0.0


def test_percentiles_are_in_milliseconds() -> None:
    measurement = Measurement("server", latencies_s=[number / 1000 for number in range(101)])
    assert measurement.percentile_ms(50) == pytest.approx(50)
    assert measurement.percentile_ms(99) == pytest.approx(99)
    assert Measurement("one", latencies_s=[0.25]).percentile_ms(95) == 250


def test_recordings_come_from_the_manifest(tmp_path: Path) -> None:
    rows = []
    for number in range(3):
        soundfile.write(tmp_path / f"{number}.wav", np.full(1600, 0.1), 16_000)
        rows.append({"audio": f"{number}.wav", "text": "a", "duration": 0.1})
    manifest = tmp_path / "clips.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [recording.size for recording in read_recordings(manifest, None)] == [1600] * 3


@pytest.mark.parametrize("recordings", [[], [np.full(1600, 0.1, np.float32)]])
def test_clips_have_the_lengths_that_are_asked_for_and_are_always_the_same(recordings) -> None:
    clips, again = (make_clips(recordings, 5, shortest_s=1.0, longest_s=3.0) for _ in range(2))
    assert sorted(clip.audio_s for clip in clips) == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert [clip.wav for clip in clips] == [clip.wav for clip in again]
    assert all(np.abs(clip.waveform).max() > 0.05 for clip in clips)
    assert {clip.is_speech for clip in clips} == {bool(recordings)}


def test_a_posted_clip_is_16_bit_wav(tmp_path: Path) -> None:
    path = tmp_path / "clip.wav"
    path.write_bytes(to_wav(np.linspace(-0.5, 0.5, 800, dtype=np.float32)))
    info = soundfile.info(path)
    assert (info.samplerate, info.frames, info.subtype) == (16_000, 800, "PCM_16")


@pytest.fixture
def url():
    """A server that takes every clip but the shortest."""
    app = FastAPI()

    @app.get("/health/live")
    def live() -> str:
        return "live"

    @app.post("/transcribe")
    def transcribe(file: UploadFile) -> str:
        if len(file.file.read()) < 4_000:
            raise HTTPException(422)
        return "text"

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def test_clients_in_several_processes_post_every_clip_once(url: str) -> None:
    clips = [Clip(np.zeros(size, np.float32), to_wav(np.zeros(size))) for size in (800, 8000, 9600)]
    with ClientProcesses(2) as processes:
        for concurrency in (2, 1, 3):  # the same ones again, and one of them alone
            measurement = Measurement("server")
            processes.run(url, clips, concurrency, measurement)
            assert (measurement.errors, len(measurement.latencies_s)) == (1, 2)
            assert measurement.audio_s == pytest.approx(1.1)
            assert measurement.wall_s > 0


def test_clients_post_every_clip_once_and_count_what_fails(url: str) -> None:
    clips = [Clip(np.zeros(size, np.float32), to_wav(np.zeros(size))) for size in (800, 8000, 9600)]
    measurement = Measurement("server")
    health_s: list[float] = []
    with watch_health(url, health_s):
        run_clients(url, clips, 2, measurement)
        time.sleep(3 * HEALTH_INTERVAL_S)
    assert (measurement.errors, len(measurement.latencies_s)) == (1, 2)
    assert measurement.audio_s == pytest.approx(1.1)
    assert measurement.wall_s > 0
    assert health_s
    assert max(health_s) < REQUEST_TIMEOUT_S
