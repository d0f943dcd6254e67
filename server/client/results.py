"""What the server answers, as values. Times are in seconds from the recording's start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from server.client.errors import UnexpectedAnswerError


@dataclass(frozen=True, slots=True)
class Word:
    """A word and when it was said."""

    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One of several answers to a segment; `score` is its mean log-probability."""

    text: str
    score: float


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of speech.

    Attributes:
        start_s: where it begins.
        end_s: where it ends.
        text: what was said.
        finish_reason: stop, length (the token cap) or loop.
        words: None if not asked for, or if the checkpoint cannot place them.
        hypotheses: the n best, the best first; empty if not asked for.
    """

    start_s: float
    end_s: float
    text: str
    finish_reason: str
    words: tuple[Word, ...] | None
    hypotheses: tuple[Hypothesis, ...]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its text in UTF-8, and the natural logarithm of its probability."""

    text: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds a request spent in each stage; `total` includes the upload."""

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
        timings: seconds by stage.
        segments: None if neither times nor several answers were asked for.
        alignment: where times come from, `ctc` or `segment`; None without segments.
        logprobs: of each token; None if not asked for.
        request_id: names the request in the server's log.
    """

    text: str
    language: str | None
    duration_s: float
    timings: Timings
    segments: tuple[Segment, ...] | None
    alignment: str | None
    logprobs: tuple[TokenLogprob, ...] | None
    request_id: str | None


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of a transcript under way: new, and final."""

    text: str


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a long recording is done.

    Attributes:
        processed_s: seconds up to which all is transcribed.
        duration_s: of the recording; None until the server knows.
    """

    processed_s: float
    duration_s: float | None


StreamEvent = TextDelta | Progress | Transcription
"""What a stream yields; the transcription is the last."""


def transcription_from(body: dict[str, Any], request_id: str | None) -> Transcription:
    """Read the server's `json`.

    Raises:
        UnexpectedAnswerError: it is something else.
    """
    try:
        return _transcription(body, request_id)
    except (KeyError, TypeError) as error:
        raise UnexpectedAnswerError(f"the answer is no transcript: {error!r}") from error


def _transcription(body: dict[str, Any], request_id: str | None) -> Transcription:
    segments, logprobs, timings = body.get("segments"), body.get("logprobs"), body["timings"]
    return Transcription(
        text=body["text"],
        language=body["language"],
        duration_s=body["duration"],
        timings=Timings(**{name: timings[name] for name in Timings.__dataclass_fields__}),
        segments=None if segments is None else tuple(_segment(each) for each in segments),
        alignment=body.get("alignment"),
        logprobs=None
        if logprobs is None
        else tuple(TokenLogprob(bytes(each["bytes"]), each["logprob"]) for each in logprobs),
        request_id=request_id,
    )


def _segment(body: dict[str, Any]) -> Segment:
    words = body.get("words")
    return Segment(
        start_s=body["start"],
        end_s=body["end"],
        text=body["text"],
        finish_reason=body["finish_reason"],
        words=None
        if words is None
        else tuple(Word(each["word"], each["start"], each["end"]) for each in words),
        hypotheses=tuple(
            Hypothesis(each["text"], each["score"]) for each in body.get("hypotheses") or ()
        ),
    )
