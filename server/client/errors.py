"""What a call can end with.

ClientError
├── ConnectionFailedError   nobody answers at the address, or the connection broke
├── RequestTimeoutError     no answer within the client's own limit
├── UnexpectedAnswerError   an answer, but none of this API
└── ApiError                the server says why
    ├── AuthenticationError     401: no API key, or a wrong one
    ├── RequestRefusedError     4xx: sending the same again fails again
    ├── OverloadedError         429, 503: come back later
    └── ServerFailedError       5xx: the server's doing
"""

from __future__ import annotations


class ClientError(Exception):
    """Base of everything that the client raises; `str` of it is a reason for people."""


class ConnectionFailedError(ClientError):
    """Nobody answers at the address, or the connection broke."""


class RequestTimeoutError(ClientError):
    """No answer within the client's own limit."""


class UnexpectedAnswerError(ClientError):
    """An answer, but none of this API: another program listens at the address."""


class ApiError(ClientError):
    """The server refuses, and says why.

    Attributes:
        message: the reason, for people.
        status: of the answer; 200 where a stream broke off after it had begun.
        code: the reason, for programs; stable.
        param: the field at fault, if it is one.
        request_id: names the request in the server's log.
        retry_after_s: when to come back, in seconds; None where the server does not say.
    """

    def __init__(  # noqa: PLR0913 - what an error of this API has
        self,
        message: str,
        *,
        status: int,
        code: str,
        param: str | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        """Give everything that the server has said."""
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.param = param
        self.request_id = request_id
        self.retry_after_s = retry_after_s


class AuthenticationError(ApiError):
    """The server wants an API key, and this is none that it knows."""


class RequestRefusedError(ApiError):
    """The audio or an option is not right; sending the same again fails again."""


class OverloadedError(ApiError):
    """The server cannot take the request now."""


class ServerFailedError(ApiError):
    """The server's own doing, or its deadline has passed."""
