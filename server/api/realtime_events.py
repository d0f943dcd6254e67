"""The events of `WS /v1/realtime`, in OpenAI's shapes: what clients send, and what they are sent.

Source: the types of OpenAI's Python SDK, `openai/types/realtime`.
"""

from __future__ import annotations

import base64
import json
import uuid
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from server import realtime
from server.api.errors import ERROR_TABLE, UNEXPECTED
from server.api.forms import MAX_PROMPT_CHARACTERS
from server.api.schemas import logprob_body
from server.audio.turns import VadOptions
from server.errors import InvalidRequestError, ServerError
from server.realtime import RATES_HZ, SessionConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from server.audio.pcm import Encoding

_MAX_SILENCE_MS = 10_000
_G711_HZ = 8_000
_ENCODINGS: dict[str, Encoding] = {
    "audio/pcm": "pcm16",
    "audio/pcmu": "pcmu",
    "audio/pcma": "pcma",
}
_FORMATS = {encoding: type_ for type_, encoding in _ENCODINGS.items()}
# What the formats were called in earlier versions of the API.
_FORMER_FORMATS = {"pcm16": "audio/pcm", "g711_ulaw": "audio/pcmu", "g711_alaw": "audio/pcma"}
_LOGPROBS = "item.input_audio_transcription.logprobs"


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Format(_Fields):
    type: Literal["audio/pcm", "audio/pcmu", "audio/pcma"] = "audio/pcm"
    rate: Literal[24_000, 16_000, 8_000] | None = None

    @property
    def encoding(self) -> Encoding:
        """How a sample is written."""
        return _ENCODINGS[self.type]

    @property
    def rate_hz(self) -> int:
        """Samples a second.

        Raises:
            InvalidRequestError: G.711 at another rate than its own.
        """
        if self.encoding == "pcm16":
            return self.rate or RATES_HZ[0]
        if self.rate not in {None, _G711_HZ}:
            raise InvalidRequestError(
                f"{self.type} has {_G711_HZ} samples a second, not {self.rate}",
                param="session.audio.input.format.rate",
            )
        return _G711_HZ


class _Transcription(_Fields):
    model: str | None = None
    language: Annotated[str, Field(pattern="^[a-z]{2,3}$")] | None = None
    prompt: Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)] | None = None


class _ServerVad(_Fields):
    type: Literal["server_vad"]
    threshold: float = Field(0.5, ge=0, le=1)
    prefix_padding_ms: int = Field(300, ge=0, le=_MAX_SILENCE_MS)
    silence_duration_ms: int = Field(500, ge=0, le=_MAX_SILENCE_MS)
    # Of sessions that also answer; clients send them along.
    create_response: bool | None = None
    interrupt_response: bool | None = None
    idle_timeout_ms: None = None


def _format(value: Any) -> Any:  # noqa: ANN401 - not validated yet
    """Take the names that formats had in earlier versions of the API."""
    return {"type": _FORMER_FORMATS.get(value, value)} if isinstance(value, str) else value


class _Input(_Fields):
    format: Annotated[_Format, BeforeValidator(_format)] | None = None
    transcription: _Transcription | None = None
    turn_detection: _ServerVad | None = None
    noise_reduction: None = None


class _Audio(_Fields):
    input: _Input = _Input()


class _Session(_Fields):
    type: Literal["transcription"]
    audio: _Audio = _Audio()
    include: list[Literal["item.input_audio_transcription.logprobs"]] | None = None


class _ClientEvent(_Fields):
    event_id: str | None = None


class SessionUpdate(_ClientEvent):
    """Changes the fields that it has."""

    type: Literal["session.update"]
    session: _Session

    def apply(self, config: SessionConfig, require_model: Callable[[str], None]) -> SessionConfig:
        """Return the configuration after it.

        Raises:
            InvalidRequestError: a format at a rate that it does not have.
            ModelUnknownError: it names another model.
        """
        given = self.session.audio.input
        rate_hz, encoding = config.rate_hz, config.encoding
        if given.format is not None:
            rate_hz, encoding = given.format.rate_hz, given.format.encoding
        vad, prompt, language = config.vad, config.prompt, config.language
        logprobs = config.logprobs
        if "include" in self.session.model_fields_set:
            logprobs = bool(self.session.include)
        if "turn_detection" in given.model_fields_set:
            vad = _vad_options(given.turn_detection)
        if (text := given.transcription) is not None:
            if text.model is not None:
                require_model(text.model)
            if "prompt" in text.model_fields_set:
                prompt = text.prompt if (text.prompt or "").strip() else None
            if "language" in text.model_fields_set:
                language = text.language
        return SessionConfig(rate_hz, encoding, vad, prompt, language, logprobs)


class Append(_ClientEvent):
    """Brings audio."""

    type: Literal["input_audio_buffer.append"]
    audio: str

    def samples(self) -> bytes:
        """Return the audio.

        Raises:
            InvalidRequestError: it is not base64.
        """
        try:
            return base64.b64decode(self.audio, validate=True)
        except ValueError as error:
            raise InvalidRequestError(f"the audio is not base64: {error}", param="audio") from error


class Commit(_ClientEvent):
    """Ends the turn."""

    type: Literal["input_audio_buffer.commit"]


class Clear(_ClientEvent):
    """Forgets what was not committed."""

    type: Literal["input_audio_buffer.clear"]


ClientEvent = SessionUpdate | Append | Commit | Clear
_CLIENT_EVENTS: TypeAdapter[ClientEvent] = TypeAdapter(
    Annotated[ClientEvent, Field(discriminator="type")]
)


def _vad_options(vad: _ServerVad | None) -> VadOptions | None:
    if vad is None:
        return None
    return VadOptions(vad.threshold, vad.prefix_padding_ms, vad.silence_duration_ms)


