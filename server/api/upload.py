"""Receive a multipart form with one file, within limits that hold while it comes in."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from server.errors import InvalidRequestError, ServerError, UploadTooLargeError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from fastapi import Request

MAX_PROMPT_CHARACTERS = 1000
_FIELDS = ("file", "prompt")
_MAX_FIELD_BYTES = 16 * 1024
# Parts counted by the parser itself; more than we take, so that we can say what is wrong.
_MAX_PARTS = 16
_DISCARD_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Upload:
    """A form's content."""

    data: bytes
    prompt: str | None


async def read_upload(request: Request, max_bytes: int) -> Upload:
    """Receive and check the form.

    Raises:
        UploadTooLargeError: the body is larger than `max_bytes`, announced or received.
        InvalidRequestError: no form, no file, several files, unknown fields.
        starlette.requests.ClientDisconnect: the client left.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "multipart/form-data":
        raise InvalidRequestError(
            f"send multipart/form-data with the recording in the field 'file', not {media_type!r}"
        )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    parser = MultiPartParser(
        request.headers,
        _limited(request, max_bytes),
        max_files=_MAX_PARTS,
        max_fields=_MAX_PARTS,
        max_part_size=_MAX_FIELD_BYTES,
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise InvalidRequestError(f"not a multipart form: {error.message}") from error
    try:
        return await _check(form)
    finally:
        await form.close()


async def discard_body(request: Request, max_bytes: int) -> None:
    """Read on for a while before an early refusal, so that the client gets to read the answer.

    A server that closes the connection with unread bytes in it resets it, and the client loses the
    answer with the rest.
    """
    ends_s = time.monotonic() + _DISCARD_TIMEOUT_S
    received = 0
    while received <= max_bytes:
        try:
            async with asyncio.timeout(ends_s - time.monotonic()):
                message = await request.receive()
        except TimeoutError:
            return
        received += len(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return


def _too_large(max_bytes: int) -> UploadTooLargeError:
    return UploadTooLargeError(f"the upload is larger than {max_bytes} bytes", param="file")


async def _limited(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > max_bytes:
            raise _too_large(max_bytes)
        yield chunk


async def _check(form: FormData) -> Upload:
    unknown = sorted({name for name, _ in form.multi_items()} - set(_FIELDS))
    if unknown:
        raise InvalidRequestError(
            f"unknown field {unknown[0]!r}; this endpoint takes {' and '.join(_FIELDS)}",
            param=unknown[0],
        )
    files = form.getlist("file")
    if not files:
        raise InvalidRequestError("the field 'file' is missing", param="file")
    if len(files) > 1:
        raise InvalidRequestError(f"{len(files)} files; send one a request", param="file")
    if not isinstance(files[0], UploadFile):
        raise InvalidRequestError(
            "the field 'file' has to be a file, with a filename", param="file"
        )
    return Upload(await files[0].read(), _check_prompt(form))


def _check_prompt(form: FormData) -> str | None:
    prompts = form.getlist("prompt")
    if not prompts:
        return None
    if len(prompts) > 1 or not isinstance(prompts[0], str):
        raise InvalidRequestError("the field 'prompt' has to be one text", param="prompt")
    if not prompts[0].strip():
        raise InvalidRequestError("the field 'prompt' is empty", param="prompt")
    if len(prompts[0]) > MAX_PROMPT_CHARACTERS:
        raise InvalidRequestError(
            f"the prompt has more than {MAX_PROMPT_CHARACTERS} characters", param="prompt"
        )
    return prompts[0]


async def receive_upload(request: Request, max_bytes: int) -> Upload:
    """Receive the form as `read_upload` does, and hear out the client before an early refusal."""
    try:
        return await read_upload(request, max_bytes)
    except ServerError:
        await discard_body(request, 2 * max_bytes)
        raise
