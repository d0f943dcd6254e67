"""Raw samples that come in pieces, as 16 kHz float32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import soxr

from server.audio.clip import SAMPLE_RATE_HZ

if TYPE_CHECKING:
    from numpy.typing import NDArray

Encoding = Literal["pcm16", "pcmu", "pcma"]
"""Signed 16 bit little-endian, or a byte a sample by G.711's mu-law or A-law."""

SAMPLE_BYTES: dict[Encoding, int] = {"pcm16": 2, "pcmu": 1, "pcma": 1}
_FULL_SCALE = 32_768.0


def _mu_law() -> NDArray[np.float32]:
    """Samples of all mu-law bytes (256,). Source: ITU-T G.711, table 2, in steps of 16 bit PCM."""
    codes = ~np.arange(256, dtype=np.uint8)
    exponent, mantissa = (codes >> 4) & 7, (codes & 15).astype(np.int32)
    magnitude = (((mantissa << 3) + 0x84) << exponent) - 0x84
    return np.where(codes & 0x80, -magnitude, magnitude).astype(np.float32)


def _a_law() -> NDArray[np.float32]:
    """Samples of all A-law bytes (256,). Source: ITU-T G.711, table 1, in steps of 16 bit PCM."""
    codes = np.arange(256, dtype=np.uint8) ^ 0x55
    exponent, mantissa = (codes >> 4) & 7, (codes & 15).astype(np.int32)
    first = exponent == 0
    magnitude = ((mantissa << 4) + np.where(first, 8, 0x108)) << np.where(first, 0, exponent - 1)
    return np.where(codes & 0x80, magnitude, -magnitude).astype(np.float32)


_G711 = {"pcmu": _mu_law(), "pcma": _a_law()}


class PcmStream:
    """Decodes mono samples; how they are split into pieces changes nothing."""

    def __init__(self, rate_hz: int, encoding: Encoding = "pcm16") -> None:
        """Begin before the first byte.

        Args:
            rate_hz: of the samples that come.
            encoding: of these.
        """
        self._rate_hz = rate_hz
        self._encoding: Encoding = encoding
        self._rest = b""  # half a sample
        self._resampler = self._make_resampler()

    def push(self, data: bytes) -> NDArray[np.float32]:
        """Return what these bytes complete (n,), float32, 16 kHz."""
        data = self._rest + data
        whole = len(data) - len(data) % SAMPLE_BYTES[self._encoding]
        self._rest = data[whole:]
        samples = self._samples(data[:whole]) / np.float32(_FULL_SCALE)
        return samples if self._resampler is None else self._resampler.resample_chunk(samples)

    def _samples(self, data: bytes) -> NDArray[np.float32]:
        if self._encoding == "pcm16":
            return np.frombuffer(data, "<i2").astype(np.float32)
        return _G711[self._encoding][np.frombuffer(data, np.uint8)]

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