def load_message(text: str) -> dict[str, Any]:
    """Read a text message.

    Raises:
        InvalidRequestError: it is no JSON object, or holds what cannot be written.
    """
    try:
        message = json.loads(text)
        if "\\u" in text:  # half a surrogate pair, which no answer could repeat
            json.dumps(message, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the message is not JSON: {error}") from error
    if not isinstance(message, dict):
        raise InvalidRequestError("the message is no JSON object")
    return message


def parse_event(message: dict[str, Any]) -> ClientEvent:
    """Check a message.

    Raises:
        InvalidRequestError: names the field.
    """
    try:
        return _CLIENT_EVENTS.validate_python(message)
    except ValidationError as error:
        fault = error.errors()[0]
        if fault["type"] == "union_tag_invalid":
            raise InvalidRequestError(
                f"the event type {str(message.get('type'))[:100]!r} is none that a transcription "
                f"session takes: {fault['ctx']['expected_tags']}",
                param="type",
            ) from error
        names = [str(each) for each in fault["loc"] if each != message.get("type")]
        param = ".".join(names) or "type"
        raise InvalidRequestError(f"{param}: {fault['msg']}", param=param) from error


def session_event(
    kind: str, session_id: str, config: SessionConfig, *, model: str, expires_at: int
) -> dict[str, Any]:
    """Return `session.created` or `session.updated`, with the whole configuration."""
    vad = config.vad
    turn_detection = vad and {
        "type": "server_vad",
        "threshold": vad.threshold,
        "prefix_padding_ms": vad.prefix_padding_ms,
        "silence_duration_ms": vad.silence_duration_ms,
    }
    session = {
        "id": session_id,
        "object": "realtime.transcription_session",
        "type": "transcription",
        "expires_at": expires_at,
        "audio": {
            "input": {
                "format": _told_format(config),
                "transcription": {
                    "model": model,
                    "language": config.language,
                    "prompt": config.prompt,
                },
                "noise_reduction": None,
                "turn_detection": turn_detection,
            }
        },
        "include": [_LOGPROBS] if config.logprobs else None,
    }
    return _event(kind, session=session)


def _told_format(config: SessionConfig) -> dict[str, Any]:
    told: dict[str, Any] = {"type": _FORMATS[config.encoding]}
    return told | {"rate": config.rate_hz} if config.encoding == "pcm16" else told


def error_event(error: ServerError, event_id: str | None = None) -> dict[str, Any]:
    """Return the `error` for a client's event."""
    detail = {**error_detail(error), "event_id": event_id}
    return _event("error", error=detail)


def error_detail(error: ServerError) -> dict[str, Any]:
    """Return what went wrong."""
    kind = ERROR_TABLE.get(type(error), UNEXPECTED)
    return {
        "type": kind.type,
        "code": kind.code,
        "message": error.message,
        "param": error.param,
    }


def ending_event(code: str, message: str) -> dict[str, Any]:
    """Return the `error` that says why a session ends."""
    detail = {"type": "invalid_request_error", "code": code, "message": message, "param": None}
    return _event("error", error={**detail, "event_id": None})


def server_events(event: realtime.SessionEvent) -> list[dict[str, Any]]:
    """Return what a client is told of an event of its session."""
    match event:
        case realtime.Committed():
            return _committed_events(event)
        case realtime.Completed():
            return _completed_events(event)
        case realtime.SpeechStarted(item_id, start_ms):
            kind = "input_audio_buffer.speech_started"
            told = _event(kind, item_id=item_id, audio_start_ms=start_ms)
        case realtime.SpeechStopped(item_id, end_ms):
            kind = "input_audio_buffer.speech_stopped"
            told = _event(kind, item_id=item_id, audio_end_ms=end_ms)
        case realtime.Cleared():
            told = _event("input_audio_buffer.cleared")
        case realtime.Delta(item_id, text):
            told = _transcription_event("delta", item_id, delta=text)
        case realtime.Failed(item_id, error):
            told = _transcription_event("failed", item_id, error=error_detail(error))
    return [told]


def _committed_events(event: realtime.Committed) -> list[dict[str, Any]]:
    place = {"previous_item_id": event.previous_item_id}
    item = _user_message(event.item_id, None, "in_progress")
    return [
        _event("input_audio_buffer.committed", item_id=event.item_id, **place),
        _event("conversation.item.added", item=item, **place),
    ]


def _completed_events(event: realtime.Completed) -> list[dict[str, Any]]:
    usage = {"type": "duration", "seconds": round(event.audio_s, 3)}
    item = _user_message(event.item_id, event.text, "completed")
    languages = [{"code": event.language}] if event.language is not None else []
    logprobs = None
    if event.logprobs is not None:
        logprobs = [logprob_body(*each).model_dump() for each in event.logprobs]
    return [
        _transcription_event(
            "completed",
            event.item_id,
            transcript=event.text,
            usage=usage,
            languages=languages,
            logprobs=logprobs,
        ),
        _event("conversation.item.done", item=item, previous_item_id=event.previous_item_id),
    ]


def _transcription_event(name: str, item_id: str, **fields: object) -> dict[str, Any]:
    kind = f"conversation.item.input_audio_transcription.{name}"
    return _event(kind, item_id=item_id, content_index=0, **fields)


def _user_message(item_id: str, transcript: str | None, status: str) -> dict[str, Any]:
    return {
        "id": item_id,
        "object": "realtime.item",
        "type": "message",
        "role": "user",
        "status": status,
        "content": [{"type": "input_audio", "transcript": transcript}],
    }


def _event(kind: str, **fields: object) -> dict[str, Any]:
    return {"type": kind, "event_id": f"event_{uuid.uuid4().hex[:20]}", **fields}
