"""The server hears what training heard: both packages' decoders give the same waveform."""

import json

import numpy as np
import pytest

from model.data.audio import load_audio
from server.audio.decode import decode
from server.audio.limits import AudioLimits
from tests.recordings import FORMATS, encode, tone

LIMITS = AudioLimits(max_audio_s=3600.0)


def assert_same_audio(served, trained):
    # Decoders of a lossy format may differ in the padding at the end.
    assert abs(len(served) - len(trained)) <= 0.02 * 16_000
    length = min(len(served), len(trained)) - 800
    difference = np.linalg.norm(served[:length] - trained[:length])
    assert difference <= 0.01 * np.linalg.norm(trained[:length])


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_sounds_as_in_training(form, tmp_path):
    path = tmp_path / f"recording.{form}"
    path.write_bytes(encode(tone(1.0, 48_000, channels=2), 48_000, form))
    assert_same_audio(decode(path.read_bytes(), LIMITS).waveform, load_audio(path))


def test_real_recordings_sound_as_in_training(shared_data):
    compared = set()
    for manifest in sorted((shared_data / "manifests").glob("*.jsonl")):
        with manifest.open(encoding="utf-8") as lines:
            path = shared_data / json.loads(next(lines))["audio"]
        assert_same_audio(decode(path.read_bytes(), LIMITS).waveform, load_audio(path))
        compared.add(path.suffix)
    assert compared
