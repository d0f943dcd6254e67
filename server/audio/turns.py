"""Find turns in audio that comes in live: when somebody begins to speak, goes on and has stopped.

Decisions are made frame by frame, so that how the audio is split on its way changes nothing.
A turn that is longer than the model takes is given in pieces, cut at the quietest point of their
second half; nothing is lost or doubled at a cut. Positions are samples at 16 kHz.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from server.audio.clip import SAMPLE_RATE_HZ
from server.audio.vad import FRAME_SAMPLES

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MIN_SPEECH_FRAMES = 3  # in a row, 96 ms; a click is no word
_MAX_TRAILING_FRAMES = 8  # 0.26 s of silence kept behind speech, for what is heard late
# Speech ends below the threshold by this much, as Silero does it.
_HYSTERESIS = 0.15
_MIN_END_THRESHOLD = 0.01


class Detector(Protocol):
    """Tells how likely it is that somebody speaks; `SpeechDetector` is one."""

    def push(self, frames: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the probability of speech (n,) in the next frames (n, FRAME_SAMPLES)."""


@dataclass(frozen=True, slots=True)
class VadOptions:
    """When a turn begins and ends.

    Attributes:
        threshold: probability above which a frame is speech.
        prefix_padding_ms: audio kept from before the speech.
        silence_duration_ms: silence that ends the turn.
    """

    threshold: float = 0.5
    prefix_padding_ms: int = 300
    silence_duration_ms: int = 500


@dataclass(frozen=True, slots=True)
class TurnBegan:
    """Somebody speaks; the turn's audio begins at `start`, its padding included."""

    start: int


@dataclass(frozen=True, slots=True)
class TurnGrew:
    """The turn goes on; `waveform` (N,) is its open piece so far."""

    waveform: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TurnPiece:
    """A piece of the turn is complete; `is_cut`: somebody speaks on behind it."""

    waveform: NDArray[np.float32]
    is_cut: bool = False


@dataclass(frozen=True, slots=True)
class TurnEnded:
    """The turn is over; its audio ends at `end`."""

    end: int


TurnEvent = TurnBegan | TurnGrew | TurnPiece | TurnEnded


