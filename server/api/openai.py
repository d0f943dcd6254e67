"""OpenAI's endpoints for transcription: its SDK works with this server's address as base URL."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from server.api import answers, events
from server.api.auth import OwnerDependency  # noqa: TC001 - FastAPI reads it
from server.api.caller import CallerDependency  # noqa: TC001 - FastAPI reads it
from server.api.dependencies import RuntimeDependency  # noqa: TC001 - FastAPI reads it
from server.api.descriptions import TRANSCRIPTION_ERRORS, errors, form_body, formats_answer
from server.api.disconnect import run_while_connected
from server.api.forms import OpenAIForm, fold_chunking, parse_form
from server.api.schemas import ModelBody, ModelListBody, OpenAIBody, VerboseBody
from server.api.upload import discard_body
from server.errors import InvalidRequestError, TaskUnsupportedError
from server.longform import Listener

if TYPE_CHECKING:
    from server.runtime import Runtime
    from server.transcription import Transcription

router = APIRouter(prefix="/v1", tags=["OpenAI"])

_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "model": OpenAIBody | VerboseBody,
        **formats_answer(
            "text", "srt", "vtt",
            description="The transcript, in the response_format; with stream: server-sent events.",
        ),
    }
}  # fmt: skip


@router.post(
    "/audio/transcriptions",
    openapi_extra=form_body(OpenAIForm, files=False, raw=False),
    response_class=JSONResponse,
    response_model=None,
    responses=_ANSWER | TRANSCRIPTION_ERRORS | errors(404),
)
async def create_transcription(request: Request, caller: CallerDependency) -> Response:
    """Turn a recording into text, as OpenAI's API does.

    The official SDK: `OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    .audio.transcriptions.create(model="whisper-1", file=open("recording.wav", "rb"))`
    """
    runtime = caller.runtime
    upload = await caller.receive()
    if len(upload.recordings) > 1:
        raise InvalidRequestError("send one file a request", param="file")
    (recording,) = upload.recordings
    form = parse_form(OpenAIForm, fold_chunking(upload.fields))
    if form.model is not None:
        runtime.require_model(form.model)
    options = form.options(runtime.engine.capabilities)
    if form.stream:
        return await events.stream_events(
            request,
            lambda tell: caller.transcribe(recording, options, Listener(on_text=tell)),
            done=partial(_whole_text, form),
        )
    transcription = await run_while_connected(request, caller.transcribe(recording, options))
    if form.response_format in answers.FILE_FORMATS:
        return answers.file_response(transcription, form.response_format)
    if form.response_format == "verbose_json":
        body = answers.openai_verbose_json(
            transcription,
            temperature=form.temperature,
            segments=form.segments,
            words=form.words,
        )
    else:
        body = answers.openai_json(transcription, logprobs=form.logprobs)
    return JSONResponse(body)


def _whole_text(form: OpenAIForm, transcription: Transcription) -> dict[str, Any]:
    body = answers.openai_json(transcription, logprobs=form.logprobs)
    return {"type": "transcript.text.done", **body}


@router.post(
    "/audio/translations",
    response_class=JSONResponse,
    response_model=None,
    status_code=400,
    responses=errors(400, 401),
)
async def create_translation(
    request: Request, runtime: RuntimeDependency, _owner: OwnerDependency
) -> Response:
    """Refuse: the models here write what is said, in the language in which it is said."""
    await discard_body(request, runtime.settings.max_upload_bytes)
    raise TaskUnsupportedError(
        "this server does not translate; POST /v1/audio/transcriptions transcribes"
    )


@router.get("/models", responses=errors(401))
async def list_models(runtime: RuntimeDependency, _owner: OwnerDependency) -> ModelListBody:
    """List the models that can be asked for: the one that is loaded."""
    return ModelListBody(object="list", data=[_model(runtime)])


@router.get("/models/{model:path}", responses=errors(401, 404))
async def retrieve_model(
    model: str, runtime: RuntimeDependency, _owner: OwnerDependency
) -> ModelBody:
    """Describe a model, by its name or one of its aliases."""
    runtime.require_model(model)
    return _model(runtime)


def _model(runtime: Runtime) -> ModelBody:
    return ModelBody(
        id=runtime.settings.served_name,
        object="model",
        created=runtime.created_s,
        owned_by="speechllm",
        aliases=list(runtime.settings.aliases),
    )
