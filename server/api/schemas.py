"""Bodies of requests and answers. All times are in seconds."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class Timings(BaseModel):
    """Seconds a request spent in each stage."""

    decode: float = Field(description="Waiting for a decoding process, and decoding.")
    queue: float = Field(description="Waiting for its turn.")
    encode: float = Field(description="Its batch's time from waveforms to audio embeddings.")
    generate: float = Field(description="From its audio embeddings to its text.")
    total: float = Field(description="From the request's start to the answer, upload included.")


class TranscriptionBody(BaseModel):
    """A transcript."""

    text: str = Field(description="What was said; empty where nothing was.")
    language: str | None = Field(description="ISO 639-1 code; null where the model does not tell.")
    duration: float = Field(description="Length of the audio, seconds.")
    timings: Timings

    model_config = {
        "json_schema_extra": {
            "examples": [
                {
                    "text": "Where did you find that apple?",
                    "language": "en",
                    "duration": 2.48,
                    "timings": {
                        "decode": 0.004,
                        "queue": 0.001,
                        "encode": 0.012,
                        "generate": 0.061,
                        "total": 0.08,
                    },
                }
            ]
        }
    }


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
    type: Literal["invalid_request_error", "capacity_error", "internal_error"]
    code: str = Field(description="For programs; stable.")
    param: str | None = Field(description="The form field at fault, if it is one.")
    request_id: str | None = Field(description="As in the X-Request-ID header.")


class ErrorBody(BaseModel):
    """The body of every error answer."""

    error: ErrorDetail
