"""The one table from errors to HTTP statuses and codes, and the one shape of error bodies."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from server import errors
from server.api.schemas import ErrorBody, ErrorDetail
from server.log import structured

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi import FastAPI, Request

_log = logging.getLogger(__name__)

INVALID_REQUEST = "invalid_request_error"
CAPACITY = "capacity_error"
RATE_LIMIT = "rate_limit_error"
INTERNAL = "internal_error"


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """How an error goes out: HTTP status, stable code and its family."""

    status: int
    code: str
    type: str


ERROR_TABLE: dict[type[errors.ServerError], ErrorKind] = {
    errors.InvalidRequestError: ErrorKind(400, "invalid_request", INVALID_REQUEST),
    errors.LanguageUnsupportedError: ErrorKind(400, "language_unsupported", INVALID_REQUEST),
    errors.ModelUnknownError: ErrorKind(404, "model_not_found", INVALID_REQUEST),
    errors.TaskUnsupportedError: ErrorKind(400, "task_unsupported", INVALID_REQUEST),
    errors.ApiKeyError: ErrorKind(401, "invalid_api_key", INVALID_REQUEST),
    errors.OriginRefusedError: ErrorKind(403, "origin_refused", INVALID_REQUEST),
    errors.UploadTooLargeError: ErrorKind(413, "upload_too_large", INVALID_REQUEST),
    errors.UploadStalledError: ErrorKind(408, "upload_stalled", INVALID_REQUEST),
    errors.BufferEmptyError: ErrorKind(400, "input_audio_buffer_commit_empty", INVALID_REQUEST),
    errors.AudioEmptyError: ErrorKind(400, "audio_empty", INVALID_REQUEST),
    errors.AudioUnrecognisedError: ErrorKind(415, "audio_unrecognised", INVALID_REQUEST),
    errors.AudioUnsupportedError: ErrorKind(415, "audio_unsupported", INVALID_REQUEST),
    errors.AudioTruncatedError: ErrorKind(400, "audio_truncated", INVALID_REQUEST),
    errors.AudioUnreadableError: ErrorKind(400, "audio_unreadable", INVALID_REQUEST),
    errors.AudioNotFiniteError: ErrorKind(400, "audio_not_finite", INVALID_REQUEST),
    errors.AudioTooLongError: ErrorKind(413, "audio_too_long", INVALID_REQUEST),
    errors.QueueFullError: ErrorKind(429, "queue_full", CAPACITY),
    errors.RateLimitedError: ErrorKind(429, "rate_limit_exceeded", RATE_LIMIT),
    errors.BufferFullError: ErrorKind(429, "input_audio_buffer_full", CAPACITY),
    errors.NotReadyError: ErrorKind(503, "not_ready", CAPACITY),
    errors.ShuttingDownError: ErrorKind(503, "shutting_down", CAPACITY),
    errors.DeadlineExceededError: ErrorKind(504, "deadline_exceeded", CAPACITY),
    errors.DecoderCrashedError: ErrorKind(500, "decoder_crashed", INTERNAL),
    errors.DecodeTimeoutError: ErrorKind(500, "decode_timeout", INTERNAL),
    errors.InferenceFailedError: ErrorKind(500, "inference_failed", INTERNAL),
}
UNEXPECTED = ErrorKind(500, "internal_error", INTERNAL)

PROBLEM_MEDIA_TYPE = "application/problem+json"


def error_response(
    request: Request,
    kind: ErrorKind,
    message: str,
    *,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Build an error answer and count it; as RFC 9457 describes problems for who asks for that."""
    body = error_body(request, kind, message, param=param)
    if PROBLEM_MEDIA_TYPE not in request.headers.get("accept", ""):
        return JSONResponse(body, status_code=kind.status, headers=dict(headers or {}))
    problem = {
        "type": "about:blank",
        "title": HTTPStatus(kind.status).phrase,
        "status": kind.status,
        "detail": message,
        **{name: body["error"][name] for name in ("code", "param", "request_id")},
    }
    return JSONResponse(
        problem, kind.status, headers=dict(headers or {}), media_type=PROBLEM_MEDIA_TYPE
    )


def error_body(
    request: Request, kind: ErrorKind, message: str, *, param: str | None = None
) -> dict[str, Any]:
    """Return what an error says, in OpenAI's shape, and count it."""
    request.state.error_code = kind.code
    request.app.state.runtime.metrics.refused(kind.code)
    detail = ErrorDetail(
        message=message,
        type=kind.type,
        code=kind.code,
        param=param,
        request_id=getattr(request.state, "request_id", None),
    )
    return ErrorBody(error=detail).model_dump()


def server_error_body(request: Request, error: errors.ServerError) -> dict[str, Any]:
    """Return what goes out for an error where the status is out already; and count it."""
    kind = ERROR_TABLE.get(type(error), UNEXPECTED)
    return error_body(request, kind, error.message, param=error.param)


def unexpected_error_body(request: Request) -> dict[str, Any]:
    """Return what goes out for an error of ours, out of its handler; log and count it."""
    request_id = getattr(request.state, "request_id", None)
    _log.exception("unexpected error", extra=structured(request_id=request_id))
    return error_body(request, UNEXPECTED, "the server failed on this request")


def error_headers(error: errors.ServerError) -> dict[str, str]:
    """Return what the head of an error's answer says: when to come back, what key is wanted."""
    headers = {}
    if isinstance(error, errors.CapacityError) and error.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    if isinstance(error, errors.ApiKeyError):
        headers["WWW-Authenticate"] = "Bearer"
    return headers


def install_error_handlers(app: FastAPI) -> None:
    """Give every error, the framework's own included, our shape."""
    app.add_exception_handler(errors.ServerError, _on_server_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)


async def _on_server_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, errors.ServerError)  # noqa: S101 - what it is registered for
    kind = ERROR_TABLE.get(type(error), UNEXPECTED)
    headers = error_headers(error)
    return error_response(request, kind, error.message, param=error.param, headers=headers)


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Starlette's own: no such path, wrong method."""
    assert isinstance(error, HTTPException)  # noqa: S101 - what it is registered for
    code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_").replace("-", "_")
    kind = ErrorKind(error.status_code, code, INVALID_REQUEST)
    message = f"{error.detail}: {request.method} {request.url.path}"
    return error_response(request, kind, message, headers=error.headers)


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - what it is registered for
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"][1:]) or None
    kind = ErrorKind(422, "invalid_parameter", INVALID_REQUEST)
    return error_response(request, kind, first["msg"], param=param)
