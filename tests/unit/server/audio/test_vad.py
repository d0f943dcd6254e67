import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from server.audio.vad import FRAME_SAMPLES, SpeechDetector
from tests.recordings import speechlike, tone


def probabilities(waveform, block_frames=10_000):
    whole = len(waveform) - len(waveform) % FRAME_SAMPLES
    frames = waveform[:whole].reshape(-1, FRAME_SAMPLES)
    detector = SpeechDetector()
    starts = range(0, len(frames), block_frames)
    return np.concatenate([detector.push(frames[at : at + block_frames]) for at in starts])


def test_no_frames_give_no_probabilities():
    assert SpeechDetector().push(np.zeros((0, FRAME_SAMPLES), np.float32)).shape == (0,)


def test_blocks_give_what_the_whole_gives():
    waveform = speechlike(3.0)
    np.testing.assert_allclose(
        probabilities(waveform, 7), probabilities(waveform), rtol=0, atol=1e-5
    )


def test_noise_and_tones_are_no_speech():
    noise = np.random.default_rng(0).normal(0, 0.2, 48_000).astype(np.float32)
    assert probabilities(noise).max() < 0.2
    assert probabilities(tone(3.0)).max() < 0.2
    assert probabilities(np.zeros(48_000, np.float32)).max() < 0.2


def test_nothing_is_noted_of_the_user(tmp_path):
    # onnxruntime collects what it has run in the home folder, and sends it away.
    turns_it_off = ("CI", "ORT_")
    kept = {name: each for name, each in os.environ.items() if not name.startswith(turns_it_off)}
    subprocess.run(
        [sys.executable, "-c", "from server.audio.vad import SpeechDetector; SpeechDetector()"],
        env={**kept, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")},
        check=True,
    )
    assert list(tmp_path.rglob("*")) == []


def test_recorded_speech_is_speech(shared_data):
    waveform, _ = soundfile.read(shared_data / "audio/jfk/jfk.flac", dtype="float32")
    assert (probabilities(waveform) > 0.5).mean() > 0.6


@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated:DeprecationWarning")
def test_it_is_what_the_packages_own_model_says(shared_data):
    import silero_vad
    import torch

    model = torch.jit.load(Path(silero_vad.__file__).parent / "data" / "silero_vad.jit")
    waveform, _ = soundfile.read(shared_data / "audio/jfk/jfk.flac", dtype="float32")
    frames = torch.tensor(waveform[: FRAME_SAMPLES * 100].reshape(-1, FRAME_SAMPLES))
    with torch.inference_mode():
        for _ in range(8):  # out of silence
            model(torch.zeros(1, FRAME_SAMPLES), 16_000)
        expected = [float(model(frame[None], 16_000)) for frame in frames]
    assert probabilities(waveform)[:100] == pytest.approx(expected, abs=1e-4)
