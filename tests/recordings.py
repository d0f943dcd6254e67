"""Recordings for tests, written on the spot in the formats that the server takes."""

import io
import struct

import av
import numpy as np
import soundfile

# name: (writer, container, codec or subtype, sample rate)
_SOUNDFILE = {
    "wav": ("WAV", "PCM_16"),
    "wav-float": ("WAV", "FLOAT"),
    "wav-24": ("WAV", "PCM_24"),
    "wav-mulaw": ("WAV", "ULAW"),
    "flac": ("FLAC", "PCM_16"),
    "ogg-vorbis": ("OGG", "VORBIS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}
_PYAV = {
    "ogg-opus": ("ogg", "libopus"),
    "m4a": ("ipod", "aac"),
    "aac": ("adts", "aac"),
    "webm": ("webm", "libopus"),
}
FORMATS = [*_SOUNDFILE, *_PYAV]


def tone(seconds, rate_hz=16_000, channels=1, frequency_hz=440.0):
    """(N,) or (N, channels) float32: a sine at half of full scale."""
    times = np.arange(round(seconds * rate_hz)) / rate_hz
    mono = (0.5 * np.sin(2 * np.pi * frequency_hz * times)).astype(np.float32)
    return mono if channels == 1 else np.stack([mono] * channels, axis=1)


def encode(waveform, rate_hz=16_000, form="wav"):
    """The bytes of a file; `form` is one of FORMATS. Opus wants 48 kHz or 16 kHz."""
    if form in _SOUNDFILE:
        container, subtype = _SOUNDFILE[form]
        buffer = io.BytesIO()
        soundfile.write(buffer, waveform, rate_hz, format=container, subtype=subtype)
        return buffer.getvalue()
    return _encode_pyav(waveform, rate_hz, *_PYAV[form])


def _encode_pyav(waveform, rate_hz, container_name, codec):
    buffer = io.BytesIO()
    planes = np.ascontiguousarray(np.atleast_2d(np.asarray(waveform).T))  # (channels, N)
    layout = "mono" if len(planes) == 1 else "stereo"
    with av.open(buffer, "w", format=container_name) as container:
        stream = container.add_stream(codec, rate=rate_hz, layout=layout)
        context = stream.codec_context
        context.open()
        resampler = av.AudioResampler(
            format=context.format.name,
            layout=layout,
            rate=context.sample_rate,
            frame_size=context.frame_size,
        )
        frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout=layout)
        frame.sample_rate = rate_hz
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def with_wav_data_size(wav, size):
    """A WAV file whose data chunk announces `size` bytes."""
    at = wav.index(b"data") + 4
    return wav[:at] + struct.pack("<I", size) + wav[at + 4 :]
