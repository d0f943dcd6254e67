import asyncio
from collections import Counter

import pytest

from server.errors import QueueFullError
from server.turnstile import Turnstile

pytestmark = pytest.mark.anyio


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


class Visitors:
    """Go through a turnstile in their own time, and note when they got in."""

    def __init__(self, turnstile):
        self.turnstile = turnstile
        self.inside = []
        self.leave = {}

    def send(self, owner, audio_s=10.0):
        event = asyncio.Event()
        number = len(self.leave)
        self.leave[number] = event
        return asyncio.create_task(self._go(number, owner, audio_s, event))

    async def _go(self, number, owner, audio_s, event):
        async with self.turnstile.pass_through(owner, audio_s):
            self.inside.append((owner, number))
            await event.wait()

    async def let_all_out(self):
        while any(not event.is_set() for event in self.leave.values()):
            for _, number in list(self.inside):
                self.leave[number].set()
            await settle()


async def test_who_comes_while_there_is_room_goes_in_at_once():
    visitors = Visitors(Turnstile(2, 10))
    tasks = [visitors.send("alice"), visitors.send("alice")]
    await settle()
    assert len(visitors.inside) == 2
    await visitors.let_all_out()
    await asyncio.gather(*tasks)


async def test_one_keys_many_do_not_keep_out_anothers_few():
    visitors = Visitors(Turnstile(1, 100))
    tasks = [visitors.send("alice") for _ in range(20)]
    await settle()
    tasks += [visitors.send("bob") for _ in range(3)]
    await settle()
    await visitors.let_all_out()
    await asyncio.gather(*tasks)
    order = [owner for owner, _ in visitors.inside]
    assert Counter(order) == {"alice": 20, "bob": 3}
    # In turns: bob is through before alice's seventh.
    assert order[:8].count("bob") == 3


async def test_shares_are_of_audio_and_not_of_requests():
    visitors = Visitors(Turnstile(1, 100))
    tasks = [visitors.send("first")]
    tasks += [visitors.send("long", 40.0) for _ in range(4)]
    tasks += [visitors.send("short", 10.0) for _ in range(8)]
    await settle()
    await visitors.let_all_out()
    await asyncio.gather(*tasks)
    order = [owner for owner, _ in visitors.inside][1:]
    # For each 40 s of one key there are four times 10 s of the other.
    assert Counter(order[:5]) == {"long": 1, "short": 4}


async def test_who_leaves_while_waiting_frees_the_turn():
    visitors = Visitors(Turnstile(1, 10))
    first, second, third = (visitors.send("alice") for _ in range(3))
    await settle()
    second.cancel()
    await settle()
    assert visitors.turnstile.waiting == 1
    visitors.leave[0].set()
    await settle()
    assert [number for _, number in visitors.inside] == [0, 2]
    visitors.leave[2].set()
    await asyncio.gather(first, third)


async def test_a_place_given_to_who_leaves_in_the_same_moment_is_not_lost():
    visitors = Visitors(Turnstile(1, 10))
    first, second = visitors.send("alice"), visitors.send("alice")
    await settle()
    visitors.leave[0].set()
    await first  # its place has been given to the second, which has not run yet
    second.cancel()
    await settle()
    third = visitors.send("alice")
    await settle()
    assert visitors.inside[-1] == ("alice", 2)
    visitors.leave[2].set()
    await third


async def test_more_than_may_wait_are_refused():
    visitors = Visitors(Turnstile(1, 1))
    tasks = [visitors.send("alice"), visitors.send("alice")]
    await settle()
    with pytest.raises(QueueFullError):
        await visitors.send("alice")
    visitors.leave[2].set()
    await visitors.let_all_out()
    await asyncio.gather(*tasks)
