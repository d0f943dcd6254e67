"""Cut a recording of any length into excerpts that the model can take, while it is decoded.

What the model can take at once stays in one piece, exactly as it was recorded, unless nobody
speaks in it: then nothing of it is transcribed. A longer recording is cut at its pauses; where
somebody speaks on for too long, at the quietest point of the second half of the excerpt. Cuts lose
nothing and double nothing: an excerpt begins at the sample at which the one before was cut. Only
audio without speech is left out.

At most what stays in one piece, a block of the decoder's and the padding around speech are held at
a time.

All positions are counted in frames of `FRAME_SAMPLES`, from the recording's begin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from server.audio.clip import SAMPLE_RATE_HZ, Excerpt, Progress
from server.audio.vad import FRAME_SAMPLES, SpeechDetector

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

# Silero's thresholds: speech begins above the first, and ends below the second.
_SPEECH_BEGINS = 0.5
_SPEECH_ENDS = 0.35
_MIN_SPEECH_FRAMES = 3  # 96 ms; a click is no word
_PAUSE_FRAMES = 16  # 0.5 s; a shorter silence stays within an excerpt
_GLANCE_FRAMES = 16  # 0.5 s; looked at together where it matters only whether somebody speaks
_PADDING_FRAMES = 6  # 0.19 s of silence kept around speech, for what the detector hears late


def excerpts(
    blocks: Iterable[NDArray[np.float32]],
    *,
    whole_samples: int,
    max_samples: int,
    finds_speech: bool = True,
    places_speech: bool = True,
) -> Iterator[Excerpt | Progress]:
    """Cut a waveform that comes in blocks.

    Args:
        blocks: the waveform's pieces (n,), float32, mono, 16 kHz.
        whole_samples: longest recording that stays in one piece.
        max_samples: longest excerpt of one that does not.
        finds_speech: leave out what is no speech; otherwise all of it is transcribed.
        places_speech: find where speech begins and ends in one that stays in one piece; otherwise
            it is looked through only until somebody speaks, and taken for speech from end to end.

    Yields:
        Excerpts in order, and after each block how far the decoding has come.
    """
    blocks = iter(blocks)
    held: list[NDArray[np.float32]] = []
    decoded = 0
    for block in blocks:
        held.append(block)
        decoded += len(block)
        if decoded > whole_samples:
            break
    head = np.concatenate(held) if held else np.zeros(0, np.float32)
    if decoded <= whole_samples:
        yield from _whole(head, finds_speech=finds_speech, places_speech=places_speech)
        yield Progress(decoded / SAMPLE_RATE_HZ, is_long=False, is_done=True)
        return
    yield Progress(decoded / SAMPLE_RATE_HZ, is_long=True)
    segmenter = Segmenter(max_samples, SpeechDetector() if finds_speech else None)
    yield from segmenter.push(head)
    del held, head
    for block in blocks:
        decoded += len(block)
        yield from segmenter.push(block)
        yield Progress(decoded / SAMPLE_RATE_HZ, is_long=True)
    yield from segmenter.finish()
    yield Progress(decoded / SAMPLE_RATE_HZ, is_long=True, is_done=True)


def _whole(
    waveform: NDArray[np.float32], *, finds_speech: bool, places_speech: bool
) -> Iterator[Excerpt]:
    """The waveform in one piece, if somebody speaks in it."""
    if not finds_speech:
        yield Excerpt(waveform, 0, 0, len(waveform))
        return
    n_frames = -(-len(waveform) // FRAME_SAMPLES)
    padded = np.zeros(n_frames * FRAME_SAMPLES, np.float32)
    padded[: len(waveform)] = waveform
    frames = padded.reshape(-1, FRAME_SAMPLES)
    detector, is_speech = SpeechDetector(), Hysteresis()
    speech: list[int] = []
    for first in range(0, n_frames, _GLANCE_FRAMES):
        probabilities = detector.push(frames[first : first + _GLANCE_FRAMES])
        speech += [i for i, value in enumerate(probabilities, first) if is_speech.push(value)]
        if len(speech) >= _MIN_SPEECH_FRAMES and not places_speech:
            yield Excerpt(waveform, 0, 0, len(waveform))
            return
    if len(speech) >= _MIN_SPEECH_FRAMES:
        end = min(len(waveform), (speech[-1] + 1) * FRAME_SAMPLES)
        yield Excerpt(waveform, 0, speech[0] * FRAME_SAMPLES, end)


class Hysteresis:
    """Tells speech from probabilities: it begins when they are high, and ends when they are low."""

    def __init__(self) -> None:
        """Begin outside of speech."""
        self._is_speech = False

    def push(self, probability: float) -> bool:
        """Whether the next frame is speech."""
        threshold = _SPEECH_ENDS if self._is_speech else _SPEECH_BEGINS
        self._is_speech = bool(probability >= threshold)
        return self._is_speech


class Segmenter:
    """Cuts a recording into excerpts as it comes."""

    def __init__(self, max_samples: int, detector: SpeechDetector | None) -> None:
        """Begin before the first sample.

        Args:
            max_samples: longest excerpt.
            detector: finds speech; None takes everything for speech.
        """
        self._max_frames = max_samples // FRAME_SAMPLES
        self._detector = detector
        self._min_speech_frames = _MIN_SPEECH_FRAMES if detector else 1
        self._hysteresis = Hysteresis()
        self._rest = np.zeros(0, np.float32)  # less than a frame
        self._first = 0  # frame that the next two begin with
        self._samples = np.zeros(0, np.float32)
        self._is_speech: list[bool] = []  # of the frames that were looked at
        self._start: int | None = None  # of the excerpt that is open
        self._last_speech = 0  # in it
        self._continues = False  # it begins where the last one was cut
        self._earliest = 0  # that the next one may begin: no sample is given twice
        self._length: int | None = None  # of the recording, samples, once it is known

    def push(self, samples: NDArray[np.float32]) -> Iterator[Excerpt]:
        """Take the next samples (n,); yields the excerpts that they complete."""
        samples = np.concatenate([self._rest, samples])
        whole = len(samples) - len(samples) % FRAME_SAMPLES
        self._rest = samples[whole:].copy()
        yield from self._take(samples[:whole])

    def finish(self) -> Iterator[Excerpt]:
        """Yield what is left."""
        self._length = self._first * FRAME_SAMPLES + len(self._samples) + len(self._rest)
        if len(self._rest):
            missing = np.zeros(FRAME_SAMPLES - len(self._rest), np.float32)
            yield from self._take(np.concatenate([self._rest, missing]))
        if self._start is not None:
            yield from self._close(min(self._last_speech + 1 + _PADDING_FRAMES, self._now))

    @property
    def _now(self) -> int:
        """Behind the last frame that was looked at."""
        return self._first + len(self._is_speech)

    def _take(self, samples: NDArray[np.float32]) -> Iterator[Excerpt]:
        frames = samples.reshape(-1, FRAME_SAMPLES)
        self._samples = np.concatenate([self._samples, samples])
        probabilities = self._detector.push(frames) if self._detector else np.ones(len(frames))
        for probability in probabilities:
            self._is_speech.append(self._hysteresis.push(probability))
            yield from self._look()
        wanted = self._start
        if wanted is None:
            wanted = max(self._earliest, self._now - _PADDING_FRAMES)
        kept = wanted - self._first
        self._first, self._is_speech = wanted, self._is_speech[kept:]
        self._samples = self._samples[kept * FRAME_SAMPLES :].copy()

    def _look(self) -> Iterator[Excerpt]:
        """Open, close or cut an excerpt at the newest frame."""
        is_speech = self._is_speech[-1]
        if is_speech:
            self._last_speech = self._now - 1
        if self._start is None:
            if is_speech:
                self._start = max(self._earliest, self._last_speech - _PADDING_FRAMES)
        elif self._now - 1 - self._last_speech >= _PAUSE_FRAMES:
            yield from self._close(self._last_speech + 1 + _PADDING_FRAMES)
        elif self._now - self._start == self._max_frames:
            yield from self._cut(self._start)

    def _close(self, stop: int) -> Iterator[Excerpt]:
        yield from self._give(stop)
        self._start, self._continues = None, False

    def _cut(self, start: int) -> Iterator[Excerpt]:
        """Give up to the quietest point; what follows it opens the next excerpt."""
        middle = start + self._max_frames // 2
        first, last = (
            (middle - 1 - self._first) * FRAME_SAMPLES, (self._now - self._first) * FRAME_SAMPLES
        )  # fmt: skip
        loudness = np.square(self._samples[first:last].reshape(-1, FRAME_SAMPLES)).sum(axis=1)
        cut = middle + int((loudness[:-1] + loudness[1:]).argmin())
        yield from self._give(cut)
        speech = [frame for frame in range(cut, self._now) if self._flag(frame)]
        self._start = max(cut, speech[0] - _PADDING_FRAMES) if speech else None
        self._continues = bool(speech)

    def _give(self, stop: int) -> Iterator[Excerpt]:
        """The open excerpt up to a frame, unless it is a click."""
        if self._start is None:
            return
        self._earliest = stop
        speech = [frame for frame in range(self._start, stop) if self._flag(frame)]
        if not speech or (len(speech) < self._min_speech_frames and not self._continues):
            return
        offset = self._first * FRAME_SAMPLES
        end = self._clip(stop * FRAME_SAMPLES)
        waveform = self._samples[self._start * FRAME_SAMPLES - offset : end - offset].copy()
        speech_end = self._clip((speech[-1] + 1) * FRAME_SAMPLES)
        begin = self._start * FRAME_SAMPLES
        yield Excerpt(waveform, begin, speech[0] * FRAME_SAMPLES, speech_end)

    def _flag(self, frame: int) -> bool:
        return self._is_speech[frame - self._first]

    def _clip(self, samples: int) -> int:
        return samples if self._length is None else min(samples, self._length)
