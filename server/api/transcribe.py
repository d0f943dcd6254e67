"""`POST /transcribe`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request

from server.api.dependencies import RuntimeDependency  # noqa: TC001 - FastAPI reads it
from server.api.disconnect import run_while_connected
from server.api.schemas import ErrorBody, Timings, TranscriptionBody
from server.api.upload import MAX_PROMPT_CHARACTERS, discard_body, receive_upload
from server.errors import ServerError
from server.options import TranscribeOptions
from server.pipeline import transcribe_upload

if TYPE_CHECKING:
    from server.runtime import Runtime

router = APIRouter(tags=["transcription"])

_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "The recording: WAV, FLAC, OGG (Vorbis or Opus), MP3, "
                            "M4A, AAC or WebM; told by its content, whatever its name.",
                        },
                        "prompt": {
                            "type": "string",
                            "maxLength": MAX_PROMPT_CHARACTERS,
                            "description": "What to ask the model, in place of the prompt that "
                            "it was trained with.",
                        },
                    },
                }
            }
        },
    }
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": description}
    for status, description in {
        400: "No usable form or audio: empty, truncated, unreadable, NaN.",
        413: "Too many bytes or too many seconds.",
        415: "Not audio, or a codec, sample rate or channel count that is not taken.",
        429: "Too much waits already; come back after Retry-After seconds.",
        500: "The server failed on this request.",
        503: "Not ready yet, or shutting down.",
        504: "The request waited too long.",
    }.items()
}


@router.post("/transcribe", openapi_extra=_FORM, responses=_ERRORS)
async def transcribe(request: Request, runtime: RuntimeDependency) -> TranscriptionBody:
    """Turn a recording into text.

    Try it: `curl -F file=@recording.wav http://127.0.0.1:8000/transcribe`
    """
    await _refuse_early(request, runtime)
    upload = await receive_upload(
        request, runtime.settings.max_upload_bytes, runtime.settings.upload_idle_timeout_s
    )
    work = transcribe_upload(
        runtime,
        upload.data,
        request_id=request.state.request_id,
        started_s=request.state.started_s,
        options=TranscribeOptions(prompt=upload.prompt),
    )
    transcription = await run_while_connected(request, work)
    request.state.log_fields = {
        "audio_s": round(transcription.duration_s, 3),
        **{f"{k}_s": round(v, 4) for k, v in asdict(transcription.timings).items()},
    }
    return TranscriptionBody(
        text=transcription.text,
        language=transcription.language,
        duration=transcription.duration_s,
        timings=Timings(**{k: round(v, 6) for k, v in asdict(transcription.timings).items()}),
    )


async def _refuse_early(request: Request, runtime: Runtime) -> None:
    """Refuse before the upload is taken in, if nothing could be done with it."""
    try:
        runtime.require_ready()
        with runtime.engine.admit(0.0):
            pass  # there is room now; it is held only once the upload is here
    except ServerError:
        await discard_body(request, runtime.settings.max_upload_bytes)
        raise
