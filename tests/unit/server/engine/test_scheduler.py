"""The policy, by examples and by simulation under arbitrary loads."""

from collections import defaultdict
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.scheduler import (
    CEDED_S_PER_AUDIO_S,
    Running,
    ScheduleLimits,
    Waiting,
    decide,
)

NO_WAIT = ScheduleLimits(max_batch_size=4, max_batch_audio_s=60.0)
WAIT = ScheduleLimits(max_batch_size=4, max_batch_audio_s=60.0, max_wait_s=0.1)
LONGEST_S = 40.0


def queue_of(*audio_s, arrived_s=0.0, **fields):
    return [Waiting(i, arrived_s, length_s, **fields) for i, length_s in enumerate(audio_s)]


def running(count):
    return [Running(1000 + i) for i in range(count)]


def test_with_nothing_to_do_nothing_is_planned():
    decision = decide([], [], 0.0, WAIT)
    assert (decision.start, decision.expired, decision.wake_s) == ((), (), None)


def test_without_a_wait_what_is_there_starts_shortest_first():
    assert decide(queue_of(2, 1, 3), [], 0.0, NO_WAIT).start == (1, 0, 2)


def test_what_runs_leaves_that_much_less_room():
    assert decide(queue_of(1, 1, 1), running(2), 0.0, NO_WAIT).start == (0, 1)
    assert decide(queue_of(1, 1, 1), running(4), 0.0, NO_WAIT).start == ()


def test_a_short_clip_overtakes_a_long_one_that_came_a_little_before():
    one = ScheduleLimits(max_batch_size=1)
    long, short = Waiting(0, 0.0, 30.0), Waiting(1, 1.0, 2.0)
    assert decide([long, short], [], 1.0, one).start == (1,)


def test_a_long_clip_that_has_waited_goes_before_a_short_one():
    one = ScheduleLimits(max_batch_size=1)
    long, short = Waiting(0, 0.0, 30.0), Waiting(1, 30.0 * CEDED_S_PER_AUDIO_S + 0.1, 0.0)
    assert decide([long, short], [], 7.0, one).start == (0,)


def test_a_near_deadline_goes_first():
    one = ScheduleLimits(max_batch_size=1)
    patient, pressed = Waiting(0, 0.0, 10.0), Waiting(1, 1.0, 10.0, deadline_s=3.5)
    assert decide([patient, pressed], [], 1.0, one).start == (1,)


def test_a_batch_waits_to_fill_until_its_oldest_has_waited_enough():
    queue = queue_of(1, arrived_s=5.0)
    assert decide(queue, [], 5.05, WAIT).start == ()
    assert decide(queue, [], 5.05, WAIT).wake_s == pytest.approx(5.1)
    assert decide(queue, [], 5.1, WAIT).start == (0,)


def test_a_batch_that_fills_the_room_does_not_wait():
    assert decide(queue_of(1, 1, 1, 1, 1), [], 0.0, WAIT).start == (0, 1, 2, 3)
    assert decide(queue_of(1, 1), running(2), 0.0, WAIT).start == (0, 1)


def test_the_largest_preferred_size_starts_without_a_wait_and_the_rest_waits():
    limits = ScheduleLimits(max_batch_size=8, max_wait_s=0.1, preferred_batch_sizes=(2, 4))
    assert decide(queue_of(1), [], 0.0, limits).start == ()
    assert decide(queue_of(1, 1, 1), [], 0.0, limits).start == (0, 1)
    assert decide(queue_of(*[1] * 7), [], 0.0, limits).start == (0, 1, 2, 3)
    assert decide(queue_of(1), [], 0.1, limits).start == (0,)


def test_a_batch_is_bounded_by_padded_audio():
    # 25 s twice are 50 s; a third clip, however short, would be padded to 75 s.
    limits = ScheduleLimits(max_batch_size=4, max_batch_audio_s=60.0)
    assert set(decide(queue_of(25, 24, 24), [], 100.0, limits).start) == {1, 2}


