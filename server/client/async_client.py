"""The client for asyncio. What it does is in `exchange`; here is only the waiting."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from typing import TYPE_CHECKING, Any, Self, TypeVar

import httpx

from server.client import exchange
from server.client.errors import UnexpectedAnswerError
from server.client.exchange import Answer
from server.client.results import Progress, transcription_from
from server.client.retry import Retry

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from types import TracebackType
    from typing import Unpack

    from server.client.exchange import Audio, Options, ResponseFormat
    from server.client.results import StreamEvent, TextDelta, Transcription

_Whole = TypeVar("_Whole")


class AsyncClient:
    """As `Client`, for asyncio: close it with `aclose`, or use it in `async with`."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        retry: Retry | None = None,
    ) -> None:
        """Connect to nothing yet; the arguments are `Client`'s."""
        self._http = httpx.AsyncClient(**exchange.http_options(base_url, api_key, timeout_s))
        self._retry = retry or Retry()

    async def transcribe(
        self,
        audio: Audio,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        **options: Unpack[Options],
    ) -> Transcription:
        """Turn a recording into text; `on_progress` is told how far a long one is done."""
        recording = await asyncio.to_thread(exchange.read_audio, audio)
        request = exchange.transcribe_request(recording, options)
        return exchange.transcription_of(await self._answer(request, on_progress))

    async def transcribe_to(
        self,
        response_format: ResponseFormat,
        audio: Audio,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        **options: Unpack[Options],
    ) -> str:
        """Return a transcript as the server writes it in one of its formats, such as `srt`.

        As in `transcribe`, `on_progress` is told how far a long recording is done.
        """
        recording = await asyncio.to_thread(exchange.read_audio, audio)
        request = exchange.transcribe_request(recording, options, response_format=response_format)
        return (await self._answer(request, on_progress)).body

    async def stream(
        self, audio: Audio, **options: Unpack[Options]
    ) -> AsyncGenerator[StreamEvent, None]:
        """Yield pieces of text as they come, and the whole transcription last.

        Of a long recording, also how far it is done.

        An error may come after some of the text, and nothing is tried again then.
        """
        recording = await asyncio.to_thread(exchange.read_audio, audio)
        request = exchange.transcribe_request(recording, options, stream="true")
        events = self._events(request, transcription_from)
        async with contextlib.aclosing(events):
            async for event in events:
                yield event

    async def _answer(
        self, request: dict[str, Any], on_progress: Callable[[Progress], None] | None
    ) -> Answer:
        """Ask for a transcript, and meanwhile for its progress if somebody wants to know."""
        if on_progress is None:
            return exchange.answer_of(await self._send(request))
        request["data"]["progress"] = "true"
        answer = None
        async with contextlib.aclosing(self._events(request, exchange.answer_from)) as events:
            async for event in events:
                if isinstance(event, Progress):
                    on_progress(event)
                elif isinstance(event, Answer):
                    answer = event
        if answer is None:
            raise UnexpectedAnswerError("the stream ended without an answer")
        return answer

    async def _events(
        self, request: dict[str, Any], whole: Callable[[dict[str, Any], str | None], _Whole]
    ) -> AsyncGenerator[TextDelta | Progress | _Whole, None]:
        """Yield a stream's events; `whole` reads the last."""
        response = await self._send(request, stream=True)
        try:
            reader = exchange.EventReader(response, whole)
            async for chunk in response.aiter_bytes():
                for event in reader.feed(chunk):
                    yield event
            reader.end()
        except httpx.HTTPError as error:
            raise exchange.transport_error(error) from error
        finally:
            await response.aclose()

    async def models(self) -> list[str]:
        """Return the names of the models that the server has."""
        return exchange.model_names(await self._send({"method": "GET", "url": "v1/models"}))

    async def _send(self, request: dict[str, Any], *, stream: bool = False) -> httpx.Response:
        """Send, again if need be, until there is a success to return or a failure to raise."""
        for retries in itertools.count():
            try:
                response = await self._http.send(self._http.build_request(**request), stream=stream)
                if response.is_success:
                    return response
                await response.aread()
            except httpx.HTTPError as error:
                raise exchange.transport_error(error) from error
            failure = exchange.refusal(response)
            pause_s = self._retry.pause_s(retries, failure)
            if pause_s is None:
                raise failure
            await asyncio.sleep(pause_s)
        raise AssertionError

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        """Return the client."""
        return self

    async def __aexit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        """Close the connections."""
        await self.aclose()
