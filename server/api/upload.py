"""Receive a multipart form with one file, within limits that hold while it comes in."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from server.errors import (
    InvalidRequestError,
    ServerError,
    UploadStalledError,
    UploadTooLargeError,
)

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


async def receive_upload(request: Request, max_bytes: int, idle_timeout_s: float) -> Upload:
    """Receive and check the form.

    Raises:
        UploadTooLargeError: the body is larger than `max_bytes`, announced or received.
        UploadStalledError: nothing came for `idle_timeout_s`.
        InvalidRequestError: no form, no file, several files, unknown fields.
        ClientDisconnect: the client left.
    """
    body = _Body(request, max_bytes, idle_timeout_s)
    try:
        return await _read(request, body)
    except UploadStalledError:  # there is nothing to read on for
        raise
    except ServerError:
        await body.discard()
        raise


async def discard_body(request: Request, max_bytes: int) -> None:
    """Take in and forget a body that is not wanted, before a refusal."""
    await _Body(request, max_bytes).discard()


class _Body:
    """A request's body as it comes in."""

    def __init__(
        self, request: Request, max_bytes: int, idle_timeout_s: float = _DISCARD_TIMEOUT_S
    ) -> None:
        self._receive = request.receive
        self._max_bytes = max_bytes
        self._idle_timeout_s = idle_timeout_s
        self._received_bytes = 0
        self._has_ended = False

    @property
    def max_bytes(self) -> int:
        return self._max_bytes

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        while not self._has_ended:
            try:
                async with asyncio.timeout(self._idle_timeout_s):
                    chunk = await self._next()
            except TimeoutError as error:
                raise UploadStalledError(
                    f"nothing more of the upload came for {self._idle_timeout_s:g} s", param="file"
                ) from error
            if self._received_bytes > self._max_bytes:
                raise _too_large(self._max_bytes)
            yield chunk

    async def discard(self) -> None:
        """Read on for a while, so that the client gets to read the refusal.

        A server that closes a connection with unread bytes in it resets it, and the client loses
        the answer with the rest.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DISCARD_TIMEOUT_S):
                while not self._has_ended and self._received_bytes <= 2 * self._max_bytes:
                    await self._next()

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        # Once the body has ended, receiving would wait for the client to leave.
        self._has_ended = not message.get("more_body", False)
        chunk: bytes = message.get("body", b"")
        self._received_bytes += len(chunk)
        return chunk


async def _read(request: Request, body: _Body) -> Upload:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "multipart/form-data":
        raise InvalidRequestError(
            f"send multipart/form-data with the recording in the field 'file', not {media_type!r}"
        )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > body.max_bytes:
        raise _too_large(body.max_bytes)
    parser = MultiPartParser(
        request.headers,
        body.chunks(),
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


def _too_large(max_bytes: int) -> UploadTooLargeError:
    return UploadTooLargeError(f"the upload is larger than {max_bytes} bytes", param="file")


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
