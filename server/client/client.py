"""The client for code that blocks."""

from __future__ import annotations

import contextlib
import itertools
import time
from typing import TYPE_CHECKING, Any, Self, TypeVar

import httpx

from server.client import exchange
from server.client.errors import UnexpectedAnswerError
from server.client.exchange import Answer
from server.client.results import Progress, transcription_from
from server.client.retry import Retry

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from types import TracebackType
    from typing import Unpack

    from server.client.exchange import Audio, Options, ResponseFormat
    from server.client.results import StreamEvent, TextDelta, Transcription

_Whole = TypeVar("_Whole")


class Client:
    """Talks to one server; may be used from several threads. Close it, or use it in `with`.

    Every method raises a `ClientError`, and `OSError` where a file cannot be read.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        retry: Retry | None = None,
    ) -> None:
        """Connect to nothing yet.

        Args:
            base_url: of the server.
            api_key: None takes the environment's SPEECHLLM_API_KEY, if there is one.
            timeout_s: longest wait for the next bytes in either direction, seconds; for the answer
                to a long recording, this is the time that its transcription takes.
            retry: when to try again; None for `Retry()`.
        """
        self._http = httpx.Client(**exchange.http_options(base_url, api_key, timeout_s))
        self._retry = retry or Retry()

    def transcribe(
        self,
        audio: Audio,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        **options: Unpack[Options],
    ) -> Transcription:
        """Turn a recording into text; `on_progress` is told how far a long one is done."""
        recording = exchange.read_audio(audio)
        request = exchange.transcribe_request(recording, options)
        return exchange.transcription_of(self._answer(request, on_progress))

    def transcribe_to(
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
        recording = exchange.read_audio(audio)
        request = exchange.transcribe_request(recording, options, response_format=response_format)
        return (self._answer(request, on_progress)).body

    def stream(self, audio: Audio, **options: Unpack[Options]) -> Iterator[StreamEvent]:
        """Yield pieces of text as they come, and the whole transcription last.

        Of a long recording, also how far it is done.

        An error may come after some of the text, and nothing is tried again then.
        """
        recording = exchange.read_audio(audio)
        request = exchange.transcribe_request(recording, options, stream="true")
        yield from self._events(request, transcription_from)

    def _answer(
        self, request: dict[str, Any], on_progress: Callable[[Progress], None] | None
    ) -> Answer:
        """Ask for a transcript, and meanwhile for its progress if somebody wants to know."""
        if on_progress is None:
            return exchange.answer_of(self._send(request))
        request["data"]["progress"] = "true"
        answer = None
        with contextlib.closing(self._events(request, exchange.answer_from)) as events:
            for event in events:
                if isinstance(event, Progress):
                    on_progress(event)
                elif isinstance(event, Answer):
                    answer = event
        if answer is None:
            raise UnexpectedAnswerError("the stream ended without an answer")
        return answer

    def _events(
        self, request: dict[str, Any], whole: Callable[[dict[str, Any], str | None], _Whole]
    ) -> Generator[TextDelta | Progress | _Whole, None, None]:
        """Yield a stream's events; `whole` reads the last."""
        response = self._send(request, stream=True)
        try:
            reader = exchange.EventReader(response, whole)
            for chunk in response.iter_bytes():
                yield from reader.feed(chunk)
            reader.end()
        except httpx.HTTPError as error:
            raise exchange.transport_error(error) from error
        finally:
            response.close()

    def models(self) -> list[str]:
        """Return the names of the models that the server has."""
        return exchange.model_names(self._send({"method": "GET", "url": "v1/models"}))

    def _send(self, request: dict[str, Any], *, stream: bool = False) -> httpx.Response:
        """Send, again if need be, until there is a success to return or a failure to raise."""
        for retries in itertools.count():
            try:
                response = self._http.send(self._http.build_request(**request), stream=stream)
                if response.is_success:
                    return response
                response.read()
            except httpx.HTTPError as error:
                raise exchange.transport_error(error) from error
            failure = exchange.refusal(response)
            pause_s = self._retry.pause_s(retries, failure)
            if pause_s is None:
                raise failure
            time.sleep(pause_s)
        raise AssertionError

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        """Close the connections."""
        self.close()
