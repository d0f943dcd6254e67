"""Raw samples that come in pieces, as 16 kHz float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import soxr

from server.audio.clip import SAMPLE_RATE_HZ

if TYPE_CHECKING:
    from numpy.typing import NDArray

SAMPLE_BYTES = 2
_FULL_SCALE = 32_768.0


class PcmStream:
    """Decodes signed 16 bit little-endian mono PCM; how it is split into pieces changes nothing."""

    def __init__(self, rate_hz: int) -> None:
        """Begin before the first byte.

        Args:
            rate_hz: of the samples that come.
        """
        self._rate_hz = rate_hz
        self._rest = b""  # half a sample
        self._resampler = self._make_resampler()

    def push(self, data: bytes) -> NDArray[np.float32]:
        """Return what these bytes complete (n,), float32, 16 kHz."""
        data = self._rest + data
        whole = len(data) - len(data) % SAMPLE_BYTES
        self._rest = data[whole:]
        samples = np.frombuffer(data[:whole], "<i2").astype(np.float32) / np.float32(_FULL_SCALE)
        return samples if self._resampler is None else self._resampler.resample_chunk(samples)

    def finish(self) -> NDArray[np.float32]:
        """Return what the filter still holds (n,), and begin anew; half a sample is dropped."""
        self._rest = b""
        resampler, self._resampler = self._resampler, self._make_resampler()
        nothing = np.zeros(0, np.float32)
        return nothing if resampler is None else resampler.resample_chunk(nothing, last=True)

    def _make_resampler(self) -> soxr.ResampleStream | None:
        if self._rate_hz == SAMPLE_RATE_HZ:
            return None
        return soxr.ResampleStream(self._rate_hz, SAMPLE_RATE_HZ, 1, dtype="float32")
