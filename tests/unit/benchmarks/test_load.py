"""The load test's arithmetic and its sources of clips."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from benchmarks.load import Measurement, read_clips, to_wav


def test_rtfx_is_audio_over_wall_time() -> None:
    assert Measurement("loop", audio_s=30.0, wall_s=2.0).rtfx == 15.0
    assert Measurement("nothing").rtfx == 0.0


def test_percentiles_are_in_milliseconds() -> None:
    measurement = Measurement("server", latencies_s=[number / 1000 for number in range(101)])
    assert measurement.percentile_ms(50) == pytest.approx(50)
    assert measurement.percentile_ms(99) == pytest.approx(99)
    assert Measurement("one", latencies_s=[0.25]).percentile_ms(95) == 250


def test_clips_come_from_the_manifest_up_to_the_count(tmp_path: Path) -> None:
    rows = []
    for number in range(3):
        soundfile.write(tmp_path / f"{number}.wav", np.full(1600, 0.1), 16_000)
        rows.append({"audio": f"{number}.wav", "text": "a", "duration": 0.1})
    manifest = tmp_path / "clips.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    clips = read_clips(manifest, None, 2)
    assert [clip.size for clip in clips] == [1600, 1600]


def test_a_posted_clip_is_16_bit_wav(tmp_path: Path) -> None:
    path = tmp_path / "clip.wav"
    path.write_bytes(to_wav(np.linspace(-0.5, 0.5, 800, dtype=np.float32)))
    info = soundfile.info(path)
    assert (info.samplerate, info.frames, info.subtype) == (16_000, 800, "PCM_16")
