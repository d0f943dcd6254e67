"""A client for this server: `Client`, and `AsyncClient` for asyncio.

    from server.client import Client

    with Client("http://127.0.0.1:8000") as client:
        print(client.transcribe("recording.wav").text)

It needs httpx and nothing else of this package.
"""

from server.client.async_client import AsyncClient
from server.client.client import Client
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
from server.client.exchange import (
    API_KEY_VARIABLE,
    Audio,
    Options,
    ResponseFormat,
    Timestamps,
)
from server.client.results import (
    Hypothesis,
    Progress,
    Segment,
    StreamEvent,
    TextDelta,
    Timings,
    TokenLogprob,
    Transcription,
    Word,
)
from server.client.retry import Retry

__all__ = [
    "API_KEY_VARIABLE",
    "ApiError",
    "AsyncClient",
    "Audio",
    "AuthenticationError",
    "Client",
    "ClientError",
    "ConnectionFailedError",
    "Hypothesis",
    "Options",
    "OverloadedError",
    "Progress",
    "RequestRefusedError",
    "RequestTimeoutError",
    "ResponseFormat",
    "Retry",
    "Segment",
    "ServerFailedError",
    "StreamEvent",
    "TextDelta",
    "Timestamps",
    "Timings",
    "TokenLogprob",
    "Transcription",
    "UnexpectedAnswerError",
    "Word",
]
