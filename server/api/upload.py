"""Receive recordings, as a multipart form or as the body itself, within limits meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from server.errors import (
    AudioTruncatedError,
    InvalidRequestError,
    ServerError,
    UploadStalledError,
    UploadTooLargeError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from fastapi import Request

MAX_FILES = 32
"""Recordings in one request."""

_MAX_FIELD_BYTES = 16 * 1024
_MAX_FIELDS = 256  # counted by the parser; repeated ones (keywords[]) are many
_DISCARD_TIMEOUT_S = 5.0
_MOST_PAUSES = 20  # longest that an upload may take, in times of its longest pause
_PCM_SAMPLE_BYTES = 2
_MAX_PCM_CHANNELS = 64
_MAX_RATE_DIGITS = 7  # which rates are taken is for the limits to say


@dataclass(frozen=True, slots=True)
class Upload:
    """What a request brings.

    Attributes:
        recordings: bytes of each file, in order; at least one.
        fields: of the form, by name and in order; a name may come again.
    """

    recordings: tuple[bytes, ...]
    fields: tuple[tuple[str, str], ...]


async def receive_upload(
    request: Request, max_bytes: int, idle_timeout_s: float, *, takes_raw: bool = False
) -> Upload:
    """Receive a request's recordings and fields.

    Args:
        request: whose body has not been read.
        max_bytes: of the body.
        idle_timeout_s: longest pause in it.
        takes_raw: whether the body may be the recording itself.

    Raises:
        UploadTooLargeError: the body is larger than `max_bytes`, announced or received.
        UploadStalledError: nothing came for `idle_timeout_s`, or not all in 20 times as long.
        InvalidRequestError: no form, no file, too many files, a file in place of a text.
        AudioTruncatedError: raw samples that end within one.
        ClientDisconnect: the client left.
    """
    body = _Body(request, max_bytes, idle_timeout_s)
    try:
        return await _read(request, body, takes_raw=takes_raw)
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
        self._latest_s = time.monotonic() + _MOST_PAUSES * idle_timeout_s
        self._received_bytes = 0
        self._has_ended = False

    @property
    def max_bytes(self) -> int:
        return self._max_bytes

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        while not self._has_ended:
            try:
                left_s = max(0.0, self._latest_s - time.monotonic())
                async with asyncio.timeout(min(self._idle_timeout_s, left_s)):
                    chunk = await self._next()
            except TimeoutError as error:
                raise self._stalled() from error
            if self._received_bytes > self._max_bytes:
                raise _too_large(self._max_bytes)
            yield chunk

    def _stalled(self) -> UploadStalledError:
        idle_s = self._idle_timeout_s
        reason = f"nothing more of the upload came for {idle_s:g} s"
        if time.monotonic() >= self._latest_s:
            reason = f"the upload was not all there after {_MOST_PAUSES * idle_s:g} s"
        return UploadStalledError(reason, param="file")

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


async def _read(request: Request, body: _Body, *, takes_raw: bool) -> Upload:
    media_type, parameters = _parse_media_type(request.headers.get("content-type", ""))
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > body.max_bytes:
        raise _too_large(body.max_bytes)
    if media_type == "multipart/form-data":
        charset = parameters.get("charset", "utf-8")
        if charset.lower() not in {"utf-8", "utf8"}:
            raise InvalidRequestError(f"forms are taken in UTF-8, not in {charset!r}")
        return await _read_form(request, body)
    is_audio = media_type.startswith(("audio/", "video/"))  # webm and mp4 go by either
    if takes_raw and (is_audio or media_type == "application/octet-stream"):
        header = _pcm_header(parameters) if media_type == "audio/pcm" else None
        data = b"".join([chunk async for chunk in body.chunks()])
        recording = data if header is None else _wrap_pcm(header, data)
        return Upload((recording,), ())
    raw = ", or the recording itself as audio/*" if takes_raw else ""
    raise InvalidRequestError(
        f"send multipart/form-data with the recording in the field 'file'{raw}, not {media_type!r}"
    )


def _parse_media_type(header: str) -> tuple[str, dict[str, str]]:
    media_type, *parts = header.split(";")
    pairs = (part.partition("=") for part in parts)
    parameters = {name.strip().lower(): value.strip().strip('"') for name, _, value in pairs}
    return media_type.strip().lower(), parameters


def _pcm_header(parameters: dict[str, str]) -> tuple[int, int]:
    """Rate and channels of `audio/pcm;rate=16000;channels=1`, signed 16 bit little-endian."""
    rate, channels = parameters.get("rate", ""), parameters.get("channels", "1")
    is_number = rate.isascii() and rate.isdecimal() and len(rate) <= _MAX_RATE_DIGITS
    if not is_number or int(rate) == 0:
        raise InvalidRequestError(
            "raw samples need their rate, in Hz: Content-Type: audio/pcm;rate=16000", param="rate"
        )
    if channels not in {str(number) for number in range(1, _MAX_PCM_CHANNELS + 1)}:
        raise InvalidRequestError(
            f"channels is a number from 1 to {_MAX_PCM_CHANNELS}, not {channels!r}",
            param="channels",
        )
    return int(rate), int(channels)


def _wrap_pcm(header: tuple[int, int], samples: bytes) -> bytes:
    """Put a WAV header before raw samples, so that they take the way of every other file."""
    rate_hz, channels = header
    frame_bytes = _PCM_SAMPLE_BYTES * channels
    if len(samples) % frame_bytes:
        raise AudioTruncatedError(f"the raw samples are no multiple of {frame_bytes} bytes")
    form = struct.pack(
        "<HHIIHH", 1, channels, rate_hz, rate_hz * frame_bytes & 0xFFFFFFFF, frame_bytes, 16
    )
    chunks = b"fmt " + struct.pack("<I", len(form)) + form
    chunks += b"data" + struct.pack("<I", len(samples)) + samples
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks if samples else b""


async def _read_form(request: Request, body: _Body) -> Upload:
    parser = MultiPartParser(
        request.headers,
        body.chunks(),
        max_files=MAX_FILES + 1,  # so that we can say what is wrong
        max_fields=_MAX_FIELDS,
        max_part_size=_MAX_FIELD_BYTES,
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise InvalidRequestError(f"not a multipart form: {error.message}") from error
    try:
        return await _sort(form)
    finally:
        await form.close()


def _too_large(max_bytes: int) -> UploadTooLargeError:
    reason = f"the upload is larger than {max_bytes / 2**20:g} MiB, the most that this server takes"
    return UploadTooLargeError(f"{reason} (--max-upload-bytes)", param="file")


async def _sort(form: FormData) -> Upload:
    """Tell recordings from fields."""
    recordings: list[bytes] = []
    fields: list[tuple[str, str]] = []
    for name, value in form.multi_items():
        if isinstance(value, UploadFile) and name == "file":
            recordings.append(await value.read())
        elif isinstance(value, UploadFile):
            raise InvalidRequestError(
                f"no field {name!r} takes a file: send recordings in 'file'", param=name
            )
        elif name == "file":
            raise InvalidRequestError(
                "the field 'file' has to be a file, with a filename", param="file"
            )
        else:
            fields.append((name, value))
    if not recordings:
        raise InvalidRequestError("the field 'file' is missing", param="file")
    if len(recordings) > MAX_FILES:
        raise InvalidRequestError(f"at most {MAX_FILES} files are taken at once", param="file")
    return Upload(tuple(recordings), tuple(fields))
