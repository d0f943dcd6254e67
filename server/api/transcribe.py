"""`POST /transcribe`."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from server.api import answers, events
from server.api.caller import Caller, CallerDependency  # noqa: TC001 - FastAPI reads it
from server.api.descriptions import TRANSCRIPTION_ERRORS, form_body, formats_answer
from server.api.disconnect import run_while_connected
from server.api.errors import server_error_body
from server.api.forms import TranscribeForm, parse_form
from server.api.schemas import ResultsBody, TranscriptionBody, VerboseBody
from server.errors import InvalidRequestError, ServerError
from server.longform import Listener

if TYPE_CHECKING:
    from server.api.upload import Upload
    from server.options import TranscribeOptions
    from server.transcription import Transcription

router = APIRouter(tags=["transcription"])

_PARALLEL_RECORDINGS = 4  # of one request; the rest waits, so that it does not fill the queue

_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "model": TranscriptionBody | VerboseBody | ResultsBody,
        **formats_answer(
            "text", "srt", "vtt", "tsv",
            description="The transcript, in the response_format; several files: `results`, each a "
            "transcript or an error; with stream: server-sent events.",
        ),
    }
}  # fmt: skip


@router.post(
    "/transcribe",
    openapi_extra=form_body(TranscribeForm, files=True, raw=True),
    response_class=JSONResponse,
    response_model=None,
    responses=_ANSWER | TRANSCRIPTION_ERRORS,
)
async def transcribe(request: Request, caller: CallerDependency) -> Response:
    """Turn recordings into text.

    Try it: `curl -F file=@recording.wav http://127.0.0.1:8000/transcribe`

    The recording may be the body itself, with the fields in the query:
    `curl -H 'Content-Type: audio/wav' --data-binary @recording.wav
    'http://127.0.0.1:8000/transcribe?response_format=srt'`. Raw samples, signed 16 bit
    little-endian, come as `audio/pcm;rate=16000;channels=1`.
    """
    upload = await caller.receive(takes_raw=True)
    form = parse_form(TranscribeForm, _merge(request, upload))
    options = form.options(caller.runtime.engine.capabilities)
    if len(upload.recordings) > 1:
        _check_many(form)
        work = _transcribe_many(caller, upload.recordings, form, options)
        return JSONResponse({"results": await run_while_connected(request, work)})
    (recording,) = upload.recordings
    if form.stream:
        return await events.stream_events(
            request,
            lambda tell: caller.transcribe(recording, options, Listener(tell, tell)),
            done=partial(_whole_text, form),
        )
    if form.progress:
        return await events.stream_events(
            request,
            lambda tell: caller.transcribe(recording, options, Listener(on_advance=tell)),
            done=partial(_whole_answer, form),
        )
    transcription = await run_while_connected(request, caller.transcribe(recording, options))
    return _answer(form, transcription)


def _merge(request: Request, upload: Upload) -> list[tuple[str, str]]:
    """The form's fields and the query's; of those in both, as viewers send them, the form's."""
    in_form = {name for name, _ in upload.fields}
    query = request.query_params.multi_items()
    return [*upload.fields, *(field for field in query if field[0] not in in_form)]


def _answer(form: TranscribeForm, transcription: Transcription) -> Response:
    if form.response_format in answers.FILE_FORMATS:
        return answers.file_response(transcription, form.response_format)
    return JSONResponse(json_body(form, transcription))


def json_body(form: TranscribeForm, transcription: Transcription) -> dict[str, Any]:
    """Return the answer in the form's format, `json` or `verbose_json`."""
    if form.response_format == "verbose_json":
        return answers.own_verbose_json(
            transcription, temperature=form.temperature, words=form.timestamps == "word"
        )
    return answers.own_json(
        transcription,
        timestamps=form.timestamps or "none",
        hypotheses=form.n_best > 1,
        logprobs=form.logprobs,
    )


def _whole_text(form: TranscribeForm, transcription: Transcription) -> dict[str, Any]:
    """OpenAI's last event, and whatever the plain answer has besides."""
    return {
        "type": "transcript.text.done",
        **answers.openai_json(transcription, logprobs=False),
        **json_body(form, transcription),
    }


def _whole_answer(form: TranscribeForm, transcription: Transcription) -> dict[str, Any]:
    """The plain answer's body, whatever its format, in an event."""
    answer = _answer(form, transcription)
    return {"type": "transcript.done", "body": bytes(answer.body).decode()}


def _check_many(form: TranscribeForm) -> None:
    """Refuse what cannot hold several answers.

    Raises:
        InvalidRequestError: names the field.
    """
    for name, is_asked in (("stream", form.stream), ("progress", form.progress)):
        if is_asked:
            raise InvalidRequestError(f"{name} takes one file", param=name)
    if form.response_format not in {"json", "verbose_json"}:
        raise InvalidRequestError(
            "several files are answered in json or verbose_json", param="response_format"
        )


async def _transcribe_many(
    caller: Caller,
    recordings: tuple[bytes, ...],
    form: TranscribeForm,
    options: TranscribeOptions,
) -> list[dict[str, Any]]:
    """Answer each recording, in order, with its transcript or its error."""
    # No more than the key may have running, or they would refuse one another.
    most = caller.runtime.settings.key_max_concurrency or _PARALLEL_RECORDINGS
    places = asyncio.Semaphore(min(most, _PARALLEL_RECORDINGS))

    async def answer(recording: bytes) -> dict[str, Any]:
        async with places:
            try:
                transcription = await caller.transcribe(recording, options)
            except ServerError as error:
                return server_error_body(caller.request, error)
        return json_body(form, transcription)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(answer(recording)) for recording in recordings]
    return [task.result() for task in tasks]
