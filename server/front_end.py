"""The HTTP server of a process; `python -m server.front_end` is one of several for one engine."""

from __future__ import annotations

import asyncio
import math
import pickle
import signal
import socket
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import uvicorn

from server.api.realtime import MAX_MESSAGE_BYTES
from server.app import create_app, make_admission
from server.board import Board, Seat
from server.engine.remote import RemoteEngine
from server.engine.shared_samples import SharedSamples
from server.log import configure_logging
from server.metrics import Metrics
from server.runtime import Shared

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi import FastAPI

    from server.runtime import Runtime
    from server.settings import Settings

_CLOSE_CONNECTIONS_S = 5  # after draining, for the answers to get out
_LOOK_AGAIN_S = 0.1


@dataclass(frozen=True, slots=True)
class Orders:
    """What a front end is told by the process that starts it, on its standard input.

    Attributes:
        settings: of the whole server.
        place: which front end it is.
        keys: whose use the board counts.
        listener: descriptor of the socket that all of them accept from.
        channel: of its end of the socket pair to the engine's process.
        board: of the shared numbers' file.
        samples: of the file of samples that it shares with the engine's process.
    """

    settings: Settings
    place: int
    keys: int
    listener: int
    channel: int
    board: int
    samples: int


def serve(app_of: Callable[[Callable[[], None]], FastAPI], listener: socket.socket) -> Runtime:
    """Serve an application until a signal or a failure ends it.

    Args:
        app_of: makes it; given what ends the server.
        listener: bound.

    Returns:
        Its runtime, whose `failure` says whether and why it has failed.
    """
    # uvicorn raises its signals again once it has drained; the default handlers would then report
    # a good end as a death by signal.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: None)

    def end() -> None:
        server.should_exit = True

    app = app_of(end)
    runtime: Runtime = app.state.runtime
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="websockets-sansio",
        ws_max_size=MAX_MESSAGE_BYTES,
        ws_per_message_deflate=False,  # of little use for sound, and its window costs memory
        timeout_graceful_shutdown=_CLOSE_CONNECTIONS_S,
    )
    server = _DrainingServer(config, runtime)
    server.run(sockets=[listener])
    return runtime


class _DrainingServer(uvicorn.Server):
    """Finishes what is in flight before it stops to listen."""

    def __init__(self, config: uvicorn.Config, runtime: Runtime) -> None:
        super().__init__(config)
        self._runtime = runtime

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # uvicorn would cut live sessions off at once, and refuse the connections of those who
        # are to be told that this server takes no more.
        drained = self._runtime.begin_drain()
        while not drained.done() and not self.force_exit:  # a second Ctrl-C
            await asyncio.wait([drained], timeout=_LOOK_AGAIN_S)
        await super().shutdown(sockets)


def main() -> None:
    """Serve as one of several, until told to end or until the engine's process has."""
    orders: Orders = pickle.load(sys.stdin.buffer)  # noqa: S301 - from the process that started us
    settings = orders.settings
    configure_logging(settings.log_level)
    board = Board(orders.board, settings.front_ends, orders.keys)
    seat, metrics = Seat(board, orders.place), Metrics()
    engine = RemoteEngine(
        socket.socket(fileno=orders.channel),
        board,
        SharedSamples(orders.samples),
        make_admission(settings, seat),
        own_metrics=metrics.render,
    )
    workers = math.ceil(settings.decode_workers / settings.front_ends)
    runtime = serve(
        lambda end: create_app(
            settings.model_copy(update={"decode_workers": workers}),
            engine,
            shared=Shared(metrics, seat, engine.metrics),
            on_failure=end,
        ),
        socket.socket(fileno=orders.listener),
    )
    if runtime.failure is not None:
        sys.exit(1)  # the engine's process says why


if __name__ == "__main__":
    main()
