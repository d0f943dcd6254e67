"""What every engine does for those who ask it: let them in, and hand them their answers."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from server.errors import ShuttingDownError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from server.engine.admission import Admission, Ticket
    from server.engine.interface import Piece


class Gate:
    """Where requests come in, until the engine drains."""

    def __init__(self, admission: Admission) -> None:
        """Begin open; `admission` bounds what is let in."""
        self._admission = admission
        self._is_open = True
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def is_open(self) -> bool:
        """Whether anybody is let in."""
        return self._is_open

    def close(self) -> None:
        """Let nobody in any more."""
        self._is_open = False

    @contextlib.contextmanager
    def admit(self, audio_s: float, *, running: int, running_audio_s: float) -> Iterator[Ticket]:
        """Hold a ticket for `audio_s` seconds of audio.

        Args:
            audio_s: of the request.
            running: requests that wait no more.
            running_audio_s: their audio.

        Raises:
            QueueFullError: too much waits.
            ShuttingDownError: the gate is closed.
        """
        if not self._is_open:
            raise ShuttingDownError("the server is shutting down")
        self._admission.check(audio_s, running=running, running_audio_s=running_audio_s)
        ticket = self._admission.take(audio_s)
        self._empty.clear()
        try:
            yield ticket
        finally:
            ticket.give_back()
            if self._admission.is_empty:
                self._empty.set()

    async def wait_until_empty(self, timeout_s: float) -> None:
        """Wait until all tickets are given back, but no longer than `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()


class Pending:
    """An answer that is waited for.

    Attributes:
        answer: done with it, or with the error that came in its place.
    """

    def __init__(self, on_piece: Callable[[Piece], None] | None = None) -> None:
        """Begin; `on_piece` is told of an answer's pieces."""
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._on_piece = on_piece

    def tell(self, piece: Piece) -> None:
        """Hand on a piece, if anybody listens."""
        if self._on_piece is None or self.answer.done():
            return
        try:
            self._on_piece(piece)
        except Exception as error:  # noqa: BLE001 - it ends the listener's own request
            self.answer.set_exception(error)

    def end(self, answer: object) -> None:
        """Hand on the answer, or the error in its place; what comes later is dropped."""
        if self.answer.done():
            return
        if isinstance(answer, Exception):
            self.answer.set_exception(answer)
        else:
            self.answer.set_result(answer)


def end_all(pending: Iterable[Pending], error: Exception) -> None:
    """Answer everybody with an error."""
    for each in pending:
        each.end(error)
