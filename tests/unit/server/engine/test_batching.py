"""The engine with a scripted backend: it injects faults and holds the device on command."""

import asyncio
import threading
from contextlib import asynccontextmanager

import numpy as np
import pytest

from server.engine.batching import BatchingEngine
from server.engine.interface import BackendBatch, BackendTranscript, EngineRequest
from server.engine.scheduler import BatchLimits
from server.errors import (
    DeadlineExceededError,
    InferenceFailedError,
    NotReadyError,
    QueueFullError,
    ShuttingDownError,
)

pytestmark = pytest.mark.anyio

LIMITS = BatchLimits(max_batch_size=4, max_batch_audio_s=100.0, max_wait_s=0.0)
POISON = -1.0


class ScriptedBackend:
    """Answers a clip with its first sample; fails on POISON; waits while the gate is closed."""

    max_audio_s = 30.0

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.busy = threading.Event()
        self.batches = []
        self.threads = set()

    def warm_up(self):
        self.threads.add(threading.get_ident())

    def transcribe(self, waveforms, prompt):
        self.threads.add(threading.get_ident())
        self.batches.append([float(waveform[0]) for waveform in waveforms])
        self.busy.set()
        assert self.gate.wait(10)
        if POISON in self.batches[-1]:
            raise RuntimeError("poisoned")
        transcripts = [
            BackendTranscript(f"{waveform[0]:g}{prompt or ''}", "en", "stop", 1)
            for waveform in waveforms
        ]
        return BackendBatch(transcripts, 0.1, 0.2)


def request(value, **fields):
    waveform = np.full(16_000, value, np.float32)
    return EngineRequest(id=str(value), waveform=waveform, audio_s=1.0, **fields)


@asynccontextmanager
async def running(backend, limits=LIMITS, max_queue_size=8, **options):
    engine = BatchingEngine(lambda: backend, limits, max_queue_size=max_queue_size, **options)
    await engine.start()
    try:
        yield engine
    finally:
        backend.gate.set()
        await engine.stop()


async def hold_device(engine, backend):
    """Close the gate behind one running request, so that others queue."""
    backend.gate.clear()
    backend.busy.clear()
    held = asyncio.create_task(engine.submit(request(0)))
    await asyncio.to_thread(backend.busy.wait, 10)
    return held


async def submit_all(engine, *requests):
    tasks = [asyncio.create_task(engine.submit(each)) for each in requests]
    while engine.stats().queued < len(tasks):  # noqa: ASYNC110 - a state of the engine, no event
        await asyncio.sleep(0)
    return tasks


async def test_requests_that_wait_together_run_together_and_get_their_own_answers():
    backend = ScriptedBackend()
    reports = []
    async with running(backend, on_batch=reports.append) as engine:
        held = await hold_device(engine, backend)
        tasks = await submit_all(engine, request(1), request(2), request(3))
        backend.gate.set()
        results = await asyncio.gather(held, *tasks)
    assert [result.text for result in results] == ["0", "1", "2", "3"]
    assert [result.batch_size for result in results] == [1, 3, 3, 3]
    assert backend.batches == [[0], [1, 2, 3]]
    assert (results[1].encode_s, results[1].generate_s) == (0.1, 0.2)
    assert [report.clips for report in reports] == [1, 3]
    assert len(backend.threads) == 1


async def test_requests_with_other_prompts_run_apart():
    backend = ScriptedBackend()
    async with running(backend) as engine:
        held = await hold_device(engine, backend)
        tasks = await submit_all(engine, request(1), request(2, prompt="?"), request(3))
        backend.gate.set()
        results = await asyncio.gather(held, *tasks)
    assert [result.text for result in results] == ["0", "1", "2?", "3"]
    assert backend.batches == [[0], [1, 3], [2]]


async def test_a_failing_batch_fails_only_the_guilty_request():
    backend = ScriptedBackend()
    async with running(backend) as engine:
        held = await hold_device(engine, backend)
        tasks = await submit_all(engine, request(1), request(POISON), request(3))
        backend.gate.set()
        results = await asyncio.gather(held, *tasks, return_exceptions=True)
        assert isinstance(results[2], InferenceFailedError)
        assert [results[i].text for i in (0, 1, 3)] == ["0", "1", "3"]
        assert (await engine.submit(request(4))).text == "4"


