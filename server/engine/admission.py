"""How much the engine takes on, and when a refused client should come back. Pure."""

from __future__ import annotations

import math

from server.board import Tally
from server.errors import QueueFullError

_MIN_RETRY_S = 1.0
_MAX_RETRY_S = 60.0


class DrainRate:
    """How much audio a second of work finishes, over the last half minute of work or so."""

    _MEMORY_S = 30.0  # of work, after which a measurement weighs 1/e

    def __init__(self) -> None:
        """Begin without a measurement."""
        self._audio_s = 0.0
        self._busy_s = 0.0

    def record(self, *, audio_s: float, busy_s: float) -> None:
        """Count what some seconds of work have finished, if anything."""
        kept = math.exp(-busy_s / self._MEMORY_S)
        self._audio_s = kept * self._audio_s + audio_s
        self._busy_s = kept * self._busy_s + busy_s

    def assume(self, rtfx: float | None) -> None:
        """Take over what another process has measured."""
        self._audio_s, self._busy_s = rtfx or 0.0, 1.0

    @property
    def rtfx(self) -> float | None:
        """Seconds of audio a second; None before the first request has finished."""
        return self._audio_s / self._busy_s if self._audio_s and self._busy_s else None

    def retry_after_s(self, audio_s: float) -> float:
        """Whole seconds until `audio_s` seconds of audio are done, from 1 to 60."""
        estimate = math.ceil(audio_s / self.rtfx) if self.rtfx else 0.0
        return min(_MAX_RETRY_S, max(_MIN_RETRY_S, estimate))


class Admission:
    """Counts what has been taken on, and refuses what would be too much."""

    def __init__(
        self,
        *,
        max_requests: int,
        max_audio_s: float,
        requests: Tally | None = None,
        audio_s: Tally | None = None,
    ) -> None:
        """Begin empty.

        Args:
            max_requests: most that may wait, whatever runs already.
            max_audio_s: most seconds of audio that may wait; one longer clip may wait alone.
            requests: where they are counted, if other processes count too.
            audio_s: likewise their audio, seconds.
        """
        self._max_requests = max_requests
        self._max_audio_s = max_audio_s
        self._requests = requests or Tally()
        self._audio_s = audio_s or Tally()
        self.rate = DrainRate()

    @property
    def requests(self) -> int:
        """Taken on, by all processes."""
        return int(self._requests.total)

    @property
    def audio_s(self) -> float:
        """Their audio, seconds."""
        return self._audio_s.total

    @property
    def is_empty(self) -> bool:
        """Whether this process has taken nothing on."""
        return not self._requests.own

    def count(self, requests: int, audio_s: float) -> None:
        """Change what this process has taken on."""
        self._requests.add(requests)
        self._audio_s.add(audio_s)

    def check(self, audio_s: float, *, running: int, running_audio_s: float) -> None:
        """Refuse a request of so many seconds if there is no room for it.

        Args:
            audio_s: of the request.
            running: requests that wait no more.
            running_audio_s: their audio.

        Raises:
            QueueFullError: says when to come back.
        """
        waiting = self.requests - running
        waiting_s = max(0.0, self.audio_s - running_audio_s)
        if waiting >= self._max_requests:
            reason = f"{waiting} requests are waiting already"
        elif waiting > 0 and waiting_s + audio_s > self._max_audio_s:
            reason = f"{waiting_s:.0f} s of audio are waiting already"
        else:
            return
        raise QueueFullError(reason, retry_after_s=self.rate.retry_after_s(waiting_s))

    def take(self, audio_s: float) -> Ticket:
        """Count a request in."""
        self.count(1, audio_s)
        return Ticket(self, audio_s)


class Ticket:
    """A request's share of what has been taken on."""

    def __init__(self, admission: Admission, audio_s: float) -> None:
        """Made by `Admission.take`."""
        self._admission = admission
        self._audio_s = audio_s
        self._clips = 1

    def measure(self, audio_s: float, *, clips: int = 1) -> None:
        """Correct what was assumed from a header: how much may wait or run, in how many clips."""
        self._admission.count(clips - self._clips, audio_s - self._audio_s)
        self._audio_s, self._clips = audio_s, clips

    def give_back(self) -> None:
        """Count the request out."""
        self.measure(0.0, clips=0)
