"""Decode an upload into a mono waveform at 16 kHz, with limits enforced on the way.

libsndfile reads WAV, FLAC and MP3; FFmpeg (PyAV) reads OGG, which libsndfile refuses when it has no
last page, and the rest. Neither is told what a file name says. FFmpeg's demuxer is pinned by the
magic bytes, so that no playlist format can open other files, and only audio codecs are admitted.

Memory is bounded by the decoded seconds allowed, whatever a header claims. Runs in the processes of
`server.audio.pool`: a fault in a decoder ends one of them, not the server.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import av
import numpy as np
import soundfile
import soxr

from server.audio.clip import SAMPLE_RATE_HZ, Clip
from server.audio.limits import AudioLimits, check_format, check_header, too_long
from server.audio.probe import Probe, probe
from server.errors import (
    AudioEmptyError,
    AudioNotFiniteError,
    AudioTruncatedError,
    AudioUnreadableError,
    AudioUnsupportedError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

_DEMUXERS = {"ogg": "ogg", "mp4": "mov", "webm": "matroska", "adts": "aac"}
_CODECS = {"aac", "alac", "flac", "mp3", "mp3float", "opus", "libopus", "vorbis"}
# Floats scaled as 16-bit integers pass; the power spectrum of more would overflow in the log-mel.
_MAX_AMPLITUDE = 1e6


@dataclass(frozen=True, slots=True)
class _Block:
    """Decoded frames: (n, channels) float32 at a rate."""

    samples: NDArray[np.float32]
    rate_hz: int


def decode(data: bytes, limits: AudioLimits) -> Clip:
    """Decode a whole upload.

    Raises:
        AudioError: which of its kinds says why.
    """
    header = probe(data)
    check_header(header, limits)
    if header.container in _DEMUXERS:
        blocks = _read_pyav(data, header)
    else:
        blocks = _read_soundfile(data, header, limits)
    pieces: list[NDArray[np.float32]] = []
    frames = rate_hz = channels = 0
    resampler: soxr.ResampleStream | None = None
    for block in blocks:
        if not frames:
            rate_hz, channels = block.rate_hz, block.samples.shape[1]
            check_format(rate_hz, channels, limits)
            resampler = soxr.ResampleStream(rate_hz, SAMPLE_RATE_HZ, 1, dtype="float32")
        if (block.rate_hz, block.samples.shape[1]) != (rate_hz, channels):
            raise AudioUnsupportedError("the sample rate or channel count changes within the file")
        frames += len(block.samples)
        if frames > limits.max_audio_s * rate_hz:
            raise too_long(header, limits)
        if resampler is not None:
            pieces.append(_resample(resampler, _downmix(block.samples), rate_hz))
    if resampler is None or not frames:
        raise AudioEmptyError("the file holds no audio samples")
    if rate_hz != SAMPLE_RATE_HZ:
        pieces.append(resampler.resample_chunk(np.empty(0, np.float32), last=True))
    waveform = np.concatenate(pieces)
    # The resampler's tail may overshoot by a sample; the duration is what the file holds.
    waveform = waveform[: max(1, int(frames * SAMPLE_RATE_HZ / rate_hz))]
    return Clip(waveform, rate_hz, channels)


def _downmix(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n, channels) -> (n,), refusing what no microphone delivers."""
    peak = float(np.abs(samples).max(initial=0.0))
    if not peak <= _MAX_AMPLITUDE:  # also true of NaN
        raise AudioNotFiniteError("the audio holds NaN, infinite or absurdly large samples")
    return np.asarray(samples.mean(axis=1, dtype=np.float32))


def _resample(
    resampler: soxr.ResampleStream, mono: NDArray[np.float32], rate_hz: int
) -> NDArray[np.float32]:
    if rate_hz == SAMPLE_RATE_HZ:
        return mono
    return np.asarray(resampler.resample_chunk(mono), np.float32)


def _read_soundfile(data: bytes, header: Probe, limits: AudioLimits) -> Iterator[_Block]:
    """Yield everything in one block, one frame more than allowed at most.

    Not block by block: soundfile seeks after every read, and a seek within an MP3 loses the bits
    that its next frames borrow from earlier ones.
    """
    is_open = False
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            is_open = True
            check_format(file.samplerate, file.channels, limits)
            most = int(limits.max_audio_s * file.samplerate) + 1
            announced = file.frames if file.format == "FLAC" and header.duration_s else 0
            samples = file.read(most, dtype="float32", always_2d=True)
            if len(samples):
                yield _Block(samples, file.samplerate)
    except soundfile.LibsndfileError as error:
        if is_open:
            raise AudioTruncatedError("the audio breaks off or is damaged") from error
        raise AudioUnreadableError(f"the audio cannot be decoded: {error.error_string}") from error
    if len(samples) < min(announced, most):
        raise AudioTruncatedError(
            f"the audio breaks off after {len(samples)} of {announced} samples"
        )


def _read_pyav(data: bytes, header: Probe) -> Iterator[_Block]:
    try:
        with av.open(io.BytesIO(data), mode="r", format=_DEMUXERS[header.container]) as container:
            if not container.streams.audio:
                raise AudioUnsupportedError("the file has no audio track")
            stream = container.streams.audio[0]
            # PyAV has no context for a codec that FFmpeg does not know.
            codec = getattr(stream.codec_context, "name", "unknown")
            if codec not in _CODECS:
                raise AudioUnsupportedError(f"the codec {codec} is not taken")
            stream.codec_context.thread_count = 1
            # Only the sample format changes here: rate and layout stay the file's.
            to_float = av.AudioResampler(format="fltp")
            for decoded in container.decode(stream):
                for frame in to_float.resample(decoded):
                    yield _Block(np.asarray(frame.to_ndarray(), np.float32).T, frame.sample_rate)
    except (av.FFmpegError, ValueError) as error:
        raise AudioUnreadableError(f"the audio cannot be decoded: {error}") from error
