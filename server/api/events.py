"""Transcripts as server-sent events: what is told on the way, then the whole, then `[DONE]`.

Text has OpenAI's form, deltas and their whole. `/transcribe` also tells how far a long recording is
done, which OpenAI's API has no event for.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from server.api.disconnect import run_while_connected
from server.api.errors import server_error_body, unexpected_error_body
from server.errors import ServerError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from fastapi import Request
    from starlette.types import Receive, Scope, Send

    from server.longform import Advance
    from server.transcription import Transcription

    _Told = str | Advance

_HEADERS = {
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would hold events back
}
EXAMPLE = (
    'data: {"type":"transcript.text.delta","delta":"Where did"}\n\n'
    'data: {"type":"transcript.text.delta","delta":" you find that apple?"}\n\n'
    'data: {"type":"transcript.text.done","text":"Where did you find that apple?",'
    '"usage":{"type":"duration","seconds":2.48}}\n\n'
    "data: [DONE]\n\n"
)


class TranscriptStream:
    """A transcription under way and what it has told."""

    def __init__(
        self, work: Callable[[Callable[[_Told], None]], Coroutine[Any, Any, Transcription]]
    ) -> None:
        """Begin.

        Args:
            work: transcribes, and hands each new piece of text, and each advance, to what it is
                given.
        """
        # The engine's pieces are few and small, bounded by the cap of tokens.
        self._told: asyncio.Queue[_Told | None] = asyncio.Queue()
        self._task = asyncio.create_task(work(self._told.put_nowait))
        self._task.add_done_callback(lambda _task: self._told.put_nowait(None))
        self._first: _Told | None = None

    async def begin(self) -> None:
        """Wait until there is something to tell.

        Raises:
            ServerError: it failed before; the answer can still have a status that says so.
        """
        self._first = await self._told.get()
        if self._first is None:
            await self._task

    async def told(self) -> AsyncIterator[_Told]:
        """Yield what is told; afterwards `transcription` is there."""
        told = self._first
        while told is not None:
            yield told
            told = await self._told.get()

    async def transcription(self) -> Transcription:
        """Return the whole.

        Raises:
            ServerError: it failed on the way.
        """
        return await self._task

    async def cancel(self) -> None:
        """Give up what is left of it."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class EventStreamResponse(Response):
    """Sends a stream's events; the client that leaves ends the work."""

    media_type = "text/event-stream"

    def __init__(
        self,
        request: Request,
        stream: TranscriptStream,
        done: Callable[[Transcription], dict[str, Any]],
    ) -> None:
        """Prepare.

        Args:
            request: for the log and the request's id in error frames.
            stream: that has begun.
            done: makes the last event.
        """
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._request = request
        self._stream = stream
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything."""
        del scope, receive  # the request has them
        try:
            await run_while_connected(self._request, self._send(send))
        finally:
            await self._stream.cancel()

    async def _send(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        async for frame in self._frames():
            body = f"data: {frame}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _frames(self) -> AsyncIterator[str]:
        """Yield the data of each frame. After an error there is no `[DONE]`."""
        async for told in self._stream.told():
            if isinstance(told, str):
                yield _json({"type": "transcript.text.delta", "delta": told})
            else:
                yield _json(_progress(told))
        try:
            transcription = await self._stream.transcription()
        except ServerError as error:
            yield _json(server_error_body(self._request, error))
            return
        except Exception:  # noqa: BLE001 - logged there; the client must not take it for the end
            yield _json(unexpected_error_body(self._request))
            return
        yield _json(self._done(transcription))
        yield "[DONE]"


async def stream_events(
    request: Request,
    work: Callable[[Callable[[_Told], None]], Coroutine[Any, Any, Transcription]],
    done: Callable[[Transcription], dict[str, Any]],
) -> EventStreamResponse:
    """Start `work` and answer with its events once there is one.

    Raises:
        ServerError: it failed before it had anything to tell.
        ClientDisconnect: the client left.
    """
    stream = TranscriptStream(work)
    try:
        await run_while_connected(request, stream.begin())
    except BaseException:
        await stream.cancel()
        raise
    return EventStreamResponse(request, stream, done)


def _progress(advance: Advance) -> dict[str, Any]:
    total_s = advance.total_s
    return {
        "type": "transcript.progress",
        "processed": round(advance.processed_s, 3),
        "duration": None if total_s is None else round(total_s, 3),
    }


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