def test_a_window_that_every_clip_is_padded_to_counts():
    limits = ScheduleLimits(max_batch_size=8, max_batch_audio_s=60.0, window_s=30.0)
    assert len(decide(queue_of(*[1] * 5), [], 0.0, limits).start) == 2


def test_a_clip_too_long_for_the_batch_lets_shorter_ones_pass_and_goes_next():
    queue = queue_of(2, 31, 2)
    assert decide(queue, [], 100.0, NO_WAIT).start == (0, 2)
    assert decide([queue[1]], [], 100.0, NO_WAIT).start == (1,)


def test_a_clip_longer_than_the_budget_goes_alone_and_at_once():
    assert decide(queue_of(90), [], 0.0, WAIT).start == (0,)


def test_a_request_takes_as_many_places_as_it_needs():
    wide = [Waiting(0, 0.0, 1.0, places=3), Waiting(1, 0.1, 1.0), Waiting(2, 0.2, 1.0)]
    assert decide(wide, [], 0.2, NO_WAIT).start == (0, 1)
    assert decide(wide, [Running(9)], 0.2, NO_WAIT).start == (0,)
    assert decide(wide[1:], [Running(9, places=3)], 0.2, NO_WAIT).start == (1,)


def test_nobody_takes_the_places_that_the_first_in_turn_waits_for():
    wide = [Waiting(0, 0.0, 1.0, places=3), Waiting(1, 0.1, 1.0)]
    assert decide(wide, running(2), 0.2, NO_WAIT).start == ()
    # One that is not the first lets narrower ones pass.
    behind = [Waiting(0, 0.0, 1.0), Waiting(1, 0.1, 1.0, places=4), Waiting(2, 0.2, 1.0)]
    assert decide(behind, [], 0.2, NO_WAIT).start == (0, 2)


def test_what_is_late_is_given_up_whether_it_waits_or_runs():
    queue = [Waiting(0, 0, 1, deadline_s=1.0), Waiting(1, 0, 1, deadline_s=2.0)]
    slots = [Running(2, deadline_s=0.5), Running(3, deadline_s=3.0)]
    one = ScheduleLimits(max_batch_size=2)
    decision = decide(queue, slots, 1.0, one)
    assert (decision.expired, decision.start) == ((0, 2), (1,))


def test_the_scheduler_wakes_for_a_deadline_within_the_wait():
    assert decide(queue_of(1, deadline_s=0.04), [], 0.0, WAIT).wake_s == 0.04


clips = st.tuples(
    st.floats(0, 10),  # arrival
    st.floats(0.01, LONGEST_S),
    st.none() | st.floats(0.01, 20),  # patience
    st.integers(1, 6),  # iterations that it runs
    st.integers(1, 8),  # places that it takes, if there are so many
)
limits_of_any_kind = st.builds(
    ScheduleLimits,
    max_batch_size=st.integers(1, 8),
    max_wait_s=st.sampled_from([0.0, 0.5, 2.0]),
    preferred_batch_sizes=st.lists(st.integers(1, 8), max_size=2).map(tuple),
    max_batch_audio_s=st.floats(1, 100),
    window_s=st.sampled_from([0.0, 30.0]),
)


