import struct

import numpy as np
import pytest
import soxr

from server.audio.decode import decode
from server.audio.limits import AudioLimits
from server.audio.probe import probe
from server.errors import (
    AudioEmptyError,
    AudioError,
    AudioNotFiniteError,
    AudioTooLongError,
    AudioTruncatedError,
    AudioUnreadableError,
    AudioUnrecognisedError,
    AudioUnsupportedError,
)
from tests.recordings import FORMATS, encode, tone, with_short_claim, with_wav_data_size

LIMITS = AudioLimits(max_audio_s=30.0)
# Encoders pad to whole frames, and decoders do not always trim that.
PADDING_S = 0.08


def strongest_frequency_hz(waveform):
    spectrum = np.abs(np.fft.rfft(waveform))
    return np.fft.rfftfreq(len(waveform), 1 / 16_000)[spectrum.argmax()]


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_becomes_mono_at_16_khz(form):
    clip = decode(encode(tone(1.0, 48_000, channels=2), 48_000, form), LIMITS)
    assert clip.waveform.dtype == np.float32
    assert clip.waveform.ndim == 1
    assert clip.duration_s == pytest.approx(1.0, abs=PADDING_S)
    assert (clip.sample_rate_hz, clip.channels) == (48_000, 2)
    assert strongest_frequency_hz(clip.waveform) == pytest.approx(440, abs=2)
    assert 0.4 < np.abs(clip.waveform[4000:12_000]).max() < 0.6


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 22_050, 44_100, 96_000])
def test_any_rate_is_resampled_as_in_one_piece(rate_hz):
    original = tone(3.0, rate_hz)
    clip = decode(encode(original, rate_hz, "wav-float"), LIMITS)
    assert len(clip.waveform) == 48_000
    expected = soxr.resample(original, rate_hz, 16_000)
    np.testing.assert_allclose(clip.waveform, expected[:48_000], atol=1e-5)


def test_16_khz_passes_unchanged():
    original = tone(0.5)
    clip = decode(encode(original, form="wav-float"), LIMITS)
    np.testing.assert_array_equal(clip.waveform, original)


def test_stereo_is_averaged():
    stereo = np.stack([tone(0.1), np.zeros(1600, np.float32)], axis=1)
    clip = decode(encode(stereo, form="wav-float"), LIMITS)
    np.testing.assert_allclose(clip.waveform, tone(0.1) / 2, atol=1e-7)


def test_a_wav_of_unknown_length_is_read_to_its_end():
    wav = with_wav_data_size(encode(tone(0.5)), 0xFFFFFFFF)
    assert decode(wav, LIMITS).duration_s == 0.5


def test_one_sample_is_audio():
    assert len(decode(encode(tone(1 / 16_000)), LIMITS).waveform) == 1


def test_an_empty_file_is_refused():
    with pytest.raises(AudioEmptyError, match="empty"):
        decode(b"", LIMITS)


def test_a_file_without_samples_is_refused():
    with pytest.raises(AudioEmptyError, match="no audio samples"):
        decode(encode(np.zeros(0, np.float32)), LIMITS)


@pytest.mark.parametrize(
    "data", [b"hello, this is a letter and not a recording", b"%PDF-1.7\n" + b"\0" * 500, b"\xff"]
)
def test_what_is_no_audio_is_refused(data):
    with pytest.raises(AudioUnrecognisedError, match="known container"):
        decode(data, LIMITS)


