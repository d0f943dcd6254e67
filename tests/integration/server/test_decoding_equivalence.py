"""The server hears what training heard: both packages' decoders give the same waveform."""

import json

import numpy as np
import pytest

from model.data.audio import load_audio
from server.audio.decode import decode
from server.audio.limits import AudioLimits
from tests.recordings import FORMATS, encode, tone

LIMITS = AudioLimits(max_audio_s=3600.0)


# Of a stereo or 48 kHz Opus, libsndfile keeps the 312 samples before the start that FFmpeg skips.
OPUS_PRE_SKIP = 104
# Above, the filters of two resamplers differ: libopus itself decodes to the original's rate.
COMPARED_BELOW_HZ = 6_000


def assert_same_audio(served, trained):
    # Decoders of a lossy format may differ in the padding at the end.
    assert abs(len(served) - len(trained)) <= 0.02 * 16_000
    length = min(len(served), len(trained)) - 800
    distances = [
        distance(served[:length], trained[shift : length + shift]) for shift in (0, OPUS_PRE_SKIP)
    ]
    assert min(distances) <= 0.01


def distance(waveform, reference):
    """Root-mean-square difference in the compared band, relative to the reference's loudness."""
    band = np.fft.rfftfreq(len(reference), 1 / 16_000) < COMPARED_BELOW_HZ
    expected = np.fft.rfft(reference)[band]
    return np.linalg.norm(np.fft.rfft(waveform)[band] - expected) / np.linalg.norm(expected)


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
