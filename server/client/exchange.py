"""What goes over the wire, without any input or output: both clients call this."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Generic, Literal, TypedDict, TypeVar

import httpx

from server.client.errors import (
    ApiError,
    AuthenticationError,
    ClientError,
    ConnectionFailedError,
    OverloadedError,
    RequestRefusedError,
    RequestTimeoutError,
    ServerFailedError,
    UnexpectedAnswerError,
)
from server.client.results import (
    Progress,
    TextDelta,
    Transcription,
    transcription_from,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

API_KEY_VARIABLE = "SPEECHLLM_API_KEY"
"""Environment variable that holds the key of a client which is given none."""

Audio = bytes | str | os.PathLike[str] | BinaryIO
"""A recording: its bytes, its path, or an open binary file."""

ResponseFormat = Literal["json", "verbose_json", "text", "srt", "vtt", "tsv"]
Timestamps = Literal["none", "segment", "word"]

_Whole = TypeVar("_Whole")

_CONNECT_TIMEOUT_S = 10.0
_UNAUTHORIZED, _TOO_MANY, _UNAVAILABLE = 401, 429, 503


class Options(TypedDict, total=False):
    """What may be asked of a transcription; the server's documentation says what each means."""

    language: str
    prompt: str
    hotwords: Sequence[str]
    previous_text: str
    condition_on_previous_text: bool
    timestamps: Timestamps
    temperature: float
    num_beams: int
    n_best: int
    logprobs: bool
    deadline_ms: int
    vad: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """The body of `POST /transcribe`'s answer, and what names the request in the server's log."""

    body: str
    request_id: str | None


def http_options(base_url: str, api_key: str | None, timeout_s: float) -> dict[str, Any]:
    """Return what httpx's clients take.

    Raises:
        ClientError: neither the address nor the key can be one.
    """
    try:
        scheme = httpx.URL(base_url).scheme
    except httpx.InvalidURL as error:
        raise ClientError(f"{base_url!r} is no address of a server: {error}") from error
    if scheme not in {"http", "https"}:
        raise ClientError(f"{base_url!r} is no address of a server: it begins with no http://")
    key = api_key if api_key is not None else os.environ.get(API_KEY_VARIABLE, "")
    key = key.strip()  # a file's line end, say
    headers = {"User-Agent": f"speechllm-client/{_version()}"}
    if not (key.isascii() and key.isprintable()):
        raise ClientError("the API key has characters that no header can carry")
    if key:
        headers["Authorization"] = f"Bearer {key}"
    return {
        "base_url": base_url,
        "headers": headers,
        "timeout": httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_TIMEOUT_S)),
    }


def read_audio(audio: Audio) -> tuple[str, bytes]:
    """Return a recording's name and bytes; in memory, since a refused upload is sent again.

    Raises:
        OSError: the file cannot be read.
    """
    if isinstance(audio, bytes | bytearray | memoryview):
        return "recording", bytes(audio)
    if isinstance(audio, str | os.PathLike):
        path = Path(audio)
        # A name that is not UTF-8 cannot be sent; only its ending could be of use.
        return path.name.encode(errors="replace").decode(), path.read_bytes()
    return Path(str(getattr(audio, "name", "recording"))).name, audio.read()


def transcribe_request(
    recording: tuple[str, bytes], options: Options, **fields: str
) -> dict[str, Any]:
    """Return what httpx's `build_request` takes for `POST /transcribe`.

    Raises:
        ClientError: an option is a text that is no Unicode.
    """
    data = {name: _text(value) for name, value in options.items()} | fields
    for name, value in data.items():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ClientError(f"{name} cannot be sent: it is not Unicode") from error
    return {
        "method": "POST",
        "url": "transcribe",
        "files": {"file": (*recording, "application/octet-stream")},
        "data": data,
    }


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, str | int | float) else ",".join(map(str, value))  # type: ignore[call-overload]  # a sequence is what is left


def transport_error(error: httpx.HTTPError) -> ClientError:
    """Translate what httpx raises."""
    if isinstance(error, httpx.TimeoutException):
        if isinstance(error, httpx.ConnectTimeout):
            return ConnectionFailedError("cannot connect: nobody answers")
        return RequestTimeoutError("no answer within the client's time limit")
    if isinstance(error, httpx.ConnectError):
        return ConnectionFailedError(f"cannot connect: {error}")
    return ConnectionFailedError(f"the connection broke: {error or type(error).__name__}")


