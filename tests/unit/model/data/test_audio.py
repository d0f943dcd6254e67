import av
import numpy as np
import pytest
import soundfile

from model.data.audio import SAMPLE_RATE_HZ, AudioReadError, EmptyAudioError, load_audio

TONE_HZ = 440


def tone(seconds, rate_hz, amplitude=0.5):
    times = np.arange(int(seconds * rate_hz)) / rate_hz
    return (amplitude * np.sin(2 * np.pi * TONE_HZ * times)).astype(np.float32)


def dominant_hz(waveform):
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
    return np.argmax(spectrum) * SAMPLE_RATE_HZ / len(waveform)


def write_with_ffmpeg(path, codec, rate_hz, waveform):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate_hz, layout="mono")
        frame = av.AudioFrame.from_ndarray(waveform[None], format="fltp", layout="mono")
        frame.sample_rate = rate_hz
        resampler = av.AudioResampler(stream.format, "mono", rate_hz, stream.frame_size or 0)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))


def assert_is_the_tone(waveform, seconds, tolerance_s=0.1):
    assert waveform.dtype == np.float32
    assert waveform.ndim == 1
    assert abs(len(waveform) / SAMPLE_RATE_HZ - seconds) <= tolerance_s
    assert abs(dominant_hz(waveform) - TONE_HZ) < 2
    middle = waveform[len(waveform) // 4 : -len(waveform) // 4]
    assert np.abs(middle).max() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 44_100, 48_000])
def test_every_format_and_rate_becomes_16_khz(tmp_path, suffix, rate_hz):
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, tone(1.0, rate_hz), rate_hz)
    assert_is_the_tone(load_audio(path), 1.0)


@pytest.mark.parametrize(("suffix", "codec"), [("m4a", "aac"), ("webm", "libopus"), ("mka", "ac3")])
def test_formats_that_libsndfile_does_not_know_are_read_too(tmp_path, suffix, codec):
    path = tmp_path / f"clip.{suffix}"
    write_with_ffmpeg(path, codec, 48_000, tone(1.0, 48_000))
    with pytest.raises(soundfile.LibsndfileError):
        soundfile.info(path)
    assert_is_the_tone(load_audio(path), 1.0)


def test_16_khz_pcm_is_returned_sample_by_sample(tmp_path):
    waveform = np.linspace(-1, 1, 4_000, dtype=np.float32)
    soundfile.write(tmp_path / "a.wav", waveform, SAMPLE_RATE_HZ, subtype="FLOAT")
    np.testing.assert_array_equal(load_audio(tmp_path / "a.wav"), waveform)


def test_channels_are_averaged(tmp_path):
    stereo = np.stack([np.full(4_000, 0.5), np.full(4_000, -0.1)], axis=1)
    soundfile.write(tmp_path / "a.wav", stereo, SAMPLE_RATE_HZ, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(tmp_path / "a.wav"), 0.2, atol=1e-6)


def test_file_without_samples_is_empty(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(0), SAMPLE_RATE_HZ)
    with pytest.raises(EmptyAudioError, match=r"a\.wav: holds no samples"):
        load_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_no_numbers_are_refused(tmp_path, value):
    waveform = tone(0.5, SAMPLE_RATE_HZ)
    waveform[100] = value
    soundfile.write(tmp_path / "a.wav", waveform, SAMPLE_RATE_HZ, subtype="FLOAT")
    with pytest.raises(AudioReadError, match="NaN or infinite"):
        load_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("suffix", ["flac", "mp3"])
def test_file_that_is_cut_off_is_refused_and_not_read_by_half(tmp_path, suffix):
    path = tmp_path / f"clip.{suffix}"
    noise = np.random.default_rng(0).normal(0, 0.1, 4 * SAMPLE_RATE_HZ)
    soundfile.write(path, noise, SAMPLE_RATE_HZ)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(AudioReadError, match=f"clip.{suffix}: "):
        load_audio(path)


def test_video_without_sound_is_refused(tmp_path):
    path = tmp_path / "silent.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        picture = np.zeros((16, 16, 3), np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    with pytest.raises(AudioReadError, match="no audio stream"):
        load_audio(path)


@pytest.mark.parametrize("content", [b"", b"plain text, no sound at all\n" * 50, b"\xff\xfb" * 99])
def test_what_is_no_audio_is_refused_by_name(tmp_path, content):
    path = tmp_path / "clip.mp3"
    path.write_bytes(content)
    with pytest.raises(AudioReadError, match=r"clip\.mp3: "):
        load_audio(path)


def test_missing_file_and_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.wav", tmp_path):
        with pytest.raises(AudioReadError, match="no such file"):
            load_audio(path)
