"""Every Prometheus series of the server, in one place. Labels take values from closed sets only.

RTFx over a window, that is seconds of audio for each second the device worked:
`rate(speechllm_audio_seconds_total[5m]) / rate(speechllm_device_busy_seconds_total[5m])`.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from server.engine.interface import EngineResult, EngineStats, IterationReport

# Seconds, from a 20 ms request to a 10 min file.
_SECONDS = (
    0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75,
    1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0,
)  # fmt: skip
_CLIP_SECONDS = (0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 25, 30, 60, 120, 300, 600, 1800, 3600)
_BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)
# Seconds of one step, from a small model on a GPU to a large batch on a CPU.
_STEP_SECONDS = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3,
    0.5, 1.0, 2.0, 5.0,
)  # fmt: skip
_IN_COMMON = frozenset(
    {
        "speechllm_requests_admitted", "speechllm_admitted_audio_seconds",
        "speechllm_requests_waiting", "speechllm_requests_running", "speechllm_kv_slots",
        "speechllm_kv_cache_bytes", "speechllm_drain_rtfx", "python_info", "process_max_fds",
    }
)  # fmt: skip
_EARLIEST = frozenset({"speechllm_ready", "process_start_time_seconds"})
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Metrics:
    """The series of one application, in a registry of their own."""

    def __init__(self) -> None:
        """Create all series at zero."""
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self._requests = Counter(
            "speechllm_requests",
            "Answered HTTP requests; status 499 is a client that left.",
            ["endpoint", "method", "status"],
            registry=registry,
        )
        self._in_flight = Gauge(
            "speechllm_requests_in_flight", "HTTP requests being answered.", registry=registry
        )
        self._refused = Counter(
            "speechllm_requests_refused",
            "Requests that ended in an error, by its stable code.",
            ["code"],
            registry=registry,
        )
        self._stages = Histogram(
            "speechllm_stage_seconds",
            "Seconds a transcription spent in each stage; encode and prefill are its batch's, "
            "generate holds prefill, and first_token counts from its submission.",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._clip_seconds = Histogram(
            "speechllm_clip_seconds",
            "Length of the transcribed recordings, seconds.",
            buckets=_CLIP_SECONDS,
            registry=registry,
        )
        self._transcripts = Counter(
            "speechllm_transcripts",
            "Transcripts of clips by how they ended: stop, length (token cap), loop, empty, or "
            "no_speech, which the model did not hear.",
            ["outcome"],
            registry=registry,
        )
        self._tokens = Counter(
            "speechllm_generated_tokens", "Tokens of all transcripts.", registry=registry
        )
        self._audio_seconds = Counter(
            "speechllm_audio_seconds", "Audio that went through the model.", registry=registry
        )
        self._padding_seconds = Counter(
            "speechllm_padding_seconds",
            "Padding that went through the model besides, to square its batches.",
            registry=registry,
        )
        self._busy_seconds = Counter(
            "speechllm_device_busy_seconds", "Time the device worked.", registry=registry
        )
        self._batch_sizes = Histogram(
            "speechllm_batch_size",
            "Clips encoded and prefilled together.",
            buckets=_BATCH_SIZES,
            registry=registry,
        )
        self._step_sizes = Histogram(
            "speechllm_decode_batch_size",
            "Sequences in a decode step; every beam is one.",
            buckets=_BATCH_SIZES,
            registry=registry,
        )
        self._step_seconds = Histogram(
            "speechllm_iteration_seconds",
            "Seconds of each part of an engine's iteration: encode, prefill or decode.",
            ["part"],
            buckets=_STEP_SECONDS,
            registry=registry,
        )
        self._ended = Counter(
            "speechllm_engine_requests",
            "Requests that left the engine, by how: stop, length, loop, cancelled, deadline, "
            "failed.",
            ["reason"],
            registry=registry,
        )
        self._retries = Counter(
            "speechllm_loop_retries",
            "Answers that looped and were begun again under a penalty.",
            registry=registry,
        )
        self._failed_batches = Counter(
            "speechllm_batch_failures",
            "Calls into the model that failed; their clips are tried in smaller batches.",
            registry=registry,
        )

        self._realtime_sessions = Gauge(
            "speechllm_realtime_sessions", "Live sessions that are open.", registry=registry
        )
        self._realtime_ended = Counter(
            "speechllm_realtime_sessions_ended",
            "Live sessions by how they ended: client, idle, expired, slow_reader, shutdown, error.",
            ["reason"],
            registry=registry,
        )
        self._first_delta_seconds = Histogram(
            "speechllm_realtime_first_delta_seconds",
            "From the moment speech was noticed to the first text of its turn.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._finalisation_seconds = Histogram(
            "speechllm_realtime_finalisation_seconds",
            "From the end of a turn to its whole transcript.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._contradictions = Counter(
            "speechllm_realtime_contradictions",
            "Pieces of turns whose last transcript did not begin with the text sent before.",
            registry=registry,
        )

    def watch(self, stats: Callable[[], EngineStats], is_ready: Callable[[], bool]) -> None:
        """Read these gauges from the engine whenever they are scraped."""
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "speechllm_ready": ("1 while requests are taken.", lambda: float(is_ready())),
            "speechllm_front_ends": ("Processes that take in requests.", lambda: 1.0),
            "speechllm_requests_admitted": (
                "Requests that are taken on: decoding, waiting or running.",
                lambda: stats().admitted,
            ),
            "speechllm_admitted_audio_seconds": (
                "Audio of these, seconds.",
                lambda: stats().admitted_audio_s,
            ),
            "speechllm_requests_waiting": (
                "Requests in the engine's queue.",
                lambda: stats().queued,
            ),
            "speechllm_requests_running": (
                "Requests in the running batch.",
                lambda: stats().running,
            ),
            "speechllm_kv_slots": (
                "Requests that can run together; a beam search takes one slot for every beam.",
                lambda: stats().slots,
            ),
            "speechllm_kv_cache_bytes": (
                "Memory for the keys and values of running requests.",
                lambda: stats().kv_cache_bytes,
            ),
            "speechllm_drain_rtfx": (
                "Seconds of audio finished in a second of work, lately; 0 before the first.",
                lambda: stats().rtfx or 0.0,
            ),
        }
        for name, (text, value) in gauges.items():
            Gauge(name, text, registry=self.registry).set_function(value)

    def watch_held(self, held: Callable[[], int]) -> None:
        """Read how many requests wait for their key's turn whenever it is scraped."""
        gauge = Gauge(
            "speechllm_requests_held",
            "Requests that wait for their key's turn before they are admitted.",
            registry=self.registry,
        )
        gauge.set_function(held)

    def request_started(self) -> None:
        """Count a request in."""
        self._in_flight.inc()

    def request_ended(self, endpoint: str, method: str, status: int) -> None:
        """Count a request out; `endpoint` is a route's template, never a path."""
        self._in_flight.dec()
        method = method if method in _METHODS else "other"
        self._requests.labels(endpoint, method, str(status)).inc()

    def refused(self, code: str) -> None:
        """Count an error answer."""
        self._refused.labels(code).inc()

    def transcribed(
        self, audio_s: float, results: Sequence[EngineResult], stages_s: dict[str, float]
    ) -> None:
        """Count a transcription; `results` are of its pieces, `stages_s` its seconds by stage."""
        for stage, seconds in stages_s.items():
            self._stages.labels(stage).observe(seconds)
        self._clip_seconds.observe(audio_s)
        for result in results:
            self._transcripts.labels(result.finish_reason if result.text else "empty").inc()
            self._tokens.inc(len(result.token_ids))
        if not results:
            self._transcripts.labels("no_speech").inc()

    def realtime_began(self) -> None:
        """Count a live session in."""
        self._realtime_sessions.inc()

    def realtime_ended(self, reason: str) -> None:
        """Count a live session out."""
        self._realtime_sessions.dec()
        self._realtime_ended.labels(reason).inc()

    def turn_first_delta(self, seconds: float) -> None:
        """Count the first text of a turn."""
        self._first_delta_seconds.observe(seconds)

    def turn_finalised(self, seconds: float, contradictions: int) -> None:
        """Count a turn's whole transcript."""
        self._finalisation_seconds.observe(seconds)
        self._contradictions.inc(contradictions)

    def iterated(self, report: IterationReport) -> None:
        """Count an iteration; called from the device's thread."""
        self._busy_seconds.inc(report.busy_s)
        if report.start_sizes:
            for size in report.start_sizes:
                self._batch_sizes.observe(size)
            self._audio_seconds.inc(report.audio_s)
            # Sums of the same clips in another order: rounding may put it below zero.
            self._padding_seconds.inc(max(0.0, report.padded_audio_s - report.audio_s))
            self._step_seconds.labels("encode").observe(report.encode_s)
            self._step_seconds.labels("prefill").observe(report.prefill_s)
        if report.decoded_rows:
            self._step_sizes.observe(report.decoded_rows)
            self._step_seconds.labels("decode").observe(report.decode_s)
        if report.failures:
            self._failed_batches.inc(report.failures)
        if report.retries:
            self._retries.inc(report.retries)
        for reason, count in report.ended.items():
            self._ended.labels(reason).inc(count)

    def render(self) -> bytes:
        """Return all series in Prometheus' text format."""
        return generate_latest(self.registry)


