"""Which waiting requests form the next batch, and when. Pure: no clock, no tensors, no asyncio."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What a batch may be.

    Attributes:
        max_batch_size: most clips.
        max_batch_audio_s: most seconds of audio, padding included; a longer clip goes alone.
        max_wait_s: longest that the oldest request waits for its batch to fill, as Triton's
            max_queue_delay; 0 takes what is there.
    """

    max_batch_size: int
    max_batch_audio_s: float
    max_wait_s: float


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request in the queue, as the scheduler sees it. Times are seconds on one clock."""

    id: int
    arrived_s: float
    audio_s: float
    deadline_s: float | None = None
    prompt: str | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now.

    Attributes:
        batch: ids to run at once, in order of arrival; empty for none.
        expired: ids whose deadline has passed.
        wake_s: when to decide again if nothing arrives; None for not before an arrival.
    """

    batch: tuple[int, ...] = ()
    expired: tuple[int, ...] = ()
    wake_s: float | None = None


def decide(queue: Sequence[Waiting], now_s: float, limits: BatchLimits) -> Decision:
    """Choose the next batch.

    The oldest live request always belongs to it, so none starves; younger ones join in order of
    arrival while they share its prompt and the limits hold, and one too long for this batch does
    not hold up shorter ones behind it.

    Args:
        queue: what waits, in order of arrival.
        now_s: the time.
        limits: of a batch.
    """
    expired = tuple(w.id for w in queue if w.deadline_s is not None and w.deadline_s <= now_s)
    live = [w for w in queue if w.deadline_s is None or w.deadline_s > now_s]
    if not live:
        return Decision(expired=expired)
    batch, is_full = _fill(live, limits)
    closes_s = live[0].arrived_s + limits.max_wait_s
    if is_full or now_s >= closes_s:
        return Decision(batch=tuple(w.id for w in batch), expired=expired)
    wake_s = min([closes_s, *(w.deadline_s for w in live if w.deadline_s is not None)])
    return Decision(expired=expired, wake_s=wake_s)


def _fill(live: Sequence[Waiting], limits: BatchLimits) -> tuple[list[Waiting], bool]:
    """Gather the oldest request's batch; full means that waiting longer cannot be asked of it."""
    batch = [live[0]]
    longest_s = live[0].audio_s
    is_full = limits.max_batch_size == 1 or longest_s >= limits.max_batch_audio_s
    for candidate in live[1:]:
        if len(batch) == limits.max_batch_size:
            return batch, True
        if candidate.prompt != live[0].prompt:
            continue
        padded_s = max(longest_s, candidate.audio_s) * (len(batch) + 1)
        if padded_s > limits.max_batch_audio_s:
            is_full = True
            continue
        batch.append(candidate)
        longest_s = max(longest_s, candidate.audio_s)
    return batch, is_full or len(batch) == limits.max_batch_size


class DrainRate:
    """How many requests a second of work finishes, averaged over the latest batches."""

    _SMOOTHING = 0.2  # weight of the newest batch
    _MIN_RETRY_S = 1.0
    _MAX_RETRY_S = 60.0

    def __init__(self) -> None:
        """Begin without a measurement."""
        self._seconds_per_request: float | None = None

    def record(self, requests: int, busy_s: float) -> None:
        """Count a finished batch."""
        latest = busy_s / requests
        known = self._seconds_per_request
        self._seconds_per_request = (
            latest if known is None else known + self._SMOOTHING * (latest - known)
        )

    @property
    def requests_per_s(self) -> float | None:
        """None before the first batch."""
        known = self._seconds_per_request
        return 1 / known if known else None

    def retry_after_s(self, waiting: int) -> float:
        """Whole seconds until `waiting` requests are done, from 1 to 60."""
        estimate = math.ceil(waiting * (self._seconds_per_request or 0.0))
        return min(self._MAX_RETRY_S, max(self._MIN_RETRY_S, estimate))
