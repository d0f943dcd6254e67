"""When a call that was refused for now is tried again. Pure."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from server.client.errors import OverloadedError

if TYPE_CHECKING:
    from collections.abc import Callable

_FIRST_PAUSE_S = 0.5
_MAX_JITTER = 0.25  # of the pause, so that clients refused together do not come back together


@dataclass(frozen=True, slots=True)
class Retry:
    """Tries again after 429 and 503, which a server answers before it has done any work.

    Attributes:
        max_retries: after the first try; 0 for never.
        max_pause_s: longest pause. A server that asks for a longer one is not asked again.
        jitter: draws from [0, 1).
    """

    max_retries: int = 4
    max_pause_s: float = 60.0
    jitter: Callable[[], float] = random.random

    def pause_s(self, retries: int, error: Exception) -> float | None:
        """How long to wait before the next try; None if there is none.

        Args:
            retries: that have been made.
            error: that the last try ended with.
        """
        if retries >= self.max_retries or not isinstance(error, OverloadedError):
            return None
        asked_s = error.retry_after_s
        if asked_s is not None and asked_s > self.max_pause_s:
            return None
        pause_s = _FIRST_PAUSE_S * 2**retries if asked_s is None else asked_s
        # Never earlier than asked.
        return min(pause_s, self.max_pause_s) * (1 + _MAX_JITTER * self.jitter())
