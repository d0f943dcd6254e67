import pytest

from server.engine.interface import BatchReport, EngineResult, EngineStats
from server.metrics import Metrics


def result(text="hello", finish_reason="stop"):
    return EngineResult(text, "en", finish_reason, 3, 0.1, 0.2, 0.3, 1)


def sample(metrics, name, **labels):
    return metrics.registry.get_sample_value(name, labels)


def test_a_batch_counts_audio_padding_and_device_time():
    metrics = Metrics()
    metrics.batch_ran(BatchReport(3, audio_s=6.0, padded_audio_s=9.0, busy_s=0.5, failed=False))
    assert sample(metrics, "speechllm_audio_seconds_total") == 6.0
    assert sample(metrics, "speechllm_padding_seconds_total") == 3.0
    assert sample(metrics, "speechllm_device_busy_seconds_total") == 0.5
    assert sample(metrics, "speechllm_batch_size_sum") == 3


def test_a_failed_batch_counts_no_audio():
    metrics = Metrics()
    metrics.batch_ran(BatchReport(1, audio_s=6.0, padded_audio_s=6.0, busy_s=0.5, failed=True))
    assert sample(metrics, "speechllm_batch_failures_total") == 1
    assert sample(metrics, "speechllm_audio_seconds_total") == 0


@pytest.mark.parametrize(
    ("text", "finish_reason", "outcome"),
    [("hi", "stop", "stop"), ("hi", "length", "length"), ("", "stop", "empty")],
)
def test_a_transcript_counts_by_how_it_ended(text, finish_reason, outcome):
    metrics = Metrics()
    metrics.transcribed(2.0, result(text, finish_reason), {"decode": 0.01, "total": 0.2})
    assert sample(metrics, "speechllm_transcripts_total", outcome=outcome) == 1
    assert sample(metrics, "speechllm_stage_seconds_sum", stage="decode") == 0.01


def test_unknown_methods_share_one_label():
    metrics = Metrics()
    for method in ("BREW", "PROPFIND"):
        metrics.request_started()
        metrics.request_ended("unmatched", method, 404)
    labels = {"endpoint": "unmatched", "method": "other", "status": "404"}
    assert sample(metrics, "speechllm_requests_total", **labels) == 2
    assert sample(metrics, "speechllm_requests_in_flight") == 0


def test_gauges_show_the_engine_as_it_is_when_scraped():
    metrics = Metrics()
    stats = EngineStats(alive=True, admitted=5, queued=3, running=2, drain_rate=None)
    metrics.watch(lambda: stats, lambda: True)
    assert sample(metrics, "speechllm_requests_waiting") == 3
    assert sample(metrics, "speechllm_ready") == 1
    assert b"speechllm_requests_admitted 5.0" in metrics.render()


def test_two_applications_share_no_series():
    first, second = Metrics(), Metrics()
    first.refused("queue_full")
    assert sample(second, "speechllm_requests_refused_total", code="queue_full") is None
