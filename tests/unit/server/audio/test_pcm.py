"""Raw samples in pieces, as 16 kHz float32."""

import io
from itertools import pairwise

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given
from hypothesis import strategies as st

from server.audio.pcm import PcmStream
from tests.recordings import tone


def pcm(seconds, rate_hz):
    return (tone(seconds, rate_hz) * 32_767).astype("<i2").tobytes()


def split(data, cuts):
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


def decode(pieces, rate_hz):
    stream = PcmStream(rate_hz)
    return np.concatenate([*map(stream.push, pieces), stream.finish()])


@pytest.mark.parametrize("rate_hz", [24_000, 16_000, 8_000])
@given(cuts=st.lists(st.integers(0, 10**6), max_size=20))
def test_any_split_even_within_samples_gives_the_same_waveform(rate_hz, cuts):
    data = pcm(0.5, rate_hz)
    whole = decode([data], rate_hz)
    assert len(whole) == pytest.approx(8_000, abs=1)
    np.testing.assert_array_equal(decode(split(data, cuts), rate_hz), whole)


def test_the_stream_resamples_as_the_whole_would_be():
    data = pcm(1.0, 24_000)
    samples = np.frombuffer(data, "<i2").astype(np.float32) / 32_768
    expected = soxr.resample(samples, 24_000, 16_000)
    np.testing.assert_allclose(decode([data], 24_000), expected, atol=1e-4)


def test_after_its_end_a_stream_begins_anew():
    stream = PcmStream(24_000)
    first = np.concatenate([stream.push(pcm(0.3, 24_000) + b"\x01"), stream.finish()])
    second = np.concatenate([stream.push(pcm(0.3, 24_000)), stream.finish()])
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(("encoding", "subtype"), [("pcmu", "ULAW"), ("pcma", "ALAW")])
def test_g711_is_what_libsndfile_reads(encoding, subtype):
    data = bytes(range(256)) * 8
    samples, _ = soundfile.read(
        io.BytesIO(data), format="RAW", subtype=subtype, channels=1, samplerate=16_000,
        dtype="float32",
    )  # fmt: skip
    np.testing.assert_array_equal(PcmStream(16_000, encoding).push(data), samples)


@given(cuts=st.lists(st.integers(0, 10**6), max_size=20))
def test_any_split_of_g711_gives_the_same_waveform(cuts):
    data = np.random.default_rng(0).integers(0, 256, 4_000, np.uint8).tobytes()
    whole, pieces = PcmStream(8_000, "pcmu"), PcmStream(8_000, "pcmu")
    expected = np.concatenate([whole.push(data), whole.finish()])
    found = np.concatenate([*map(pieces.push, split(data, cuts)), pieces.finish()])
    assert len(found) == pytest.approx(8_000, abs=1)
    np.testing.assert_array_equal(found, expected)
