"""A decoded upload."""

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
