import pytest

from server.engine.admission import Admission, DrainRate
from server.errors import QueueFullError


def check(admission, audio_s=1.0, running=0, running_audio_s=0.0):
    admission.check(audio_s, running=running, running_audio_s=running_audio_s)


def test_as_many_requests_wait_as_may():
    admission = Admission(max_requests=2, max_audio_s=100.0)
    tickets = [admission.take(1.0), admission.take(1.0)]
    with pytest.raises(QueueFullError, match="2 requests are waiting already"):
        check(admission)
    check(admission, running=1, running_audio_s=1.0)
    tickets[0].give_back()
    check(admission)


def test_as_much_audio_waits_as_may():
    admission = Admission(max_requests=10, max_audio_s=60.0)
    admission.take(50.0)
    check(admission, 10.0)
    with pytest.raises(QueueFullError, match="50 s of audio are waiting already"):
        check(admission, 11.0)
    check(admission, 11.0, running=1, running_audio_s=50.0)


def test_one_clip_may_wait_however_long_it_is():
    check(Admission(max_requests=1, max_audio_s=10.0), 30.0)


def test_a_length_that_was_assumed_is_corrected():
    admission = Admission(max_requests=10, max_audio_s=60.0)
    ticket = admission.take(60.0)
    with pytest.raises(QueueFullError):
        check(admission, 30.0)
    ticket.measure(2.0)
    check(admission, 30.0)
    ticket.give_back()
    assert (admission.requests, admission.audio_s) == (0, 0.0)


def test_a_refusal_says_when_what_waits_will_be_done():
    admission = Admission(max_requests=10, max_audio_s=60.0)
    admission.rate.record(audio_s=20.0, busy_s=2.0)
    admission.take(55.0)
    with pytest.raises(QueueFullError) as refusal:
        check(admission, 10.0)
    assert refusal.value.retry_after_s == 6


def test_retry_after_follows_the_measured_rate_within_bounds():
    rate = DrainRate()
    assert rate.rtfx is None
    assert rate.retry_after_s(100.0) == 1
    rate.record(audio_s=20.0, busy_s=2.0)
    assert rate.rtfx == pytest.approx(10.0)
    assert rate.retry_after_s(75.0) == 8
    assert rate.retry_after_s(0.0) == 1
    assert rate.retry_after_s(1e6) == 60


def test_the_rate_forgets_what_is_long_ago():
    rate = DrainRate()
    rate.record(audio_s=1000.0, busy_s=1.0)
    for _ in range(300):
        rate.record(audio_s=5.0, busy_s=1.0)
    assert rate.rtfx == pytest.approx(5.0, rel=0.01)