def refusal(response: httpx.Response) -> ClientError:
    """Translate an answer that has been read and is no success."""
    try:
        error = response.json()["error"]
        return _api_error(response, error, response.status_code)
    except (ValueError, KeyError, TypeError):
        reason = response.reason_phrase or "no reason"
        message = f"the server answers {response.status_code} ({reason}), in no form known here"
        if response.status_code in {_TOO_MANY, _UNAVAILABLE}:  # a proxy before the server
            return OverloadedError(
                message,
                status=response.status_code,
                code="unavailable",
                retry_after_s=_retry_after_s(response),
            )
        return UnexpectedAnswerError(message)


def _api_error(response: httpx.Response, error: dict[str, Any], status: int) -> ApiError:
    if not isinstance(error, dict):
        raise TypeError("an error of another form")
    kind: type[ApiError] = ServerFailedError
    family = error.get("type")
    if status == _UNAUTHORIZED:
        kind = AuthenticationError
    elif status in {_TOO_MANY, _UNAVAILABLE} or family == "rate_limit_error":
        kind = OverloadedError
    elif status // 100 == 4 or family == "invalid_request_error":  # noqa: PLR2004 - 4xx
        kind = RequestRefusedError
    return kind(
        error["message"],
        status=status,
        code=error["code"],
        param=error.get("param"),
        request_id=error.get("request_id") or response.headers.get("X-Request-ID"),
        retry_after_s=_retry_after_s(response),
    )


def _retry_after_s(response: httpx.Response) -> float | None:
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isascii() and value.isdecimal() else None


def answer_of(response: httpx.Response) -> Answer:
    """Take an answer that came at once."""
    return Answer(response.text, response.headers.get("X-Request-ID"))


def answer_from(event: dict[str, Any], request_id: str | None) -> Answer:
    """Take an answer that came behind events of progress.

    Raises:
        UnexpectedAnswerError: it is something else.
    """
    try:
        return Answer(event["body"], request_id)
    except KeyError as error:
        raise UnexpectedAnswerError("the last event holds no answer") from error


def transcription_of(answer: Answer) -> Transcription:
    """Read `POST /transcribe`'s `json`.

    Raises:
        UnexpectedAnswerError: it is something else.
    """
    return transcription_from(json_of(answer.body), answer.request_id)


def json_of(body: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UnexpectedAnswerError: it is something else.
    """
    try:
        value = json.loads(body)
    except ValueError as error:
        raise UnexpectedAnswerError("the answer is no JSON") from error
    if not isinstance(value, dict):
        raise UnexpectedAnswerError("the answer is no JSON object")
    return value


def model_names(response: httpx.Response) -> list[str]:
    """Read `GET /v1/models`.

    Raises:
        UnexpectedAnswerError: it is something else.
    """
    try:
        return [str(model["id"]) for model in json_of(response.text)["data"]]
    except (KeyError, TypeError) as error:
        raise UnexpectedAnswerError("the answer lists no models") from error


class EventReader(Generic[_Whole]):
    """Server-sent events from bytes as they come.

    Lines end with line feeds only: the text between may hold U+2028 and its like, at which
    `str.splitlines`, and so httpx's `iter_lines`, would cut it.
    """

    def __init__(
        self, response: httpx.Response, whole: Callable[[dict[str, Any], str | None], _Whole]
    ) -> None:
        """Begin.

        Args:
            response: the answer, for what its headers say.
            whole: reads the last event; it is given the request's id, too.
        """
        self._response = response
        self._whole = whole
        self._rest = b""
        self._has_ended = False

    def feed(self, chunk: bytes) -> Iterator[TextDelta | Progress | _Whole]:
        """Take bytes and yield the events that they complete.

        Raises:
            ApiError: the server failed on the way.
            UnexpectedAnswerError: this is no stream of transcripts.
        """
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                self._has_ended = True
            else:
                yield self._event(data)

    def end(self) -> None:
        """No more bytes come.

        Raises:
            ConnectionFailedError: the stream was not at its end.
        """
        if not self._has_ended:
            raise ConnectionFailedError("the stream broke off before its end")

    def _event(self, data: bytes) -> TextDelta | Progress | _Whole:
        try:
            event = json.loads(data)
            if "error" in event:
                raise _api_error(self._response, event["error"], self._response.status_code)
            if event["type"] == "transcript.text.delta":
                return TextDelta(event["delta"])
            if event["type"] == "transcript.progress":
                return Progress(event["processed"], event["duration"])
        except (ValueError, KeyError, TypeError) as error:
            raise UnexpectedAnswerError("the answer is no stream of events") from error
        return self._whole(event, self._response.headers.get("X-Request-ID"))


def _version() -> str:
    try:
        return metadata.version("speechllm")
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"