@pytest.mark.parametrize("form", ["wav", "flac", "ogg-vorbis", "ogg-opus", "mp3", "m4a", "webm"])
def test_a_file_that_breaks_off_is_refused(form):
    whole = encode(tone(2.0, 48_000), 48_000, form)
    with pytest.raises(AudioTruncatedError):
        decode(whole[: len(whole) * 2 // 3], LIMITS)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("keep", [5, 12, 30, 60, 100])
def test_a_file_that_breaks_off_in_its_header_is_refused(form, keep):
    with pytest.raises(AudioError):
        decode(encode(tone(0.5, 48_000), 48_000, form)[:keep], LIMITS)


@pytest.mark.parametrize("form", FORMATS)
def test_noise_behind_a_good_header_never_escapes_as_another_error(form):
    rng = np.random.default_rng(0)
    whole = bytearray(encode(tone(0.5, 48_000), 48_000, form))
    for _ in range(20):
        broken = bytearray(whole)
        for at in rng.integers(8, len(broken), 40):
            broken[at] = rng.integers(256)
        try:
            clip = decode(bytes(broken), LIMITS)
        except AudioError:
            continue
        assert np.isfinite(clip.waveform).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_samples_that_are_not_finite_are_refused(value):
    waveform = tone(0.5)
    waveform[4000] = value
    with pytest.raises(AudioNotFiniteError, match="NaN"):
        decode(encode(waveform, form="wav-float"), LIMITS)


def test_the_longest_allowed_clip_passes_and_one_sample_more_does_not():
    limits = AudioLimits(max_audio_s=1.0)
    assert decode(encode(tone(1.0)), limits).duration_s == 1.0
    with pytest.raises(AudioTooLongError, match=r"at most 1 s are taken, this is 1\.00 s"):
        decode(encode(tone(1.0 + 1 / 16_000)), limits)


@pytest.mark.parametrize("form", FORMATS)
def test_a_long_clip_is_refused_in_every_format(form):
    with pytest.raises(AudioTooLongError, match="at most 1 s"):
        decode(encode(tone(1.5, 48_000), 48_000, form), AudioLimits(max_audio_s=1.0))


@pytest.mark.parametrize("form", ["flac", "mp3", "m4a", "webm"])
@pytest.mark.parametrize("rate_hz", [16_000, 48_000])
def test_a_header_that_lies_short_hides_nothing(form, rate_hz):
    whole = encode(tone(5.0, rate_hz), rate_hz, form)
    forged = with_short_claim(whole, form)
    assert 0 < probe(forged).duration_s <= 1.0
    expected, found = decode(whole, LIMITS).waveform, decode(forged, LIMITS).waveform
    assert len(found) / 16_000 == pytest.approx(5.0, abs=2 * PADDING_S)
    # The padding at the end of an MP3 is not known any more.
    np.testing.assert_allclose(found[: len(expected) - 200], expected[:-200], atol=1e-6)
    with pytest.raises(AudioTooLongError, match="more than that"):
        decode(forged, AudioLimits(max_audio_s=4.0))


TAGS_BETWEEN = b"TAG" + bytes(125) + b"ID3\x04\x00\x00\x00\x00\x10\x00" + bytes(2048)


@pytest.mark.parametrize("between", [b"", TAGS_BETWEEN], ids=["joined", "tags-between"])
@pytest.mark.parametrize("keeps_tag", [True, False])
@pytest.mark.parametrize(("rate_hz", "channels"), [(8_000, 1), (24_000, 2), (44_100, 1)])
def test_mp3s_that_were_joined_are_decoded_to_the_end(between, keeps_tag, rate_hz, channels):
    one = encode(tone(2.0, rate_hz, channels), rate_hz, "mp3")
    part = one if keeps_tag else without_first_frame(one)
    clip = decode(part + between + part, LIMITS)
    assert clip.duration_s == pytest.approx(4.0, abs=4 * PADDING_S)
    assert np.abs(clip.waveform[-8_000:-4_000]).max() > 0.4


def test_an_mp3_without_a_tag_is_decoded_to_its_end_whatever_its_first_frame_suggests():
    # A variable bit rate, whose first frame is one of the largest.
    mp3 = without_first_frame(encode(tone(5.0), form="mp3"))
    assert probe(mp3).duration_s is None
    clip = decode(mp3, LIMITS)
    assert clip.duration_s == pytest.approx(5.0, abs=PADDING_S)
    assert strongest_frequency_hz(clip.waveform) == pytest.approx(440, abs=2)


def without_first_frame(data):
    """An MP3 as a recorder on the air writes it: without a tag, which fills the first frame."""
    return data[data.index(data[:2], 2) :]


@pytest.mark.parametrize("other", [(48_000, 1), (44_100, 2)])
@pytest.mark.parametrize("keeps_tag", [True, False])
def test_mp3s_of_different_formats_that_were_joined_are_refused(other, keeps_tag):
    rate_hz, channels = other
    parts = [
        encode(tone(2.0, 44_100), 44_100, "mp3"),
        encode(tone(2.0, rate_hz, channels), rate_hz, "mp3"),
    ]
    if not keeps_tag:
        parts = [without_first_frame(part) for part in parts]
    with pytest.raises(AudioUnsupportedError, match="changes within the file"):
        decode(b"".join(parts), LIMITS)


def test_an_mp3_with_much_that_is_no_audio_in_its_middle_is_refused():
    one = encode(tone(2.0), form="mp3")
    with pytest.raises(AudioTruncatedError, match="damaged"):
        decode(one + bytes(30_000) + one, LIMITS)


def test_what_follows_an_mp3_does_not_matter():
    one = encode(tone(2.0), form="mp3")
    noise = np.random.default_rng(0).bytes(100_000)
    expected = decode(one, LIMITS).waveform
    np.testing.assert_array_equal(decode(one + noise, LIMITS).waveform, expected)


def test_too_many_channels_are_refused():
    with pytest.raises(AudioUnsupportedError, match="6 channels"):
        decode(encode(tone(0.1, channels=6)), LIMITS)


def test_a_forged_channel_count_allocates_nothing():
    wav = bytearray(encode(tone(0.1)))
    at = wav.index(b"fmt ") + 10
    wav[at : at + 2] = struct.pack("<H", 65_535)
    with pytest.raises(AudioUnsupportedError, match="65535 channels"):
        decode(bytes(wav), LIMITS)


@pytest.mark.parametrize("rate_hz", [1, 3_999, 192_001, 2**31])
def test_a_sample_rate_out_of_bounds_is_refused(rate_hz):
    wav = bytearray(encode(tone(0.1)))
    at = wav.index(b"fmt ") + 12
    wav[at : at + 4] = struct.pack("<I", rate_hz)
    with pytest.raises(AudioUnsupportedError, match=f"{rate_hz} Hz"):
        decode(bytes(wav), LIMITS)


def test_a_container_without_audio_is_refused():
    whole = encode(tone(0.2), form="m4a")
    with pytest.raises((AudioUnsupportedError, AudioUnreadableError)):
        decode(whole.replace(b"soun", b"vide"), LIMITS)