def merge_metrics(living: Sequence[bytes], ended: Sequence[bytes] = ()) -> bytes:
    """Make one text of those of several processes that serve together.

    Counts, times and memory add up. What all processes read from the same place is theirs in
    common. Of processes that have ended, what they counted stays, and what they held does not.
    """
    families: dict[str, Metric] = {}
    values: dict[str, defaultdict[tuple[str, tuple[tuple[str, str], ...]], list[float]]] = {}
    for number, text in enumerate([*living, *ended]):
        for family in text_string_to_metric_families(text.decode()):
            if number >= len(living) and family.type == "gauge":
                continue
            families.setdefault(family.name, family)
            found = values.setdefault(family.name, defaultdict(list))
            for sample in family.samples:
                found[sample.name, tuple(sample.labels.items())].append(sample.value)
    registry = CollectorRegistry()
    registry.register(_Merged(families, values))
    return generate_latest(registry)


class _Merged:
    """A collector of what was merged."""

    def __init__(
        self,
        families: dict[str, Metric],
        values: dict[str, defaultdict[tuple[str, tuple[tuple[str, str], ...]], list[float]]],
    ) -> None:
        self._families = families
        self._values = values

    def collect(self) -> Iterable[Metric]:
        for name, family in self._families.items():
            merged = Metric(name, family.documentation, family.type)
            for (sample, labels), values in self._values[name].items():
                merged.add_sample(sample, dict(labels), _merge(sample, values))
            yield merged


def _merge(sample: str, values: list[float]) -> float:
    if sample in _IN_COMMON:
        return max(values)
    if sample in _EARLIEST or sample.endswith("_created"):
        return min(values)
    return sum(values)
