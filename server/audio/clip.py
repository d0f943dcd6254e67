"""Decoded audio: a whole upload, or stretches of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SAMPLE_RATE_HZ = 16_000  # of every waveform handed on; Whisper's


@dataclass(frozen=True, slots=True)
class Clip:
    """A decoded upload.

    Attributes:
        waveform: (N,) float32, mono, 16 kHz.
        sample_rate_hz: of the upload.
        channels: of the upload.
    """

    waveform: NDArray[np.float32]
    sample_rate_hz: int
    channels: int

    @property
    def duration_s(self) -> float:
        """Seconds of audio."""
        return len(self.waveform) / SAMPLE_RATE_HZ


@dataclass(frozen=True, slots=True)
class Excerpt:
    """A stretch of a recording that is transcribed in one piece. Positions are samples at 16 kHz.

    Attributes:
        waveform: (N,) float32, mono, 16 kHz.
        start: where it begins in the recording.
        speech_start: where in the recording its speech begins.
        speech_end: where in the recording its speech ends.
    """

    waveform: NDArray[np.float32]
    start: int
    speech_start: int
    speech_end: int

    @property
    def duration_s(self) -> float:
        """Seconds of audio."""
        return len(self.waveform) / SAMPLE_RATE_HZ


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the decoding of a recording has come.

    Attributes:
        decoded_s: seconds of it.
        is_long: it does not fit into one excerpt.
        is_done: that is all of it.
    """

    decoded_s: float
    is_long: bool
    is_done: bool = False
