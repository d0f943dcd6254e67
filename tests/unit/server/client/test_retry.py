import pytest

from server.client import ConnectionFailedError, OverloadedError, RequestRefusedError, Retry


def overloaded(retry_after_s):
    return OverloadedError("full", status=429, code="queue_full", retry_after_s=retry_after_s)


def test_the_pause_that_the_server_asks_for_is_never_cut_short():
    least, most = Retry(jitter=lambda: 0.0), Retry(jitter=lambda: 0.999)
    assert least.pause_s(0, overloaded(7.0)) == 7.0
    assert 7.0 < most.pause_s(0, overloaded(7.0)) < 8.75


def test_pauses_double_where_the_server_does_not_say():
    retry = Retry(max_retries=4, jitter=lambda: 0.0)
    pauses = [retry.pause_s(retries, overloaded(None)) for retries in range(5)]
    assert pauses == [0.5, 1.0, 2.0, 4.0, None]


def test_a_longer_pause_than_the_cap_is_not_waited_for():
    assert Retry(max_pause_s=10.0).pause_s(0, overloaded(11.0)) is None


@pytest.mark.parametrize(
    "error",
    [
        RequestRefusedError("bad", status=400, code="audio_empty"),
        ConnectionFailedError("nobody there"),
    ],
)
def test_only_refusals_for_now_are_tried_again(error):
    assert Retry().pause_s(0, error) is None
