"""Audio files as the models hear them: mono float32 at 16 kHz.

AudioReadError
└── EmptyAudioError
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import av
import numpy as np
import soundfile
import soxr

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

SAMPLE_RATE_HZ = 16_000
# An MP3's header may promise its encoder's padding; more than that missing is a cut file.
_MAX_MISSING_S = 0.1


class AudioReadError(ValueError):
    """A file cannot be decoded to finite samples; the message names the file and the reason."""


class EmptyAudioError(AudioReadError):
    """A file decodes, but to no samples."""


def load_audio(path: Path) -> NDArray[np.float32]:
    """Decode a file to mono 16 kHz; channels are averaged.

    libsndfile reads WAV, FLAC and MP3; FFmpeg reads OGG, whose start the two cut differently, and
    what libsndfile does not know (M4A, WebM, ...): the same division as in the server, so that
    training hears what will be served.

    Args:
        path: the file.

    Returns:
        (N,) float32, N > 0, all finite; full scale is 1, which decoders may overshoot a little.

    Raises:
        EmptyAudioError: the file holds no samples.
        AudioReadError: the file is missing, is no audio, is damaged, holds NaN or infinite
            samples, or is an MP3 or FLAC that is cut off. (A cut WAV or OGG tells nothing of its
            former length: it reads as a shorter recording.)
    """
    if not path.is_file():
        raise AudioReadError(f"{path}: no such file")
    with path.open("rb") as file:
        is_ogg = file.read(4) == b"OggS"
    decoded = None if is_ogg else _decode_with_libsndfile(path)
    samples, rate_hz = _decode_with_ffmpeg(path) if decoded is None else decoded
    waveform = samples.mean(axis=1, dtype=np.float32)  # (N, channels) -> (N,)
    if rate_hz != SAMPLE_RATE_HZ and len(waveform):
        try:
            waveform = soxr.resample(waveform, rate_hz, SAMPLE_RATE_HZ)
        except (RuntimeError, ValueError) as error:
            raise AudioReadError(
                f"{path}: cannot be resampled from {rate_hz} Hz: {error}"
            ) from error
    if len(waveform) == 0:
        raise EmptyAudioError(f"{path}: holds no samples")
    if not np.isfinite(waveform).all():
        raise AudioReadError(f"{path}: holds NaN or infinite samples")
    return np.ascontiguousarray(waveform, dtype=np.float32)


def _decode_with_libsndfile(path: Path) -> tuple[NDArray[np.float32], int] | None:
    """Samples (N, channels) and their rate; None where libsndfile does not know the format."""
    try:
        file = soundfile.SoundFile(path)
    except soundfile.LibsndfileError:
        return None
    with file:
        try:
            samples = file.read(dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, MemoryError) as error:
            raise AudioReadError(f"{path}: cannot be decoded: {error}") from error
        if 0 < len(samples) < file.frames - _MAX_MISSING_S * file.samplerate:
            raise AudioReadError(
                f"{path}: is cut off: {len(samples)} of {file.frames} samples can be read"
            )
        return samples, file.samplerate


def _decode_with_ffmpeg(path: Path) -> tuple[NDArray[np.float32], int]:
    """Samples (N, channels) of the first audio stream and their rate."""
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            if not container.streams.audio:
                raise AudioReadError(f"{path}: holds no audio stream")
            stream = container.streams.audio[0]
            to_float = av.AudioResampler(format="fltp")
            frames = [
                converted
                for frame in container.decode(stream)
                for converted in to_float.resample(frame)
            ]
            rate_hz = int(stream.rate)
    except av.FFmpegError as error:
        raise AudioReadError(f"{path}: cannot be decoded: {error.strerror}") from error
    if not frames:
        raise EmptyAudioError(f"{path}: holds no samples")
    # A planar frame is (channels, N).
    return np.concatenate([frame.to_ndarray() for frame in frames], axis=1).T, rate_hz
