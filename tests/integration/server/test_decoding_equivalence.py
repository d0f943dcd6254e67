"""The server hears what training heard: both packages' decoders give the same waveform."""

import json

import numpy as np
import pytest

from model.data.audio import load_audio
from server.audio.decode import decode
from server.audio.limits import AudioLimits
from tests.recordings import FORMATS, encode, tone

LIMITS = AudioLimits(max_audio_s=3600.0)


# Of Opus, libsndfile keeps the 312 samples at 48 kHz before the start that FFmpeg skips, and it
# decodes to the rate of the original, where FFmpeg decodes to 48 kHz and soxr resamples.
OPUS_PRE_SKIP = 104
OPUS_TOLERANCE = 0.03


def assert_same_audio(served, trained, tolerance=1e-3):
    # Decoders of a lossy format may differ in the padding at the end.
    assert abs(len(served) - len(trained)) <= 0.02 * 16_000
    length = min(len(served), len(trained)) - 800
    shifts = (0, OPUS_PRE_SKIP)
    assert tolerance >= min(
        distance(served[:length], trained[shift : length + shift]) for shift in shifts
    )


def distance(waveform, reference):
    """Root-mean-square difference, relative to the reference's loudness."""
    loudness = np.sqrt(np.mean(reference**2)) + 1e-3
    return np.sqrt(np.mean((waveform - reference) ** 2)) / loudness


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
        data = path.read_bytes()
        tolerance = OPUS_TOLERANCE if b"OpusHead" in data[:100] else 1e-3
        assert_same_audio(decode(data, LIMITS).waveform, load_audio(path), tolerance)
        compared.add(path.suffix)
    assert compared