@dataclass
class Simulation:
    """An engine without a model: what starts runs for its number of iterations."""

    limits: ScheduleLimits
    iteration_s: float = 0.1
    now_s: float = 0.0
    waiting: list = field(default_factory=list)
    running: dict = field(default_factory=dict)
    left: list = field(default_factory=list)
    starts: list = field(default_factory=list)
    places: dict = field(default_factory=dict)

    def iterate(self, lengths):
        decision = decide(
            self.waiting,
            [
                Running(key, deadline, self.places[key])
                for key, (deadline, _) in self.running.items()
            ],
            self.now_s,
            self.limits,
        )
        self.check(decision)
        was_idle = not self.running
        for key in decision.expired:
            self.running.pop(key, None)
            self.left.append(key)
        deadlines = {each.id: each.deadline_s for each in self.waiting}
        for key in decision.start:
            self.running[key] = (deadlines[key], lengths[key])
            self.starts.append(key)
        gone = {*decision.start, *decision.expired}
        self.waiting = [each for each in self.waiting if each.id not in gone]
        for key, (deadline, steps) in list(self.running.items()):
            self.running[key] = (deadline, steps - 1)
            if steps == 1:
                del self.running[key]
                self.left.append(key)
        if was_idle and self.waiting and not gone:
            assert decision.wake_s > self.now_s, "the clock would stand still"
            self.now_s = decision.wake_s
        else:
            self.now_s += self.iteration_s

    def check(self, decision):
        by_id = {each.id: each for each in self.waiting}
        batch = [by_id[key] for key in decision.start]
        late = {
            each.id
            for each in self.waiting
            if each.deadline_s is not None and each.deadline_s <= self.now_s
        }
        late |= {k for k, (d, _) in self.running.items() if d is not None and d <= self.now_s}
        assert set(decision.expired) == late
        assert len(decision.expired) == len(late)
        assert not late & set(decision.start)
        kept = sum(self.places[key] for key in set(self.running) - late)
        assert len(set(decision.start)) == len(batch)
        taken = sum(each.places for each in batch)
        assert taken <= max(0, self.limits.max_batch_size - kept)
        assert [each.audio_s for each in batch] == sorted(each.audio_s for each in batch)
        if len(batch) > 1:
            longest = max(self.limits.window_s, *(each.audio_s for each in batch))
            assert len(batch) * longest <= self.limits.max_batch_audio_s
        live = [each for each in self.waiting if each.id not in late]
        if batch:
            first = min(live, key=lambda each: (each.turn_s, each.id))
            assert first in batch


@given(st.lists(clips, max_size=25), limits_of_any_kind)
def test_every_request_leaves_exactly_once_within_the_limits(drawn, limits):
    drawn = sorted(drawn, key=lambda clip: clip[0])
    lengths = {key: steps for key, (_, _, _, steps, _) in enumerate(drawn)}
    places = {key: min(each[4], limits.max_batch_size) for key, each in enumerate(drawn)}
    arrivals = [
        Waiting(key, arrived, audio, None if patience is None else arrived + patience, places[key])
        for key, (arrived, audio, patience, _, _) in enumerate(drawn)
    ]
    simulation = Simulation(limits, places=places)
    while arrivals or simulation.waiting or simulation.running:
        if not simulation.waiting and not simulation.running:
            simulation.now_s = max(simulation.now_s, arrivals[0].arrived_s)
        while arrivals and arrivals[0].arrived_s <= simulation.now_s:
            simulation.waiting.append(arrivals.pop(0))
        simulation.iterate(lengths)
    assert sorted(simulation.left) == list(range(len(drawn)))
    assert len(set(simulation.starts)) == len(simulation.starts)


@settings(max_examples=20)  # each is a long simulation
@given(st.floats(0.01, LONGEST_S), st.floats(0.01, 2.0), st.integers(1, 4), st.sampled_from([1, 4]))
def test_no_clip_starves_under_an_endless_stream_of_short_ones(audio_s, short_s, size, width):
    limits = ScheduleLimits(max_batch_size=size, max_batch_audio_s=LONGEST_S)
    width = min(width, size)
    places = defaultdict(lambda: 1, {0: width})
    waiting = [Waiting(0, 0.0, audio_s, places=width)]
    simulation = Simulation(limits, waiting=waiting, places=places)
    lengths = {0: 1}
    key = 0
    while 0 not in simulation.starts:
        for _ in range(2 * size):  # twice of what is served
            key += 1
            lengths[key] = 1
            simulation.waiting.append(Waiting(key, simulation.now_s, short_s))
        simulation.iterate(lengths)
    # Only those that came before its turn could go before it.
    started_s = simulation.now_s
    earlier = 2 * size * (CEDED_S_PER_AUDIO_S * audio_s / simulation.iteration_s + 1)
    assert started_s <= simulation.iteration_s * (earlier / size + 2)
