"""Bodies of requests and answers. All times are in seconds."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from server.transcription import Alignment

TIMINGS_EXAMPLE: dict[str, Any] = {
    "decode": 0.004,
    "queue": 0.001,
    "encode": 0.012,
    "generate": 0.061,
    "total": 0.08,
}


class Timings(BaseModel):
    """Seconds a request spent in each stage."""

    decode: float = Field(description="Waiting for a decoding process, and decoding.")
    queue: float = Field(description="Waiting for its turn.")
    encode: float = Field(description="Its batch's time from waveforms to audio embeddings.")
    generate: float = Field(description="From its audio embeddings to its text.")
    total: float = Field(description="From the request's start to the answer, upload included.")


class WordBody(BaseModel):
    """A word and when it was said."""

    word: str
    start: float
    end: float


class HypothesisBody(BaseModel):
    """One of several answers to a segment."""

    text: str
    score: float = Field(
        description="Mean log-probability of its tokens, weighed with the CTC head's where the "
        "checkpoint decodes jointly."
    )


class SegmentBody(BaseModel):
    """A stretch of speech."""

    start: float
    end: float
    text: str
    finish_reason: str = Field(description="stop, length (the token cap) or loop.")
    words: list[WordBody] | None = Field(
        None, description="Null where the checkpoint cannot place words; absent if not asked for."
    )
    hypotheses: list[HypothesisBody] | None = Field(
        None, description="The n best, the best first; absent if not asked for."
    )


class LogprobBody(BaseModel):
    """A token and how sure the model was of it."""

    token: str = Field(description="Its text; U+FFFD where it is a part of a character.")
    bytes: list[int] = Field(description="Its text in UTF-8.")
    logprob: float = Field(description="Natural logarithm of its probability.")


def logprob_body(text: bytes, logprob: float) -> LogprobBody:
    """Describe a token by its UTF-8 and its log-probability."""
    return LogprobBody(token=text.decode(errors="replace"), bytes=list(text), logprob=logprob)


class UsageBody(BaseModel):
    """What the request used."""

    type: Literal["duration"]
    seconds: float = Field(description="Of audio.")


class TranscriptionBody(BaseModel):
    """A transcript."""

    text: str = Field(description="What was said; empty where nothing was.")
    language: str | None = Field(description="ISO 639-1 code; null where the model does not tell.")
    duration: float = Field(description="Length of the audio, seconds.")
    timings: Timings
    alignment: Alignment | None = Field(
        None,
        description="Where times come from: ctc, forced alignment; segment, no more than where the "
        "audio was cut. Absent without segments.",
    )
    segments: list[SegmentBody] | None = Field(
        None, description="With timestamps or n_best only; none where nothing was said."
    )
    logprobs: list[LogprobBody] | None = Field(None, description="Absent if not asked for.")

    model_config = {
        "json_schema_extra": {
            "examples": [
                {
                    "text": "Where did you find that apple?",
                    "language": "en",
                    "duration": 2.48,
                    "timings": TIMINGS_EXAMPLE,
                }
            ]
        }
    }


class VerboseSegmentBody(BaseModel):
    """A segment as OpenAI's API has it."""

    id: int
    seek: int = Field(description="Its start in frames of 10 ms.")
    start: float
    end: float
    text: str
    tokens: list[int]
    temperature: float
    avg_logprob: float | None = Field(description="Null where it has no tokens.")
    compression_ratio: float
    no_speech_prob: float | None = Field(description="Null: these models do not tell it.")
    finish_reason: str = Field(description="stop, length (the token cap) or loop.")


class VerboseBody(BaseModel):
    """A transcript in OpenAI's `verbose_json`."""

    task: Literal["transcribe"]
    language: str | None = Field(description="ISO 639-1 code; null where the model does not tell.")
    duration: float = Field(description="Length of the audio, seconds.")
    text: str
    alignment: Alignment
    usage: UsageBody
    segments: list[VerboseSegmentBody] | None = None
    words: list[WordBody] | None = Field(
        None, description="Null where the checkpoint cannot place words; absent if not asked for."
    )
    timings: Timings | None = Field(None, description="From /transcribe only.")

    model_config = {
        "json_schema_extra": {
            "examples": [
                {
                    "task": "transcribe",
                    "language": "en",
                    "duration": 2.48,
                    "text": "Where did you find that apple?",
                    "alignment": "segment",
                    "usage": {"type": "duration", "seconds": 2.48},
                    "segments": [
                        {
                            "id": 0,
                            "seek": 0,
                            "start": 0.0,
                            "end": 2.48,
                            "text": "Where did you find that apple?",
                            "tokens": [412, 96, 231],
                            "temperature": 0.0,
                            "avg_logprob": -0.21,
                            "compression_ratio": 0.79,
                            "no_speech_prob": None,
                            "finish_reason": "stop",
                        }
                    ],
                }
            ]
        }
    }


class OpenAIBody(BaseModel):
    """A transcript in OpenAI's `json`."""

    text: str
    usage: UsageBody
    logprobs: list[LogprobBody] | None = Field(None, description="Absent if not asked for.")

    model_config = {
        "json_schema_extra": {
            "examples": [
                {
                    "text": "Where did you find that apple?",
                    "usage": {"type": "duration", "seconds": 2.48},
                }
            ]
        }
    }


class ModelBody(BaseModel):
    """A model that can be asked for."""

    id: str
    object: Literal["model"]
    created: int = Field(description="When the server started, seconds since 1970.")
    owned_by: Literal["speechllm"]
    aliases: list[str] = Field(description="Other names that requests may use.")

    model_config = {
        "json_schema_extra": {
            "examples": [
                {
                    "id": "default",
                    "object": "model",
                    "created": 1764000000,
                    "owned_by": "speechllm",
                    "aliases": ["whisper-1"],
                }
            ]
        }
    }


class ModelListBody(BaseModel):
    """The models that can be asked for."""

    object: Literal["list"]
    data: list[ModelBody]


class HealthBody(BaseModel):
    """A health answer."""

    status: Literal["alive", "ready", "loading", "draining", "failed"]
    reason: str | None = Field(None, description="Why requests are not taken.")


class IndexBody(BaseModel):
    """What is where."""

    name: str
    version: str
    model: str
    endpoints: dict[str, str]


class ErrorDetail(BaseModel):
    """Why a request was not answered."""

    message: str = Field(description="For people.")
    type: Literal["invalid_request_error", "rate_limit_error", "capacity_error", "internal_error"]
    code: str = Field(description="For programs; stable.")
    param: str | None = Field(description="The form field at fault, if it is one.")
    request_id: str | None = Field(description="As in the X-Request-ID header.")


class ErrorBody(BaseModel):
    """The body of every error answer."""

    error: ErrorDetail


class ResultsBody(BaseModel):
    """Answers to several files, in their order; each a transcript or an error."""

    results: list[TranscriptionBody | VerboseBody | ErrorBody]
