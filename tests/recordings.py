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


def with_short_claim(data, form):
    """A file whose header, or last page, claims that it holds a second at most."""
    forged = bytearray(data)
    if form == "ogg-opus":
        at = data.rindex(b"OggS") + 6  # the last page's granule position
        forged[at : at + 8] = struct.pack("<q", 48_000)
    elif form == "m4a":
        at = data.index(b"mvhd") + 16  # time scale and duration
        forged[at : at + 8] = struct.pack(">II", 1_000, 1_000)
    elif form == "webm":
        at = data.index(b"\x44\x89\x88") + 3  # the duration, milliseconds
        forged[at : at + 8] = struct.pack(">d", 1_000.0)
    elif form == "flac":
        packed = int.from_bytes(data[18:26], "big")  # of STREAMINFO; the samples are in 36 bits
        forged[18:26] = (packed >> 36 << 36 | 100).to_bytes(8, "big")
    elif form == "mp3":
        tag = data.index(b"Xing") if b"Xing" in data else data.index(b"Info")
        forged[tag + 8 : tag + 12] = struct.pack(">I", 10)  # frames
    return bytes(forged)


# First three formants of five vowels, Hz (Peterson and Barney 1952).
_VOWELS_HZ = np.array(
    [[730, 1090, 2440], [530, 1840, 2480], [270, 2290, 3010], [570, 840, 2410], [300, 870, 2240]]
)
_FORMANT_WIDTHS_HZ = (60, 90, 120)
_SYLLABLES_PER_S = 5


def speechlike(seconds, seed=0):
    """(N,) float32, 16 kHz: a voice that babbles vowels, which a speech detector takes for speech.

    Harmonics of a wavering pitch through three formants that glide from vowel to vowel, louder
    and softer with each syllable, over a little noise. After three seconds it repeats itself.
    """
    if seconds > 3:
        return np.resize(speechlike(3, seed), round(seconds * 16_000))
    rng = np.random.default_rng(seed)
    times = np.arange(round(seconds * 16_000)) / 16_000
    pitch_hz = 110 * (1 + 0.08 * np.sin(2 * np.pi * 0.6 * times + rng.uniform(0, 6)))
    phase = 2 * np.pi * np.cumsum(pitch_hz) / 16_000
    vowels = _VOWELS_HZ[rng.integers(0, 5, int(seconds * _SYLLABLES_PER_S) + 3)]
    syllables = times * _SYLLABLES_PER_S
    formants_hz = [np.interp(syllables, np.arange(len(vowels)), f) for f in vowels.T]
    voice = np.zeros(len(times))
    for harmonic in range(1, 34):
        frequency_hz = harmonic * pitch_hz
        gain = sum(
            level / np.hypot(1 - (frequency_hz / f) ** 2, width * frequency_hz / f**2)
            for f, width, level in zip(formants_hz, _FORMANT_WIDTHS_HZ, (1, 0.5, 0.25), strict=True)
        )
        voice += gain * np.sin(harmonic * phase) / harmonic**1.5
    voice *= 0.6 - 0.4 * np.cos(2 * np.pi * syllables)
    voice *= 0.3 / np.abs(voice).max(initial=1e-9)
    return (voice + rng.normal(0, 0.003, len(times))).astype(np.float32)
