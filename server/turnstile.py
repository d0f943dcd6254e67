"""Lets transcriptions into the engine in turn, so that no key's many keep out another's few.

Start-time fair queueing: each key has a virtual time that advances by the audio it brings in, and
the waiting key whose time is least goes next. Keys that were away begin at the present.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from typing import TYPE_CHECKING

from server.errors import QueueFullError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Turnstile:
    """Admits up to so many at once. One event loop."""

    def __init__(self, places: int, max_waiting: int) -> None:
        """Begin empty.

        Args:
            places: transcriptions that are inside at once.
            max_waiting: that may wait; more are refused.
        """
        self._free = places
        self._max_waiting = max_waiting
        self._present_s = 0.0
        self._times_s: dict[str, float] = {}
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    @property
    def waiting(self) -> int:
        """Transcriptions that wait for a place."""
        return sum(not future.done() for _, _, future in self._waiting)

    @contextlib.asynccontextmanager
    async def pass_through(self, owner: str, audio_s: float) -> AsyncIterator[None]:
        """Wait for a place and hold it.

        Args:
            owner: of the key.
            audio_s: what it brings in, seconds.

        Raises:
            QueueFullError: too many wait already.
        """
        start_s = max(self._present_s, self._times_s.get(owner, 0.0))
        if self._free:
            self._free -= 1
        else:
            await self._wait(start_s, owner, audio_s)
        try:
            yield
        finally:
            self._leave()

    async def _wait(self, start_s: float, owner: str, audio_s: float) -> None:
        if self.waiting >= self._max_waiting:
            raise QueueFullError(f"{self.waiting} requests are waiting already", retry_after_s=1.0)
        self._times_s[owner] = start_s + audio_s
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (start_s, next(self._numbers), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # the place was given in the same moment
                self._leave()
            raise

    def _leave(self) -> None:
        while self._waiting:
            start_s, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                self._present_s = start_s
                turn.set_result(None)
                return
        self._free += 1
        self._times_s.clear()  # nobody waits: all begin at the present again
