"""What the rest of the server knows of an engine, and an engine of its model.

    admitted (a slot is held) -> decoded -> submitted: waiting -> batched -> done

All times are seconds on the monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One clip to transcribe.

    Attributes:
        id: names it in logs.
        waveform: (N,) float32, mono, 16 kHz.
        audio_s: its length, seconds.
        deadline_s: when its answer is no longer wanted; None for never.
        prompt: replaces the checkpoint's own.
    """

    id: str
    waveform: NDArray[np.float32]
    audio_s: float
    deadline_s: float | None = None
    prompt: str | None = None


@dataclass(frozen=True, slots=True)
class EngineResult:
    """A clip's transcript.

    Attributes:
        text: what was said; empty where nothing was.
        language: ISO 639-1 code, None where the model does not tell.
        finish_reason: stop at the end of the text, length at the token cap.
        tokens: generated, without the end token.
        queue_s: from submission until its batch began.
        encode_s: its batch's time from waveforms to encoder frames.
        generate_s: its batch's time from encoder frames to text.
        batch_size: clips in its batch.
    """

    text: str
    language: str | None
    finish_reason: str
    tokens: int
    queue_s: float
    encode_s: float
    generate_s: float
    batch_size: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """An engine at this moment.

    Attributes:
        alive: it takes requests.
        admitted: requests that hold a slot.
        queued: submitted, and not yet in a batch.
        running: in the running batch.
        drain_rate: requests finished in a second of work; None before the first batch.
    """

    alive: bool
    admitted: int
    queued: int
    running: int
    drain_rate: float | None


@dataclass(frozen=True, slots=True)
class BatchReport:
    """One batch that has run.

    Attributes:
        clips: in it.
        audio_s: their length together.
        padded_audio_s: what the device worked on: clips times the longest.
        busy_s: time the device took.
        failed: the batch raised; its clips are tried one by one.
    """

    clips: int
    audio_s: float
    padded_audio_s: float
    busy_s: float
    failed: bool


class Engine(Protocol):
    """Turns waveforms into transcripts, many at a time. Methods run on one event loop."""

    @property
    def max_audio_s(self) -> float:
        """Longest clip, seconds; known after `start`."""

    async def start(self) -> None:
        """Load and warm up; the loop stays free meanwhile."""

    def admit(self) -> AbstractContextManager[None]:
        """Hold a slot for a request, from before its decoding until its answer.

        Raises:
            QueueFullError: as many wait as may.
            ShuttingDownError: the engine drains.
        """

    async def submit(self, request: EngineRequest) -> EngineResult:
        """Transcribe a clip; cancelled, it leaves the queue.

        Raises:
            DeadlineExceededError: it still waited at its deadline.
            InferenceFailedError: the model failed on this clip alone.
            ShuttingDownError: the engine stopped before its turn.
        """

    async def drain(self, timeout_s: float) -> None:
        """Admit no more, wait for what is admitted; after `timeout_s`, refuse the rest."""

    async def stop(self) -> None:
        """End at once and free the device."""

    def stats(self) -> EngineStats:
        """Return what is where."""


@dataclass(frozen=True, slots=True)
class BackendTranscript:
    """One clip's answer from the model."""

    text: str
    language: str | None
    finish_reason: str
    tokens: int


@dataclass(frozen=True, slots=True)
class BackendBatch:
    """A batch's answers, in order, and the seconds its two halves took."""

    transcripts: list[BackendTranscript]
    encode_s: float
    generate_s: float


class Backend(Protocol):
    """The model on its device. Called from one thread only."""

    @property
    def max_audio_s(self) -> float:
        """Longest clip, seconds."""

    def warm_up(self) -> None:
        """Run once, so that the first request pays for nothing but itself."""

    def transcribe(
        self, waveforms: Sequence[NDArray[np.float32]], prompt: str | None
    ) -> BackendBatch:
        """Transcribe mono 16 kHz clips, each (N_i,) float32, in one batch."""
