"""`WS /v1/realtime`: OpenAI's realtime transcription sessions. Protocol only."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse

from server.api.errors import ERROR_TABLE, UNEXPECTED, error_headers
from server.api.forms import check_languages
from server.api.middleware import name_request
from server.api.realtime_events import (
    Append,
    Clear,
    ClientEvent,
    Commit,
    SessionUpdate,
    ending_event,
    error_detail,
    error_event,
    load_message,
    parse_event,
    server_events,
    session_event,
)
from server.errors import (
    InvalidRequestError,
    OriginRefusedError,
    ServerError,
)
from server.keys import ANONYMOUS
from server.log import structured
from server.pipeline import check_prompt
from server.realtime import RealtimeSession, SessionConfig, SessionLimits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from server.realtime import SessionEvent
    from server.runtime import Runtime

_log = logging.getLogger("speechllm.access")

router = APIRouter()

MAX_MESSAGE_BYTES = 4 * 2**20
"""Largest WebSocket message: base64 of a minute of 24 kHz samples."""

_PROTOCOL = "realtime"
_KEY_PROTOCOL = "openai-insecure-api-key."  # browsers cannot set headers
_MAX_UNSENT_EVENTS = 256
_CLOSE_S = 5.0  # longest wait for a client to take the reason of the end

_Ending = Literal["client", "idle", "expired", "slow_reader", "shutdown", "error"]
_CLOSE_CODES: dict[_Ending, int] = {
    "idle": 1008,
    "expired": 1008,
    "slow_reader": 1008,
    "shutdown": 1012,
    "error": 1011,
}


class _SessionEnd(Exception):  # noqa: N818 - most ends are no errors
    """The session is over; says why."""

    def __init__(self, ending: _Ending, message: str = "") -> None:
        super().__init__(message)
        self.ending = ending
        self.message = message


@router.websocket("/v1/realtime")
async def transcribe_live(websocket: WebSocket) -> None:
    """Transcribe speech while it is spoken."""
    runtime: Runtime = websocket.app.state.runtime
    with contextlib.ExitStack() as held:
        try:
            owner = _owner(websocket, runtime)
            _check_query(websocket, runtime)
            runtime.require_ready()
            with runtime.key_limits.hold(owner, 0.0):
                pass  # the key has a share left now; each turn is held against it
            ticket = held.enter_context(runtime.engine.admit(0.0))
            held.enter_context(runtime.open_sessions.place())
        except ServerError as error:
            await _refuse(websocket, runtime, error)
            return
        ticket.measure(0.0, clips=0)  # until there is something to do
        offered = websocket.scope.get("subprotocols", [])
        await websocket.accept(subprotocol=_PROTOCOL if _PROTOCOL in offered else None)
        connection = _Connection(websocket, runtime, owner)
        connection.session = RealtimeSession(
            runtime.engine,
            ticket,
            SessionLimits(
                max_buffer_s=runtime.settings.realtime_max_buffer_s,
                partial_interval_s=runtime.settings.realtime_partial_interval_ms / 1000,
                request_timeout_s=runtime.settings.request_timeout_s,
                max_piece_s=runtime.settings.max_excerpt_s,
            ),
            runtime.metrics,
            id_=connection.id,
            emit=connection.emit,
            charge=connection.charge,
        )
        await connection.serve()


def _owner(websocket: WebSocket, runtime: Runtime) -> str:
    """Return whose the session is, by its bearer key or the one among its subprotocols.

    Raises:
        ApiKeyError: it has no key, or a wrong one.
        OriginRefusedError: it comes from a page that may not call this server.
    """
    _check_origin(websocket, runtime.settings.origins)
    scheme, _, bearer = websocket.headers.get("authorization", "").partition(" ")
    key = bearer.strip() if scheme.lower() == "bearer" and bearer.strip() else None
    for protocol in websocket.scope.get("subprotocols", []):
        if protocol.startswith(_KEY_PROTOCOL):
            key = key or protocol.removeprefix(_KEY_PROTOCOL)
    return runtime.keys.owner(key)


def _check_origin(websocket: WebSocket, allowed: tuple[str, ...]) -> None:
    """Refuse pages from elsewhere: browsers let any page open a WebSocket to anywhere."""
    origin = websocket.headers.get("origin")
    if origin is None or "*" in allowed or origin in allowed:
        return
    try:
        place = urlsplit(origin).netloc
    except ValueError:  # no address at all
        place = None
    if place != websocket.headers.get("host"):
        raise OriginRefusedError(f"pages of {origin} may not call this server")


def _check_query(websocket: WebSocket, runtime: Runtime) -> None:
    intent = websocket.query_params.get("intent", "transcription")
    if intent != "transcription":
        raise InvalidRequestError(
            f"sessions here have the intent transcription, not {intent!r}", param="intent"
        )
    if (model := websocket.query_params.get("model")) is not None:
        runtime.require_model(model)


async def _refuse(websocket: WebSocket, runtime: Runtime, error: ServerError) -> None:
    """Answer the handshake with an error, as other endpoints do."""
    kind = ERROR_TABLE.get(type(error), UNEXPECTED)
    runtime.metrics.refused(kind.code)
    request_id = name_request(websocket)
    client = websocket.client.host if websocket.client else None
    fields = {"request_id": request_id, "error": kind.code, "client": client}
    _log.info("realtime session refused", extra=structured(**fields))
    headers = {**error_headers(error), "X-Request-ID": request_id}
    body = {"error": {**error_detail(error), "request_id": request_id}}
    await websocket.send_denial_response(JSONResponse(body, kind.status, headers=headers))


class _Connection:
    """A client's connection: its messages, one after the other, and what it is told."""

    session: RealtimeSession

    def __init__(self, websocket: WebSocket, runtime: Runtime, owner: str) -> None:
        self._websocket = websocket
        self._runtime = runtime
        self._owner = owner
        self.id = f"sess_{uuid.uuid4().hex[:20]}"
        self._began_s = time.monotonic()
        self._expires_at = round(time.time() + runtime.settings.realtime_max_session_s)
        self._unsent: asyncio.Queue[dict[str, Any]] = asyncio.Queue(_MAX_UNSENT_EVENTS)
        self._turns = 0
        self._is_ending = False

    def emit(self, event: SessionEvent) -> None:
        """Tell the client of an event of its session."""
        for each in server_events(event):
            self._send(each)
            self._turns += each["type"] == "input_audio_buffer.committed"

    def _send(self, event: dict[str, Any]) -> None:
        try:
            self._unsent.put_nowait(event)
        except asyncio.QueueFull:
            raise _SessionEnd(
                "slow_reader", f"{_MAX_UNSENT_EVENTS} events wait to be read"
            ) from None

    @contextlib.asynccontextmanager
    async def charge(self, audio_s: float) -> AsyncIterator[None]:
        """Hold a turn's audio against the key's share, and wait for the key's turn."""
        runtime, owner = self._runtime, self._owner
        with runtime.key_limits.hold(owner, audio_s):
            if owner == ANONYMOUS:
                yield
                return
            async with runtime.turnstile.pass_through(owner, audio_s):
                yield

    async def serve(self) -> None:
        """Run the session until it ends, one way or another."""
        self._runtime.metrics.realtime_began()
        ending: _Ending = "client"
        try:
            self._send_session("session.created")
            await self._run()
        except* _SessionEnd as ends:
            ending, message = _first_end(ends)
            if ending != "client":
                await self._close(ending, message)
        except* WebSocketDisconnect:
            pass
        except* Exception:  # noqa: BLE001 - logged, and told to the client
            ending = "error"
            _log.exception("unexpected error", extra=structured(session_id=self.id))
            await self._close(ending, "the server failed on this session")
        finally:
            self._runtime.metrics.realtime_ended(ending)
            self._write_log_line(ending)

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._write())
            group.create_task(self.session.run())
            group.create_task(self._watch())
            await self._read()

    async def _write(self) -> None:
        while True:
            event = await self._unsent.get()
            # Waits while the client reads more slowly than it is written to.
            await self._websocket.send_text(json.dumps(event, ensure_ascii=False))

    async def _watch(self) -> None:
        """End the session when its time is up or the server is about to end."""
        ending: _Ending = "shutdown"
        message = "the server is shutting down"
        longest_s = self._runtime.settings.realtime_max_session_s
        try:
            async with asyncio.timeout(longest_s):
                await self._runtime.open_sessions.closing.wait()
        except TimeoutError:
            ending, message = "expired", f"the session has lasted {longest_s:g} s"
        self._is_ending = True
        await self._finish()
        raise _SessionEnd(ending, message)

    async def _finish(self) -> None:
        """Have what was heard transcribed, if that does not take too long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._runtime.settings.drain_timeout_s):
                await self.session.finish()

    async def _read(self) -> None:
        idle_s = self._runtime.settings.realtime_idle_timeout_s
        while True:
            try:
                async with asyncio.timeout(idle_s):
                    message = await self._websocket.receive()
            except TimeoutError:
                await self._finish()  # whoever waits for a turn's text has no more to send
                raise _SessionEnd("idle", f"nothing came for {idle_s:g} s") from None
            if message["type"] == "websocket.disconnect":
                raise _SessionEnd("client")
            if not self._is_ending:
                await self._take(message.get("text"), message.get("bytes"))

    async def _take(self, text: str | None, data: bytes | None) -> None:
        """Do what a message asks for; what is wrong with it is told, and the session goes on."""
        event_id: str | None = None
        try:
            if data is not None:
                await self.session.append(data)
                return
            message = load_message(text or "")
            if isinstance(given := message.get("event_id"), str):
                event_id = given
            await self._obey(parse_event(message))
        except ServerError as error:
            self._runtime.metrics.refused(ERROR_TABLE.get(type(error), UNEXPECTED).code)
            self._send(error_event(error, event_id))

    async def _obey(self, event: ClientEvent) -> None:
        match event:
            case Append():
                await self.session.append(event.samples())
            case Commit():
                await self.session.commit()
            case Clear():
                self.session.clear()
            case SessionUpdate():
                config = event.apply(self.session.config, self._runtime.require_model)
                self._configure(config)

    def _configure(self, config: SessionConfig) -> None:
        asked = [config.language] if config.language is not None else []
        capabilities = self._runtime.engine.capabilities
        check_languages(asked, capabilities.languages)
        check_prompt(config.prompt, capabilities)
        self.session.configure(config)
        self._send_session("session.updated")

    def _send_session(self, kind: str) -> None:
        model = self._runtime.settings.served_name
        config = self.session.config
        self._send(session_event(kind, self.id, config, model=model, expires_at=self._expires_at))

    async def _close(self, ending: _Ending, message: str) -> None:
        """Say why the session ends, to a client that may not listen."""
        with contextlib.suppress(TimeoutError, WebSocketDisconnect, RuntimeError):
            async with asyncio.timeout(_CLOSE_S):
                if ending != "slow_reader":
                    while not self._unsent.empty():
                        await self._websocket.send_json(self._unsent.get_nowait())
                    await self._websocket.send_json(ending_event(f"session_{ending}", message))
                await self._websocket.close(_CLOSE_CODES[ending], message)

    def _write_log_line(self, ending: _Ending) -> None:
        client = self._websocket.client
        fields = {
            "session_id": self.id,
            "path": self._websocket.url.path,
            "ending": ending,
            "seconds": round(time.monotonic() - self._began_s, 3),
            "audio_s": round(self.session.audio_s, 3),
            "turns": self._turns,
            "client": client.host if client else None,
        }
        if self._owner != ANONYMOUS:
            fields["key"] = self._owner
        _log.info("live session", extra=structured(**fields))


def _first_end(ends: BaseExceptionGroup[_SessionEnd]) -> tuple[_Ending, str]:
    first = ends.exceptions[0]
    if isinstance(first, BaseExceptionGroup):
        return _first_end(first)
    return first.ending, first.message
