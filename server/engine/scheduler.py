"""What the engine does next: pure policy, without clock, tensors or asyncio.

An iteration starts some of the waiting requests beside those that run already. Their order is that
of *turns*: a request's turn comes when it arrived, later by what its length cedes to shorter ones,
but early enough for its deadline. So a short clip overtakes a long one that came a little before
it, and nothing that arrives later than that can overtake: no clip starves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

CEDED_S_PER_AUDIO_S = 0.2
"""How much later a clip's turn comes for each second that it is long: 6 s for the longest."""


@dataclass(frozen=True, slots=True)
class ScheduleLimits:
    """What an iteration may start. The first three have the meaning that they have in Triton.

    Attributes:
        max_batch_size: most sequences that run together; every beam of a request is one.
        max_wait_s: longest that a request waits for others to start with it; 0 takes what is there.
        preferred_batch_sizes: sizes of which the largest that can be formed is started at once.
        max_batch_audio_s: most seconds of audio encoded while those that run wait, padding
            included; a longer clip goes alone. None: what the runner is made for.
        window_s: what the encoder pads every clip to at least, seconds.
    """

    max_batch_size: int
    max_wait_s: float = 0.0
    preferred_batch_sizes: tuple[int, ...] = ()
    max_batch_audio_s: float | None = None
    window_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that has not started. Times are seconds on one clock.

    `places` is how many of `max_batch_size` it will hold; not more than there are.
    """

    id: int
    arrived_s: float
    audio_s: float
    deadline_s: float | None = None
    places: int = 1

    @property
    def turn_s(self) -> float:
        """When its turn comes; those whose turn is earlier go first."""
        ceded_s = CEDED_S_PER_AUDIO_S * self.audio_s
        turn_s = self.arrived_s + ceded_s
        return turn_s if self.deadline_s is None else min(turn_s, self.deadline_s - ceded_s)


@dataclass(frozen=True, slots=True)
class Running:
    """A request that has started, and the places that it holds until it ends."""

    id: int
    deadline_s: float | None = None
    places: int = 1


_Request = TypeVar("_Request", Waiting, Running)


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now.

    Attributes:
        start: ids of waiting requests to encode and prefill together, shortest first.
        expired: ids, waiting or running, whose deadline has passed.
        wake_s: when to decide again if nothing else happens; None for not before something does.
    """

    start: tuple[int, ...] = ()
    expired: tuple[int, ...] = ()
    wake_s: float | None = None


def decide(
    waiting: Sequence[Waiting],
    running: Sequence[Running],
    now_s: float,
    limits: ScheduleLimits,
) -> Decision:
    """Choose what starts and what is given up.

    The request whose turn is first belongs to every batch that starts; others join in the order of
    their turns while the limits hold, and one too long for this batch lets shorter ones pass. While
    there are too few places for the first, nobody starts, or it might wait for ever.

    Args:
        waiting: what has not started, in any order.
        running: what has.
        now_s: the time.
        limits: of an iteration.
    """
    late_waiting, late_running = _late(waiting, now_s), _late(running, now_s)
    late = [each.id for each in late_waiting]
    expired = (*late, *[each.id for each in late_running])
    live = [each for each in waiting if each.id not in late]
    room = limits.max_batch_size - sum([each.places for each in running])
    room += sum([each.places for each in late_running])
    if not live or not room:
        return Decision(expired=expired, wake_s=_next_deadline_s(live))
    in_turn = sorted(live, key=lambda each: (each.turn_s, each.id))
    if room < in_turn[0].places:
        return Decision(expired=expired, wake_s=_next_deadline_s(live))
    batch, is_full = _fill(in_turn, room, limits)
    closes_s = min(each.arrived_s for each in live) + limits.max_wait_s
    size = _size_to_start(len(batch), limits, may_wait=now_s < closes_s and not is_full)
    if not size:
        wake_s = min(closes_s, _next_deadline_s(live) or closes_s)
        return Decision(expired=expired, wake_s=wake_s)
    chosen = sorted(batch[:size], key=lambda each: each.audio_s)
    return Decision(start=tuple(each.id for each in chosen), expired=expired)


def _late(requests: Sequence[_Request], now_s: float) -> list[_Request]:
    """Those whose deadline has passed."""
    return [each for each in requests if each.deadline_s is not None and each.deadline_s <= now_s]


def _next_deadline_s(live: Sequence[Waiting]) -> float | None:
    return min((each.deadline_s for each in live if each.deadline_s is not None), default=None)


def _fill(
    in_turn: Sequence[Waiting], room: int, limits: ScheduleLimits
) -> tuple[list[Waiting], bool]:
    """Gather the first request's batch; full means that waiting could not add to it."""
    batch = [in_turn[0]]
    room -= in_turn[0].places
    longest_s = max(in_turn[0].audio_s, limits.window_s)
    most_s = math.inf if limits.max_batch_audio_s is None else limits.max_batch_audio_s
    is_full = longest_s >= most_s
    for candidate in in_turn[1:]:
        if not room:
            break
        padded_s = max(longest_s, candidate.audio_s) * (len(batch) + 1)
        if padded_s > most_s or candidate.places > room:
            is_full = True
            continue
        batch.append(candidate)
        room -= candidate.places
        longest_s = max(longest_s, candidate.audio_s)
    return batch, is_full or not room


def _size_to_start(available: int, limits: ScheduleLimits, *, may_wait: bool) -> int:
    """The largest preferred size that can be formed; else all or, while one may wait, none."""
    preferred = [size for size in limits.preferred_batch_sizes if size <= available]
    if preferred:
        return max(preferred)
    return 0 if may_wait else available
