"""Who transcribes for the command line: the server's own pipeline in this process, or a server."""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from server.api.forms import TranscribeForm
    from server.client import AsyncClient, Options, ResponseFormat
    from server.runtime import Runtime

_NO_LIMIT_S = 30 * 24 * 3600.0  # one's own files, in one's own time
_NO_LIMIT = 10**6  # `jobs` bounds what is under way
_PATIENT_RETRIES = 10**6  # a full server is waited for, however long its recordings are

OnAdvance: TypeAlias = "Callable[[float, float | None], None]"
"""Told how many seconds of a long recording are done, and how many there are, if that is known."""


class TranscriptionFailedError(Exception):
    """A recording that could not be transcribed; the others may be.

    Attributes:
        code: the reason, for programs; one of the API's, or `unreadable`.
    """

    def __init__(self, message: str, code: str) -> None:
        """Give the reason, for people and for programs."""
        super().__init__(message)
        self.code = code


class BadOptionError(Exception):
    """An option that would fail every recording."""


class TranscriberUnavailableError(Exception):
    """The model cannot be loaded, or the server not be used."""


class FileTranscriber(Protocol):
    """Transcribes the bytes of one recording; several calls may run at once."""

    async def __call__(self, name: str, data: bytes, on_advance: OnAdvance, /) -> str:
        """Return the transcript in the format that was asked for.

        Raises:
            TranscriptionFailedError: this one cannot be transcribed.
            BadOptionError: none can.
        """


@contextlib.asynccontextmanager
async def in_process(
    model: str | None, device: str | None, form: ResponseFormat, options: Options, *, jobs: int
) -> AsyncGenerator[FileTranscriber, None]:
    """Load a checkpoint and yield what transcribes with it, as the server would.

    Args:
        model: checkpoint folder or hub id; None takes the environment's, or the default.
        device: auto, cpu, cuda or cuda:N; likewise.
        form: of the transcripts.
        options: of the transcriptions.
        jobs: most calls at once.

    Raises:
        TranscriberUnavailableError: the checkpoint cannot be loaded.
        BadOptionError: it cannot do what is asked for.
    """
    from server.api.forms import TranscribeForm, parse_form
    from server.app import build_engine
    from server.errors import RequestError
    from server.metrics import Metrics
    from server.preflight import check_model_settings
    from server.runtime import Runtime
    from server.settings import SettingError, read_settings

    try:
        settings = read_settings(
            **{key: value for key, value in (("model", model), ("device", device)) if value},
            max_audio_s=_NO_LIMIT_S,
            request_timeout_s=_NO_LIMIT_S,
            max_long_recordings=jobs,
            max_queue_size=_NO_LIMIT,
            max_queue_audio_s=_NO_LIMIT_S,
            decode_workers=min(jobs, os.cpu_count() or 1),
        )
        check_model_settings(settings)
        metrics = Metrics()
        runtime = Runtime(settings, build_engine(settings, metrics), metrics)
    except SettingError as error:
        raise BadOptionError(str(error)) from error
    runtime.start()
    try:
        if (failure := await runtime.loaded()) is not None:
            raise TranscriberUnavailableError(f"cannot load {settings.model}: {failure}")
        fields = {name: str(value) for name, value in options.items()}
        try:
            asked = parse_form(TranscribeForm, {**fields, "response_format": form}.items())
            transcriber = _InProcess(runtime, asked)
        except RequestError as error:
            raise BadOptionError(error.message) from error
        yield transcriber
    finally:
        await runtime.stop()


class _InProcess:
    """The server's pipeline without HTTP."""

    def __init__(self, runtime: Runtime, form: TranscribeForm) -> None:
        self._runtime = runtime
        self._form = form
        self._options = form.options(runtime.engine.capabilities)

    async def __call__(self, name: str, data: bytes, on_advance: OnAdvance, /) -> str:
        from server.api.answers import FILE_FORMATS
        from server.api.transcribe import json_body
        from server.errors import ServerError
        from server.longform import Listener
        from server.pipeline import transcribe_upload

        try:
            transcription = await transcribe_upload(
                self._runtime,
                data,
                request_id=name,
                started_s=time.monotonic(),
                options=self._options,
                listener=Listener(
                    on_advance=lambda each: on_advance(each.processed_s, each.total_s)
                ),
            )
        except ServerError as error:
            raise _failure(error) from error
        if self._form.response_format in FILE_FORMATS:
            write, _ = FILE_FORMATS[self._form.response_format]
            return write(transcription)
        body = json_body(self._form, transcription)
        return json.dumps(body, ensure_ascii=False)


def _failure(error: Any) -> Exception:  # noqa: ANN401 - a ServerError, imported lazily
    from server.api.errors import ERROR_TABLE, UNEXPECTED

    if error.param not in {None, "file"}:
        return BadOptionError(error.message)
    return TranscriptionFailedError(error.message, ERROR_TABLE.get(type(error), UNEXPECTED).code)


@contextlib.asynccontextmanager
async def at_server(
    url: str, api_key: str | None, form: ResponseFormat, options: Options
) -> AsyncGenerator[FileTranscriber, None]:
    """Yield what lets a server transcribe.

    Args:
        url: of the server.
        api_key: None takes the environment's.
        form: of the transcripts.
        options: of the transcriptions.

    Raises:
        TranscriberUnavailableError: nobody answers there, or wants another key.
        BadOptionError: that is no address, or no key.
    """
    from server.client import AsyncClient, ClientError, Retry

    retry = Retry(max_retries=_PATIENT_RETRIES)
    try:
        connecting = AsyncClient(url, api_key=api_key, retry=retry)
    except ClientError as error:
        raise BadOptionError(str(error)) from error
    async with connecting as client:
        try:
            await client.models()  # better told once than for each file
        except ClientError as error:
            raise TranscriberUnavailableError(f"{url}: {error}") from error
        yield _AtServer(client, form, options)


class _AtServer:
    """A server, over HTTP."""

    def __init__(self, client: AsyncClient, form: ResponseFormat, options: Options) -> None:
        self._client = client
        self._form = form
        self._options = options

    async def __call__(self, name: str, data: bytes, on_advance: OnAdvance, /) -> str:
        from server.client import ApiError, ClientError

        del name
        try:
            return await self._client.transcribe_to(
                self._form,
                data,
                on_progress=lambda each: on_advance(each.processed_s, each.duration_s),
                **self._options,
            )
        except ApiError as error:
            if error.param not in {None, "file"}:
                raise BadOptionError(error.message) from error
            raise TranscriptionFailedError(error.message, error.code) from error
        except ClientError as error:
            raise TranscriptionFailedError(str(error), "no_answer") from error
