"""What audio may be at most, checked against a header's claims before anything is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from server.errors import AudioTooLongError, AudioTruncatedError, AudioUnsupportedError

if TYPE_CHECKING:
    from server.audio.probe import Probe


@dataclass(frozen=True, slots=True)
class AudioLimits:
    """Bounds that hold while an upload is decoded.

    Attributes:
        max_audio_s: longest clip, seconds.
        max_channels: most channels.
        min_rate_hz: lowest sample rate.
        max_rate_hz: highest sample rate.
    """

    max_audio_s: float
    max_channels: int = 2
    min_rate_hz: int = 4_000
    max_rate_hz: int = 192_000


def check_header(header: Probe, limits: AudioLimits) -> None:
    """Refuse by the header's own claims, before anything is decoded.

    Raises:
        AudioTruncatedError: the container announces more bytes than came.
        AudioUnsupportedError: sample rate or channels out of bounds.
        AudioTooLongError: it announces more seconds than allowed.
    """
    if header.truncated:
        raise AudioTruncatedError(
            f"the {header.container.upper()} file breaks off: its header announces more than came"
        )
    if header.sample_rate_hz is not None and header.channels is not None:
        check_format(header.sample_rate_hz, header.channels, limits)
    if header.duration_s is not None and header.duration_s > limits.max_audio_s:
        raise too_long(header, limits)


def check_format(rate_hz: int, channels: int, limits: AudioLimits) -> None:
    """Raise AudioUnsupportedError where sample rate or channels are out of bounds."""
    if not limits.min_rate_hz <= rate_hz <= limits.max_rate_hz:
        raise AudioUnsupportedError(
            f"a sample rate of {rate_hz} Hz is outside {limits.min_rate_hz} to {limits.max_rate_hz}"
        )
    if not 1 <= channels <= limits.max_channels:
        raise AudioUnsupportedError(f"{channels} channels; at most {limits.max_channels} are taken")


def too_long(header: Probe, limits: AudioLimits) -> AudioTooLongError:
    """Return the error that names the limit, and the length where the header tells it."""
    claimed = header.duration_s or 0.0
    length = f"{claimed:.2f} s" if claimed > limits.max_audio_s else "more than that"
    return AudioTooLongError(
        f"the audio is too long: at most {limits.max_audio_s:g} s are taken, this is {length}"
    )