async def test_a_cancelled_request_never_reaches_the_device():
    backend = ScriptedBackend()
    async with running(backend) as engine:
        held = await hold_device(engine, backend)
        tasks = await submit_all(engine, request(1), request(2))
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        backend.gate.set()
        await asyncio.gather(held, tasks[1])
    assert backend.batches == [[0], [2]]


async def test_a_request_cancelled_while_it_runs_disturbs_nobody():
    backend = ScriptedBackend()
    async with running(backend) as engine:
        held = await hold_device(engine, backend)
        (waiting,) = await submit_all(engine, request(1))
        held.cancel()
        backend.gate.set()
        assert (await waiting).text == "1"


async def test_a_full_queue_refuses_and_says_when_to_come_back():
    backend = ScriptedBackend()
    async with running(backend, max_queue_size=2) as engine:
        with engine.admit(), engine.admit():
            with pytest.raises(QueueFullError) as refusal, engine.admit():
                pass
            assert refusal.value.retry_after_s == 1
        with engine.admit():
            assert engine.stats().admitted == 1
        assert engine.stats().admitted == 0


async def test_a_request_whose_deadline_passes_in_the_queue_is_not_run():
    backend = ScriptedBackend()
    now = [100.0]
    async with running(backend, clock=lambda: now[0]) as engine:
        held = await hold_device(engine, backend)
        (late,) = await submit_all(engine, request(1, deadline_s=100.5))
        now[0] = 101.0
        backend.gate.set()
        await held
        with pytest.raises(DeadlineExceededError):
            await late
    assert backend.batches == [[0]]


async def test_max_wait_gathers_a_batch():
    backend = ScriptedBackend()
    limits = BatchLimits(max_batch_size=2, max_batch_audio_s=100.0, max_wait_s=30.0)
    async with running(backend, limits) as engine:
        (first,) = await submit_all(engine, request(1))
        second = asyncio.create_task(engine.submit(request(2)))
        await asyncio.gather(first, second)
    assert backend.batches == [[1, 2]]


async def test_draining_finishes_what_is_admitted_and_admits_no_more():
    backend = ScriptedBackend()
    limits = BatchLimits(max_batch_size=4, max_batch_audio_s=100.0, max_wait_s=30.0)
    async with running(backend, limits) as engine:

        async def admitted(value):
            with engine.admit():
                return await engine.submit(request(value))

        work = asyncio.create_task(admitted(1))
        while not engine.stats().queued:  # noqa: ASYNC110 - a state of the engine, no event
            await asyncio.sleep(0)
        await engine.drain(10.0)
        assert (await work).text == "1"
        with pytest.raises(ShuttingDownError), engine.admit():
            pass


async def test_what_a_drain_cannot_finish_in_time_is_refused():
    backend = ScriptedBackend()
    async with running(backend) as engine:
        with engine.admit():
            held = await hold_device(engine, backend)
            (queued,) = await submit_all(engine, request(1))
            await engine.drain(0.01)
            for task in (held, queued):
                with pytest.raises(ShuttingDownError):
                    await task


async def test_a_model_that_cannot_be_loaded_is_an_error_at_the_start():
    def load():
        raise ValueError("no such checkpoint")

    engine = BatchingEngine(load, LIMITS, max_queue_size=8)
    with pytest.raises(ValueError, match="no such checkpoint"):
        await engine.start()
    with pytest.raises(NotReadyError):
        await engine.submit(request(1))
    await engine.stop()


async def test_an_engine_whose_scheduling_dies_answers_and_reports_dead():
    backend = ScriptedBackend()

    def broken(_report):
        raise RuntimeError("a fault outside the model")

    async with running(backend, on_batch=broken) as engine:
        with pytest.raises(InferenceFailedError, match="engine has died"):
            await engine.submit(request(1))
        assert not engine.stats().alive
        with pytest.raises(NotReadyError):
            await engine.submit(request(2))


async def test_the_loop_stays_free_while_the_device_works():
    backend = ScriptedBackend()
    async with running(backend) as engine:
        held = await hold_device(engine, backend)
        async with asyncio.timeout(1):
            await asyncio.sleep(0)
        assert not held.done()
        backend.gate.set()
        await held
