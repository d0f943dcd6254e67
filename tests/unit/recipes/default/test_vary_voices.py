"""A copy says the same in another voice: its pitch, formants and pace are those that were drawn."""

import json
import random
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import pyworld
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from model.data.manifest import read_manifest

RATE_HZ = 16_000
PITCH_HZ = 140.0
FORMANT_HZ = 1500.0


def vowel(seconds: float = 1.0) -> np.ndarray:
    """A buzz whose loudest partials lie at one formant."""
    time_s = np.arange(int(RATE_HZ * seconds)) / RATE_HZ
    pitch_hz = PITCH_HZ * (1 + 0.05 * np.sin(2 * np.pi * 2 * time_s))
    phase = 2 * np.pi * np.cumsum(pitch_hz) / RATE_HZ
    wave = np.zeros_like(time_s)
    for partial in range(1, 50):
        distance = (partial * PITCH_HZ - FORMANT_HZ) / 250
        wave += (0.02 + np.exp(-(distance**2))) * np.sin(partial * phase)
    return (0.1 * wave).astype(np.float32)


def median_pitch_hz(waveform: np.ndarray) -> float:
    pitch_hz, _ = pyworld.harvest(waveform.astype(np.float64), RATE_HZ, f0_floor=60.0)
    return float(np.median(pitch_hz[pitch_hz > 0]))


def loudest_hz(waveform: np.ndarray) -> float:
    # Short windows, so that partials run together and the envelope is seen.
    frames = np.lib.stride_tricks.sliding_window_view(waveform, 128)[::64] * np.hanning(128)
    power = (np.abs(np.fft.rfft(frames)) ** 2).mean(axis=0)
    return float((3 + power[3:].argmax()) * RATE_HZ / 128)


@pytest.mark.parametrize("pitch_hz", [90.0, 140.0, 250.0])
def test_a_voice_has_the_pitch_and_formants_that_were_drawn(
    vary_voices: ModuleType, pitch_hz: float
) -> None:
    voice = vary_voices.NewVoice(pitch_hz, formant_jitter=1.0, intonation=1.0, pace=1.0)
    changed = vary_voices.change_voice(vowel(), voice)
    assert median_pitch_hz(changed) == pytest.approx(pitch_hz, rel=0.05)
    expected_hz = FORMANT_HZ * (pitch_hz / PITCH_HZ) ** 0.27
    assert loudest_hz(changed) == pytest.approx(expected_hz, abs=130)


def test_intonation_is_livelier_or_flatter(vary_voices: ModuleType) -> None:
    spreads = []
    for intonation in (0.5, 1.5):
        voice = vary_voices.NewVoice(PITCH_HZ, 1.0, intonation, pace=1.0)
        changed = vary_voices.change_voice(vowel(2.0), voice).astype(np.float64)
        pitch_hz, _ = pyworld.harvest(changed, RATE_HZ)
        spreads.append(np.log2(pitch_hz[pitch_hz > 0][40:-40]).std())
    assert spreads[1] > 2 * spreads[0]


@given(seed=st.integers(0, 10**6), kind=st.sampled_from(["vowel", "noise", "silence"]))
def test_whatever_was_recorded_the_copy_is_audio_of_the_length_drawn(
    vary_voices: ModuleType, seed: int, kind: str
) -> None:
    noise = 0.1 * np.random.default_rng(seed).standard_normal(6400).astype(np.float32)
    waveform = {"vowel": vowel(0.4), "noise": noise, "silence": np.zeros(6400, np.float32)}[kind]
    voice = vary_voices.draw_voice(random.Random(seed))  # noqa: S311 - a test
    changed = vary_voices.change_voice(waveform, voice)
    assert changed.dtype == np.float32
    assert np.isfinite(changed).all()
    assert np.abs(changed).max() <= 0.5 + 1e-6
    assert len(changed) == pytest.approx(len(waveform) / voice.pace, abs=0.02 * RATE_HZ)


def run(vary_voices: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["vary_voices.py", *map(str, arguments)])
    vary_voices.main()


def test_copies_keep_what_was_said_and_are_made_once(
    vary_voices: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    for name in ("a", "b"):
        soundfile.write(tmp_path / f"{name}.wav", vowel(), RATE_HZ)
        audio = str(tmp_path / f"{name}.wav")
        rows.append({"audio": audio, "text": name, "speaker": "s", "language": "en"})
    manifest = tmp_path / "in.jsonl"
    manifest.write_text("".join(json.dumps({**row, "duration": 1.0}) + "\n" for row in rows))
    arguments = (
        "--manifest", manifest, "--audio-dir", tmp_path / "copies", "--output",
        tmp_path / "out.jsonl", "--copies", 2, "--jobs", 1,
    )  # fmt: skip
    run(vary_voices, monkeypatch, *arguments)
    made = read_manifest(tmp_path / "out.jsonl")
    assert [each.text for each in made] == ["a", "a", "b", "b"]
    assert len({each.audio for each in made}) == 4
    assert len({each.speaker for each in made}) == 4
    for each in made:
        assert each.duration == pytest.approx(soundfile.info(each.audio).duration)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "copies").iterdir()}
    assert len(times) == 4
    first = (tmp_path / "out.jsonl").read_text()
    run(vary_voices, monkeypatch, *arguments)
    assert (tmp_path / "out.jsonl").read_text() == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "copies").iterdir()} == times
