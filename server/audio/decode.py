"""Decode an upload into a mono waveform at 16 kHz, with limits enforced on the way.

libsndfile reads WAV, FLAC and MP3; FFmpeg (PyAV) reads OGG, which libsndfile refuses when it has no
last page, and the rest. Neither is told what a file name says. FFmpeg's demuxer is pinned by the
magic bytes, so that no playlist format can open other files, and only audio codecs are admitted.

Memory is bounded by a block of about a second, whatever a header claims. Runs in the processes of
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

from server.audio import mp3
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
_BLOCK_S = 5  # decoded at once
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
    decoder = StreamDecoder(data, limits)
    waveform = np.concatenate(list(decoder.blocks()))
    return Clip(waveform, decoder.sample_rate_hz, decoder.channels)


class StreamDecoder:
    """Decodes an upload block by block; what it holds does not grow with the audio's length.

    Attributes:
        sample_rate_hz: of the upload; known once the first block has come.
        channels: of the upload; likewise.
    """

    def __init__(self, data: bytes, limits: AudioLimits) -> None:
        """Read the header.

        Raises:
            AudioError: the header's own claims are refused.
        """
        self._header = probe(data)
        check_header(self._header, limits)
        self._data, self._limits = data, limits
        self.sample_rate_hz = self.channels = 0

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Yield the waveform, mono at 16 kHz, in pieces (n,) of a few milliseconds to some seconds.

        Raises:
            AudioError: which of its kinds says why; as late as after the last block.
        """
        if self._header.container in _DEMUXERS:
            decoded = _read_pyav(self._data, self._header)
        else:
            decoded = _read_soundfile(self._data, self._header, self._limits)
        frames = given = 0
        resampler: soxr.ResampleStream | None = None
        for block in decoded:
            if resampler is None:
                self._take_format(block)
                resampler = soxr.ResampleStream(block.rate_hz, SAMPLE_RATE_HZ, 1, dtype="float32")
            if (block.rate_hz, block.samples.shape[1]) != (self.sample_rate_hz, self.channels):
                raise _changes()
            frames += len(block.samples)
            if frames > self._limits.max_audio_s * self.sample_rate_hz:
                raise too_long(self._header, self._limits)
            piece = _resample(resampler, _downmix(block.samples), block.rate_hz)
            given += len(piece)
            if len(piece):
                yield piece
        if resampler is None or not frames:
            raise AudioEmptyError("the file holds no audio samples")
        # The resampler's tail may overshoot by a sample; the duration is what the file holds.
        missing = max(1, int(frames * SAMPLE_RATE_HZ / self.sample_rate_hz)) - given
        if missing > 0:
            yield resampler.resample_chunk(np.empty(0, np.float32), last=True)[:missing]

    def _take_format(self, block: _Block) -> None:
        self.sample_rate_hz, self.channels = block.rate_hz, block.samples.shape[1]
        check_format(self.sample_rate_hz, self.channels, self._limits)


def _changes() -> AudioUnsupportedError:
    return AudioUnsupportedError("the sample rate or channel count changes within the file")


def _downmix(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n, channels) -> (n,), refusing what no microphone delivers."""
    peak = float(np.abs(samples).max(initial=0.0))
    if not peak <= _MAX_AMPLITUDE:  # also true of NaN
        raise AudioNotFiniteError("the audio holds NaN, infinite or absurdly large samples")
    if samples.shape[1] == 1:
        return samples[:, 0]
    return np.asarray(samples.mean(axis=1, dtype=np.float32))


def _resample(
    resampler: soxr.ResampleStream, mono: NDArray[np.float32], rate_hz: int
) -> NDArray[np.float32]:
    if rate_hz == SAMPLE_RATE_HZ:
        return mono
    return np.asarray(resampler.resample_chunk(mono), np.float32)


class _ForwardFile(soundfile.SoundFile):
    """A file that soundfile does not seek in.

    It seeks after every read where it can, and a seek within an MP3 loses the bits that its next
    frames borrow from earlier ones.
    """

    def seekable(self) -> bool:
        return False


def _read_soundfile(data: bytes, header: Probe, limits: AudioLimits) -> Iterator[_Block]:
    """Yield blocks of some seconds; at most one sample more than allowed is decoded in vain."""
    is_open = False
    is_flac = header.container == "flac"
    frames = 0
    try:
        with _ForwardFile(_without_claim(data, header)) as file:
            is_open = True
            check_format(file.samplerate, file.channels, limits)
            most = int(limits.max_audio_s * file.samplerate) + 1
            announced = round((header.duration_s or 0.0) * file.samplerate) if is_flac else 0
            while frames < most:
                size = min(_BLOCK_S * file.samplerate, most - frames)
                samples = _read_floats(file, size)
                frames += len(samples)
                if len(samples):
                    yield _Block(samples, file.samplerate)
                if len(samples) < size:
                    break
    except soundfile.LibsndfileError as error:
        if is_open:
            raise AudioTruncatedError("the audio breaks off or is damaged") from error
        raise AudioUnreadableError(f"the audio cannot be decoded: {error.error_string}") from error
    if frames < min(announced, most):
        raise AudioTruncatedError(f"the audio breaks off after {frames} of {announced} samples")


def _read_floats(file: soundfile.SoundFile, size: int) -> NDArray[np.float32]:
    """Read (n, channels), at most `size` of them."""
    if file.subtype != "PCM_16":
        return np.asarray(file.read(size, dtype="float32", always_2d=True))
    # libsndfile scales sample by sample, which takes ten times as long.
    samples: NDArray[np.int16] = file.read(size, dtype="int16", always_2d=True)
    return samples * np.float32(2**-15)


def _without_claim(data: bytes, header: Probe) -> io.BytesIO:
    """The upload, told to go on to its end.

    libsndfile ends where a FLAC or MP3 claims to end, or where the size of an MP3 that claims
    nothing seems to say so, and drops the rest without a word.
    """
    first = mp3.beginning(data) if header.container == "mp3" else None
    if first is not None:
        return _mp3_without_claim(data, first)
    file = io.BytesIO(data)
    if header.container == "flac":
        at = mp3.skip_id3(data) + 18  # rate, channels and depth in 28 bits, samples in 36
        packed = int.from_bytes(data[at : at + 8], "big")
        _overwrite(file, at, (packed >> 36 << 36).to_bytes(8, "big"))
    return file


def _mp3_without_claim(data: bytes, first: mp3.Beginning) -> io.BytesIO:
    n_frames = 0
    for frame in mp3.frames(data, first):
        n_frames += 1
        if not frame.continues(first.frame):  # there, libsndfile ends as well
            raise _changes()
    if first.n_frames is None:
        return io.BytesIO(mp3.with_open_end(data, first))
    file = io.BytesIO(data)
    if first.n_frames < n_frames:  # a right number also says how much padding there is at the end
        _overwrite(file, first.n_frames_at, mp3.OPEN_END)
    return file


def _overwrite(file: io.BytesIO, at: int, data: bytes) -> None:
    file.seek(at)
    file.write(data)
    file.seek(0)


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
