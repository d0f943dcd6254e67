"""What the OpenAPI document says of requests and answers that FastAPI cannot tell by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from server import formats
from server.api.events import EXAMPLE as EVENTS_EXAMPLE
from server.api.schemas import ErrorBody
from server.transcription import Segment, StageTimings, Transcription

if TYPE_CHECKING:
    from pydantic import BaseModel

_RECORDING = (
    "The recording: WAV, FLAC, OGG (Vorbis or Opus), MP3, M4A, AAC or WebM; told by its content, "
    "whatever its name."
)
_TEXT = "Where did you find that apple?"
_SAMPLE = Transcription(
    text=_TEXT,
    language="en",
    duration_s=2.48,
    segments=(Segment(0.0, 2.48, _TEXT, None, (), None, "stop"),),
    alignment="segment",
    timings=StageTimings(0.0, 0.0, 0.0, 0.0, 0.0),
)
_STATUSES = {
    400: ("invalid_request", "unknown field 'lang'; this endpoint takes file, language", "lang",
          "No usable form or audio: unknown field, empty, truncated, unreadable, NaN."),
    401: ("invalid_api_key", "the API key is not one that this server knows", None,
          "The server has keys, and this is none of them."),
    404: ("model_not_found", "no model 'nope' here; there is default", "model",
          "No such model."),
    405: ("method_not_allowed", "Method Not Allowed: GET /transcribe", None, "Another method."),
    408: ("upload_stalled", "nothing more of the upload came for 30 s", "file",
          "The upload's bytes have stopped coming."),
    413: ("audio_too_long", "the audio is too long: at most 30 s are taken, this is 31.00 s",
          "file", "Too many bytes or too many seconds."),
    415: ("audio_unrecognised", "the file is not audio in a known container", "file",
          "Not audio, or a codec, sample rate or channel count that is not taken."),
    429: ("queue_full", "128 requests are waiting already", None,
          "Too much waits already, or the key's share is used up; come back after Retry-After "
          "seconds."),
    500: ("inference_failed", "the model failed on this audio", None,
          "The server failed on this request."),
    503: ("not_ready", "the model is still loading", None, "Not ready yet, or shutting down."),
    504: ("deadline_exceeded", "the upload still waited to be decoded", None,
          "The answer would have come too late."),
}  # fmt: skip


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe error answers, each with an example."""
    return {status: _error(status) for status in statuses}


def _error(status: int) -> dict[str, Any]:
    code, message, param, description = _STATUSES[status]
    family = "invalid_request_error" if status < 429 else "capacity_error"  # noqa: PLR2004 - HTTP statuses
    example = {
        "error": {
            "message": message,
            "type": "internal_error" if status == 500 else family,  # noqa: PLR2004 - HTTP statuses
            "code": code,
            "param": param,
            "request_id": "6a0f4bd2c5ab4b2e9f5e6d1c2b3a4958",
        }
    }
    answer: dict[str, Any] = {
        "model": ErrorBody,
        "description": description,
        "content": {"application/json": {"example": example}},
    }
    if status == 429:  # noqa: PLR2004 - HTTP statuses
        answer["headers"] = {
            "Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}
        }
    return answer


def form_body(form: type[BaseModel], *, files: bool, raw: bool) -> dict[str, Any]:
    """Describe a request body.

    Args:
        form: the fields besides the recording.
        files: whether several recordings may come.
        raw: whether the body may be the recording, with the fields in the query.
    """
    recording: dict[str, Any] = {"type": "string", "format": "binary", "description": _RECORDING}
    if files:
        recording = {
            "type": "array",
            "items": {"type": "string", "format": "binary"},
            "minItems": 1,
            "description": f"{_RECORDING} Several are answered together, in their order.",
        }
    properties = _properties(form)
    schema = {
        "type": "object",
        "required": ["file"],
        "additionalProperties": False,
        "properties": {"file": recording, **properties},
    }
    content: dict[str, Any] = {"multipart/form-data": {"schema": schema}}
    description: dict[str, Any] = {"requestBody": {"required": True, "content": content}}
    if raw:
        binary = {"schema": {"type": "string", "format": "binary"}}
        content["audio/*"] = binary
        content["application/octet-stream"] = binary
        description["parameters"] = [
            {
                "name": name,
                "in": "query",
                "required": False,
                "description": schema.get("description", ""),
                "schema": {k: v for k, v in schema.items() if k != "description"},
            }
            for name, schema in properties.items()
        ]
    return description


def _properties(form: type[BaseModel]) -> dict[str, Any]:
    """The fields' schemas; null is dropped, since a form cannot say it."""
    properties: dict[str, Any] = form.model_json_schema(by_alias=True)["properties"]
    for schema in properties.values():
        schema.pop("title", None)
        if "anyOf" in schema:
            (kind,) = (each for each in schema.pop("anyOf") if each.get("type") != "null")
            schema.update(kind)
        if schema.get("default", ...) is None:
            del schema["default"]
    return properties


def formats_answer(*names: str, description: str) -> dict[str, Any]:
    """Describe the answers that are no JSON: `names` of formats, and server-sent events."""
    samples = {
        "text": ("text/plain", formats.to_text(_SAMPLE)),
        "srt": ("application/x-subrip", formats.to_srt(_SAMPLE)),
        "vtt": ("text/vtt", formats.to_vtt(_SAMPLE)),
        "tsv": ("text/tab-separated-values", formats.to_tsv(_SAMPLE)),
        "events": ("text/event-stream", EVENTS_EXAMPLE),
    }
    content = {
        media_type: {"schema": {"type": "string"}, "example": example}
        for media_type, example in (samples[name] for name in (*names, "events"))
    }
    return {"description": description, "content": content}


TRANSCRIPTION_ERRORS = errors(400, 401, 408, 413, 415, 429, 500, 503, 504)
