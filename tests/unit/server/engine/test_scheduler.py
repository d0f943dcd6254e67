import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.scheduler import BatchLimits, DrainRate, Waiting, decide

NO_WAIT = BatchLimits(max_batch_size=4, max_batch_audio_s=60.0, max_wait_s=0.0)
WAIT = BatchLimits(max_batch_size=4, max_batch_audio_s=60.0, max_wait_s=0.1)


def queue_of(*audio_s, arrived_s=0.0, **fields):
    return [Waiting(i, arrived_s, length_s, **fields) for i, length_s in enumerate(audio_s)]


def test_an_empty_queue_waits_for_an_arrival():
    decision = decide([], 0.0, WAIT)
    assert (decision.batch, decision.expired, decision.wake_s) == ((), (), None)


def test_without_a_wait_the_batch_is_what_is_there():
    assert decide(queue_of(1, 2), 0.0, NO_WAIT).batch == (0, 1)


def test_batch_waits_to_fill_until_the_oldest_reaches_max_wait():
    queue = queue_of(1, arrived_s=5.0)
    assert decide(queue, 5.05, WAIT).batch == ()
    assert decide(queue, 5.05, WAIT).wake_s == pytest.approx(5.1)
    assert decide(queue, 5.1, WAIT).batch == (0,)


def test_batch_closes_at_once_when_it_is_full():
    assert decide(queue_of(1, 1, 1, 1, 1), 0.0, WAIT).batch == (0, 1, 2, 3)


def test_batch_is_bounded_by_padded_audio():
    # 25 s twice are 50 s; a third clip, however short, would be padded to 75 s.
    assert decide(queue_of(25, 1, 1), 0.0, NO_WAIT).batch == (0, 1)


def test_a_clip_too_long_for_the_batch_lets_shorter_ones_pass_and_goes_next():
    queue = queue_of(2, 31, 2)
    assert decide(queue, 0.0, NO_WAIT).batch == (0, 2)
    assert decide([queue[1]], 0.0, NO_WAIT).batch == (1,)


def test_a_clip_longer_than_the_budget_goes_alone():
    assert decide(queue_of(90, 1), 0.0, WAIT).batch == (0,)


def test_only_requests_with_the_same_prompt_share_a_batch():
    queue = [Waiting(0, 0, 1), Waiting(1, 0, 1, prompt="what?"), Waiting(2, 0, 1)]
    assert decide(queue, 0.0, NO_WAIT).batch == (0, 2)


def test_expired_requests_are_named_and_never_batched():
    queue = [Waiting(0, 0, 1, deadline_s=1.0), Waiting(1, 0, 1, deadline_s=2.0)]
    decision = decide(queue, 1.0, NO_WAIT)
    assert (decision.expired, decision.batch) == ((0,), (1,))


def test_the_scheduler_wakes_for_a_deadline_within_the_wait():
    assert decide(queue_of(1, deadline_s=0.04), 0.0, WAIT).wake_s == 0.04


requests = st.builds(
    lambda arrived, audio, patience, prompt: (arrived, audio, patience, prompt),
    st.floats(0, 10),
    st.floats(0.01, 40),
    st.none() | st.floats(0, 5),
    st.sampled_from([None, "a", "b"]),
)
limits = st.builds(BatchLimits, st.integers(1, 8), st.floats(1, 100), st.floats(0, 2))


@given(st.lists(requests, max_size=30), limits, st.floats(0, 20))
def test_every_decision_respects_the_limits(drawn, limits, now_s):
    queue = [
        Waiting(i, arrived, audio, None if patience is None else arrived + patience, prompt)
        for i, (arrived, audio, patience, prompt) in enumerate(sorted(drawn, key=lambda d: d[0]))
    ]
    decision = decide(queue, now_s, limits)
    chosen = [queue[i] for i in decision.batch]
    assert len(set(decision.batch)) == len(decision.batch) <= limits.max_batch_size
    assert not set(decision.batch) & set(decision.expired)
    assert len({each.prompt for each in chosen}) <= 1
    if len(chosen) > 1:
        assert len(chosen) * max(each.audio_s for each in chosen) <= limits.max_batch_audio_s
    live = [each for each in queue if each.id not in decision.expired]
    if chosen:
        assert chosen[0] is live[0]
    elif live:
        assert decision.wake_s > now_s
    else:
        assert decision.wake_s is None


@given(st.lists(requests, min_size=1, max_size=20), limits)
def test_every_request_is_answered_exactly_once_and_the_clock_always_moves(drawn, limits):
    queue = [
        Waiting(i, arrived, audio, None if patience is None else arrived + patience, prompt)
        for i, (arrived, audio, patience, prompt) in enumerate(sorted(drawn, key=lambda d: d[0]))
    ]
    answered, now_s = [], queue[-1].arrived_s
    for _ in itertools.count():
        decision = decide(queue, now_s, limits)
        done = {*decision.batch, *decision.expired}
        answered += [*decision.batch, *decision.expired]
        queue = [each for each in queue if each.id not in done]
        if not queue:
            break
        if not done:
            assert decision.wake_s > now_s
            now_s = decision.wake_s
    assert sorted(answered) == list(range(len(drawn)))


def test_retry_after_follows_the_measured_rate():
    rate = DrainRate()
    assert rate.requests_per_s is None
    assert rate.retry_after_s(100) == 1
    rate.record(requests=4, busy_s=2.0)
    assert rate.requests_per_s == 2.0
    assert rate.retry_after_s(15) == 8
    assert rate.retry_after_s(0) == 1
    assert rate.retry_after_s(10_000) == 60