class TurnFinder:
    """Turns audio into turns. Holds the open piece, and the padding while nobody speaks."""

    def __init__(
        self,
        detector: Detector,
        options: VadOptions,
        *,
        max_samples: int,
        growth_samples: int,
        position: int = 0,
    ) -> None:
        """Begin between turns.

        Args:
            detector: that has heard nothing yet.
            options: when turns begin and end.
            max_samples: longest piece.
            growth_samples: how much a piece grows between two `TurnGrew`; 0 for none of these.
            position: of the first sample.
        """
        self._detector = detector
        self._threshold = options.threshold
        self._end_threshold = max(options.threshold - _HYSTERESIS, _MIN_END_THRESHOLD)
        self._prefix_frames = _frames_of(options.prefix_padding_ms)
        self._silence_frames = max(1, _frames_of(options.silence_duration_ms))
        self._max_frames = max_samples // FRAME_SAMPLES
        self._growth_frames = math.ceil(growth_samples / FRAME_SAMPLES)
        self._position = position
        self._rest = np.zeros(0, np.float32)  # less than a frame
        self._frames: list[NDArray[np.float32]] = []  # the last ones, up to `_now`
        self._now = 0  # frames that were looked at
        self._is_speech = False
        self._run = 0  # speech frames in a row
        self._last_speech = 0
        self._start: int | None = None  # of the open piece
        self._grown = 0  # length of the open piece at its last `TurnGrew`
        self._earliest = 0  # that the next piece may begin: no sample is given twice

    @property
    def is_open(self) -> bool:
        """Whether a turn goes on."""
        return self._start is not None

    @property
    def held_samples(self) -> int:
        """Samples in memory."""
        return len(self._frames) * FRAME_SAMPLES + len(self._rest)

    def push(self, samples: NDArray[np.float32]) -> list[TurnEvent]:
        """Take the next samples (n,)."""
        samples = np.concatenate([self._rest, samples])
        whole = len(samples) - len(samples) % FRAME_SAMPLES
        self._rest = samples[whole:].copy()
        frames = samples[:whole].reshape(-1, FRAME_SAMPLES)
        events: list[TurnEvent] = []
        for frame, probability in zip(frames, self._detector.push(frames), strict=True):
            self._take(frame, float(probability), events)
        return events

    def commit(self, tail: NDArray[np.float32]) -> list[TurnEvent]:
        """End the open turn here, behind `tail`; without one nothing happens."""
        events = self.push(tail)
        if self._start is not None:
            waveform = np.concatenate([*self._frames_from(self._start), self._rest])
            if self._last_speech >= self._start:
                events.append(TurnPiece(waveform))
            end = self._now * FRAME_SAMPLES + len(self._rest)
            events.append(TurnEnded(self._position + end))
            self._close(self._now)
            self._drop_rest()
        return events

    def clear(self, unheard_samples: int = 0) -> None:
        """Forget the open turn, what is held besides, and what was to come next."""
        self._close(self._now)
        self._drop_rest()
        self._position += unheard_samples

    def _drop_rest(self) -> None:
        # The frames that follow begin at its end.
        self._position += len(self._rest)
        self._rest = np.zeros(0, np.float32)

    def _take(
        self, frame: NDArray[np.float32], probability: float, events: list[TurnEvent]
    ) -> None:
        self._frames.append(frame)
        self._now += 1
        threshold = self._end_threshold if self._is_speech else self._threshold
        self._is_speech = probability >= threshold
        self._run = self._run + 1 if self._is_speech else 0
        if self._is_speech:
            self._last_speech = self._now - 1
        if self._start is None:
            self._look_for_begin(events)
        elif self._now - 1 - self._last_speech >= self._silence_frames:
            self._end(events)
        elif self._now - self._start >= self._max_frames:
            self._cut(events)
        elif self._growth_frames and self._now - self._start - self._grown >= self._growth_frames:
            self._grown = self._now - self._start
            events.append(TurnGrew(np.concatenate(self._frames_from(self._start))))

    def _look_for_begin(self, events: list[TurnEvent]) -> None:
        if self._run < _MIN_SPEECH_FRAMES:
            self._keep_from(max(self._earliest, self._now - self._prefix_frames - self._run))
            return
        self._start = max(self._earliest, self._now - self._run - self._prefix_frames)
        self._grown = 0
        self._keep_from(self._start)
        events.append(TurnBegan(self._position + self._start * FRAME_SAMPLES))

    def _end(self, events: list[TurnEvent]) -> None:
        trailing = min(self._silence_frames, _MAX_TRAILING_FRAMES)
        end = min(self._now, max(self._last_speech + 1 + trailing, self._start or 0))
        self._give(end, events)
        events.append(TurnEnded(self._position + end * FRAME_SAMPLES))
        self._close(end)

    def _cut(self, events: list[TurnEvent]) -> None:
        """Give up to the quietest point; what follows it opens the next piece."""
        start = self._start or 0
        middle = start + self._max_frames // 2
        second_half = np.stack(self._frames_from(middle - 1))
        loudness = np.square(second_half).sum(axis=1)
        cut = middle + int((loudness[:-1] + loudness[1:]).argmin())
        self._give(cut, events, is_cut=True)
        self._start, self._grown = cut, 0
        self._keep_from(cut)

    def _give(self, end: int, events: list[TurnEvent], *, is_cut: bool = False) -> None:
        """The open piece up to a frame, unless it is what was left of a turn, and silent."""
        start = self._start or 0
        if end > start and self._last_speech >= start:
            held = self._frames_from(start)[: end - start]
            events.append(TurnPiece(np.concatenate(held), is_cut))

    def _close(self, end: int) -> None:
        self._start, self._run, self._is_speech = None, 0, False
        self._earliest = end
        self._keep_from(max(end, self._now - self._prefix_frames))

    def _frames_from(self, frame: int) -> list[NDArray[np.float32]]:
        return self._frames[frame - (self._now - len(self._frames)) :]

    def _keep_from(self, frame: int) -> None:
        first = self._now - len(self._frames)
        del self._frames[: max(0, frame - first)]


def _frames_of(milliseconds: int) -> int:
    return math.ceil(milliseconds * SAMPLE_RATE_HZ / 1000 / FRAME_SAMPLES)
