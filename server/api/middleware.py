"""Around every request: its id, its log line, its metrics, safe headers, a body for any error."""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import TYPE_CHECKING

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, HTTPConnection, Request

from server.api.errors import UNEXPECTED, error_response
from server.log import structured

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_log = logging.getLogger("speechllm.access")

# What a client may name a request; anything else could forge log lines.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._\-]{1,128}")
# Pages that need more than nothing bring a policy of their own.
_SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_CLIENT_LEFT = 499  # as nginx logs a client that did not wait


class RequestMiddleware:
    """Pure ASGI, so that endpoints see the client leave."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap an application."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection event stream."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        request.state.request_id = request_id = name_request(request)
        request.state.started_s = time.monotonic()
        metrics = request.app.state.runtime.metrics
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                for name, value in _SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        metrics.request_started()
        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = _CLIENT_LEFT
        except Exception:
            _log.exception("unexpected error", extra=structured(request_id=request_id))
            if status is not None:  # the answer is half out; cutting the connection says so
                raise
            response = error_response(request, UNEXPECTED, "the server failed on this request")
            await response(scope, receive, send_with_id)
        finally:
            # No status: the task was cancelled at shutdown, or the client left.
            final = _CLIENT_LEFT if status is None else status
            metrics.request_ended(_endpoint(scope), request.method, final)
            _write_log_line(request, final)


def name_request(request: HTTPConnection) -> str:
    """Return the name that the client gave its request, if it is a fit one, or a new one."""
    given = request.headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _endpoint(scope: Scope) -> str:
    """Return the route's template: paths are without bound, templates are not."""
    return getattr(scope.get("route"), "path", "unmatched")


def _write_log_line(request: Request, status: int) -> None:
    state = request.state
    fields = {
        "request_id": state.request_id,
        "method": request.method,
        "path": request.url.path,
        "status": status,
        "seconds": round(time.monotonic() - state.started_s, 4),
        "client": request.client.host if request.client else None,
        **getattr(state, "log_fields", {}),
    }
    if (code := getattr(state, "error_code", None)) is not None:
        fields["error"] = code
    quiet = request.url.path.startswith("/health/") or request.url.path == "/metrics"
    _log.log(logging.DEBUG if quiet else logging.INFO, "request", extra=structured(**fields))
