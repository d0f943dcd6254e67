import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.audio.probe import probe
from server.errors import AudioEmptyError, AudioUnrecognisedError
from tests.recordings import FORMATS, encode, tone, with_wav_data_size

CONTAINERS = {
    "wav": "wav",
    "wav-float": "wav",
    "wav-24": "wav",
    "wav-mulaw": "wav",
    "flac": "flac",
    "ogg-vorbis": "ogg",
    "ogg-opus": "ogg",
    "mp3": "mp3",
    "m4a": "mp4",
    "aac": "adts",
    "webm": "webm",
}


@pytest.mark.parametrize("form", FORMATS)
def test_the_container_is_told_by_its_bytes(form):
    found = probe(encode(tone(0.5, 48_000), 48_000, form))
    assert found.container == CONTAINERS[form]
    assert not found.truncated


@pytest.mark.parametrize("form", sorted(set(FORMATS) - {"aac"}))
def test_the_duration_is_read_from_the_header(form):
    found = probe(encode(tone(2.5, 48_000), 48_000, form))
    assert found.duration_s == pytest.approx(2.5, abs=0.08)


@pytest.mark.parametrize("form", ["wav", "flac", "ogg-vorbis", "ogg-opus", "mp3"])
def test_rate_and_channels_are_read_from_the_header(form):
    found = probe(encode(tone(0.5, 48_000, channels=2), 48_000, form))
    assert (found.sample_rate_hz, found.channels) == (48_000, 2)


def test_a_wav_that_announces_more_than_came_is_truncated():
    wav = encode(tone(1.0))
    assert probe(wav[:-2]).truncated
    assert not probe(wav).truncated


@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0xFFFFFFFF])
def test_a_wav_written_to_a_pipe_has_no_duration_and_is_not_truncated(size):
    found = probe(with_wav_data_size(encode(tone(1.0)), size))
    assert (found.duration_s, found.truncated) == (None, False)


def test_an_id3_tag_in_front_is_skipped():
    tag = b"ID3\x04\x00\x00\x00\x00\x01\x00" + b"\0" * 128  # 1 << 7 bytes
    assert probe(tag + encode(tone(0.5), form="mp3")).container == "mp3"


def test_no_bytes_are_refused():
    with pytest.raises(AudioEmptyError):
        probe(b"")


@pytest.mark.parametrize(
    "data", [b"\xff\xfbtwo chance bytes", b"RIFF\0\0\0\0AVI ", b"{}", b"\0" * 99]
)
def test_what_is_no_audio_is_refused(data):
    with pytest.raises(AudioUnrecognisedError):
        probe(data)


MAGIC = [b"", b"RIFF\xff\xff\xff\xffWAVE", b"OggS", b"\0\0\0\x18ftypM4A ", b"\x1a\x45\xdf\xa3",
         b"fLaC", b"ID3\x04\0\0", b"\xff\xfb\x90\x64", b"\xff\xf1\x50\x80"]  # fmt: skip


@given(st.sampled_from(MAGIC), st.binary(max_size=300))
def test_no_bytes_make_the_probe_fail_otherwise(magic, data):
    try:
        found = probe(magic + data)
    except (AudioEmptyError, AudioUnrecognisedError):
        return
    assert found.duration_s is None or found.duration_s >= 0


def element(name, body):
    """An EBML element whose size takes eight bytes."""
    return name + (1 << 56 | len(body)).to_bytes(8, "big") + body


def webm(duration, scale=b"\x0f\x42\x40"):  # a million, ns
    info = element(b"\x2a\xd7\xb1", scale) + element(b"\x44\x89", struct.pack(">d", duration))
    segment = element(b"\x18\x53\x80\x67", element(b"\x15\x49\xa9\x66", info))
    return element(b"\x1a\x45\xdf\xa3", b"") + segment


def test_a_webm_announces_seconds_or_nothing():
    assert probe(webm(2500.0)).duration_s == 2.5
    for duration in (math.nan, math.inf, -math.inf, -1e300, 0.0, 1e308):
        assert probe(webm(duration)).duration_s is None
    assert probe(webm(2500.0, scale=b"\xff" * 2000)).duration_s == 2.5  # no number is so long


def test_no_more_of_a_header_is_looked_at_than_is_worth_it():
    def box(name, body):
        return struct.pack(">I4s", 8 + len(body), name) + body

    header = box(b"mvhd", struct.pack(">4x8xII84x", 1000, 2500))
    padding = box(b"free", b"") * 4000
    start = box(b"ftyp", b"M4A ")
    assert probe(start + box(b"moov", padding + header)).duration_s == 2.5
    assert probe(start + box(b"moov", padding) * 2 + box(b"moov", header)).duration_s is None
