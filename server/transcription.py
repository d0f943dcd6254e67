"""What a transcription is, whoever asks for it and in whatever form. All times are in seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from server.engine.decoding import FinishReason

Timestamps = Literal["none", "segment", "word"]
"""How finely a transcript is placed in time."""

Alignment = Literal["ctc", "segment"]
"""Where times come from: `ctc`, forced alignment of the text to the CTC head; `segment`, no more
than where the audio was cut."""


@dataclass(frozen=True, slots=True)
class Word:
    """A word and when it was said."""

    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One of several answers to a clip, the best first; `score` is its mean log-probability."""

    text: str
    score: float


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of speech.

    Attributes:
        start_s: where it begins in the recording.
        end_s: where it ends.
        text: what was said, without surrounding space.
        words: placed in time; None unless word times were asked for and the checkpoint can.
        token_ids: of the LLM.
        logprobs: of the tokens, natural logarithms; None if not asked for.
        token_bytes: what each token adds to the text, in UTF-8; None where `logprobs` is.
        finish_reason: stop, length or loop.
        hypotheses: the n best, if several were asked for.
    """

    start_s: float
    end_s: float
    text: str
    words: tuple[Word, ...] | None
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish_reason: FinishReason
    hypotheses: tuple[Hypothesis, ...] = ()
    token_bytes: tuple[bytes, ...] | None = None


@dataclass(frozen=True, slots=True)
class StageTimings:
    """Seconds a request spent in each stage.

    Attributes:
        decode: waiting for a decoding process, and decoding.
        queue: waiting for its turn.
        encode: its batches' time from waveforms to audio embeddings.
        generate: from its audio embeddings to its text.
        total: from the request's first byte to the answer, the upload included.
    """

    decode: float
    queue: float
    encode: float
    generate: float
    total: float


@dataclass(frozen=True, slots=True)
class Transcription:
    """A recording's transcript.

    Attributes:
        text: what was said; empty where nothing was.
        language: ISO 639-1 code, None where the model does not tell.
        duration_s: of the audio.
        segments: in order; none where nothing was said.
        alignment: where the segments' and words' times come from.
        timings: seconds by stage.
    """

    text: str
    language: str | None
    duration_s: float
    segments: tuple[Segment, ...]
    alignment: Alignment
    timings: StageTimings
