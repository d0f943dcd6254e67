import pytest

from server.engine.interface import EngineResult, EngineStats, IterationReport, StartReport
from server.metrics import Metrics, merge_metrics


def result(text="hello", finish_reason="stop"):
    return EngineResult(
        text,
        "en",
        finish_reason,
        token_ids=(5, 6, 7),
        queue_s=0.1,
        encode_s=0.2,
        prefill_s=0.1,
        generate_s=0.3,
        first_token_s=0.4,
        batch_size=1,
    )


def sample(metrics, name, **labels):
    return metrics.registry.get_sample_value(name, labels)


def test_an_iteration_counts_audio_padding_and_device_time():
    metrics = Metrics()
    report = IterationReport(decoded_rows=5, decode_s=0.1, busy_s=0.5)
    report.add_start(
        clips=3, audio_s=6.0, report=StartReport(encode_s=0.3, prefill_s=0.1, padded_audio_s=9.0)
    )
    metrics.iterated(report)
    assert sample(metrics, "speechllm_audio_seconds_total") == 6.0
    assert sample(metrics, "speechllm_padding_seconds_total") == 3.0
    assert sample(metrics, "speechllm_device_busy_seconds_total") == 0.5
    assert sample(metrics, "speechllm_batch_size_sum") == 3
    assert sample(metrics, "speechllm_decode_batch_size_sum") == 5
    for part, seconds in (("encode", 0.3), ("prefill", 0.1), ("decode", 0.1)):
        assert sample(metrics, "speechllm_iteration_seconds_sum", part=part) == seconds


def test_an_iteration_counts_failures_retries_and_who_left():
    metrics = Metrics()
    metrics.iterated(
        IterationReport(failures=2, retries=1, busy_s=0.1, ended={"stop": 2, "cancelled": 1})
    )
    assert sample(metrics, "speechllm_batch_failures_total") == 2
    assert sample(metrics, "speechllm_loop_retries_total") == 1
    assert sample(metrics, "speechllm_engine_requests_total", reason="stop") == 2
    assert sample(metrics, "speechllm_engine_requests_total", reason="cancelled") == 1
    assert sample(metrics, "speechllm_audio_seconds_total") == 0


@pytest.mark.parametrize(
    ("text", "finish_reason", "outcome"),
    [
        ("hi", "stop", "stop"),
        ("hi", "length", "length"),
        ("hi", "loop", "loop"),
        ("", "stop", "empty"),
    ],
)
def test_a_transcript_counts_by_how_it_ended(text, finish_reason, outcome):
    metrics = Metrics()
    metrics.transcribed(2.0, [result(text, finish_reason)], {"decode": 0.01, "total": 0.2})
    assert sample(metrics, "speechllm_transcripts_total", outcome=outcome) == 1
    assert sample(metrics, "speechllm_stage_seconds_sum", stage="decode") == 0.01
    assert sample(metrics, "speechllm_generated_tokens_total") == 3


def test_a_recording_in_which_nobody_speaks_counts_as_such():
    metrics = Metrics()
    metrics.transcribed(2.0, [], {"decode": 0.01, "total": 0.2})
    assert sample(metrics, "speechllm_transcripts_total", outcome="no_speech") == 1
    assert sample(metrics, "speechllm_clip_seconds_count") == 1


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
    stats = EngineStats(
        alive=True,
        admitted=5,
        admitted_audio_s=20.5,
        queued=3,
        running=2,
        running_audio_s=8.5,
        slots=8,
        kv_cache_bytes=2**20,
        rtfx=None,
    )
    metrics.watch(lambda: stats, lambda: True)
    assert sample(metrics, "speechllm_requests_waiting") == 3
    assert sample(metrics, "speechllm_ready") == 1
    assert sample(metrics, "speechllm_admitted_audio_seconds") == 20.5
    assert sample(metrics, "speechllm_kv_slots") == 8
    assert sample(metrics, "speechllm_kv_cache_bytes") == 2**20
    assert sample(metrics, "speechllm_drain_rtfx") == 0
    assert b"speechllm_requests_admitted 5.0" in metrics.render()


def test_two_applications_share_no_series():
    first, second = Metrics(), Metrics()
    first.refused("queue_full")
    assert sample(second, "speechllm_requests_refused_total", code="queue_full") is None


def test_padding_that_rounding_puts_below_zero_is_none():
    metrics = Metrics()
    metrics.iterated(
        IterationReport(start_sizes=[6], audio_s=14.88, padded_audio_s=14.879999999999999)
    )
    assert sample(metrics, "speechllm_padding_seconds_total") == 0


def value(text, line):
    (found,) = [each for each in text.decode().splitlines() if each.startswith(line + " ")]
    return float(found.split()[-1])


def test_metrics_of_several_processes_add_up_but_for_what_they_share():
    processes = [Metrics(), Metrics()]
    stats = EngineStats(
        alive=True, admitted=5, admitted_audio_s=20.5, queued=3, running=2, running_audio_s=8.5,
        slots=8, kv_cache_bytes=2**20, rtfx=4.0,
    )  # fmt: skip
    for number, metrics in enumerate(processes, start=1):
        metrics.watch(lambda: stats, lambda number=number: number == 1)
        metrics.request_started()
        for _ in range(number):
            metrics.transcribed(4.0, [result()], {"total": 0.5})
    both = merge_metrics([metrics.render() for metrics in processes])
    assert value(both, "speechllm_clip_seconds_count") == 3
    assert value(both, 'speechllm_clip_seconds_bucket{le="5.0"}') == 3
    assert value(both, 'speechllm_transcripts_total{outcome="stop"}') == 3
    assert value(both, "speechllm_requests_in_flight") == 2
    assert value(both, "speechllm_kv_slots") == 8
    assert value(both, "speechllm_ready") == 0, "one of them takes none"
    starts = [value(each.render(), "process_start_time_seconds") for each in processes]
    assert value(both, "process_start_time_seconds") == min(starts)
    names = [
        {line.split(" ")[0] for line in text.decode().splitlines() if not line.startswith("#")}
        for text in (both, processes[0].render())
    ]
    assert names[0] == names[1]


def test_what_a_process_that_ended_has_counted_stays():
    living, ended = Metrics(), Metrics()
    for metrics in (living, ended):
        metrics.request_started()
        metrics.refused("queue_full")
    text = merge_metrics([living.render()], [merge_metrics([], [ended.render()])])
    assert value(text, 'speechllm_requests_refused_total{code="queue_full"}') == 2
    assert value(text, "speechllm_requests_in_flight") == 1
