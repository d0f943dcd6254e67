"""The engine over its thread, on a small real model; faults and waits come from its runner."""

import asyncio
import gc
import threading
import time
import weakref
from contextlib import asynccontextmanager

import numpy as np
import pytest

from model.checkpoint import write_lexicon
from model.lexicon import words_of
from model.transcription import Transcriber
from server.engine import continuous
from server.engine.admission import Admission
from server.engine.continuous import ContinuousEngine
from server.engine.decoding import Decoding
from server.engine.interface import ALL_GUARDS, NO_GUARDS, EngineRequest
from server.engine.runner import SpeechRunner
from server.engine.scheduler import ScheduleLimits
from server.errors import (
    DeadlineExceededError,
    InferenceFailedError,
    InvalidRequestError,
    NotReadyError,
    QueueFullError,
    ShuttingDownError,
)
from tests.conftest import SENTENCES, make_tiny_checkpoint
from tests.faulty_runner import START_POISON, FaultyRunner, poisoned
from tests.speech_models import generate_alone, noise, search_alone

pytestmark = pytest.mark.anyio

CLIPS = [noise(seconds, seed) for seed, seconds in enumerate((0.3, 2.9, 1.1, 4.0))]
LONG = noise(30.0, 9)  # about a hundred steps


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint):
    return Transcriber.from_pretrained(tiny_checkpoint, device="cpu")


@pytest.fixture
def runner(tiny):
    return FaultyRunner(SpeechRunner(tiny, max_slots=4))


def request(waveform, **fields):
    return EngineRequest("test", waveform, waveform.size / 16_000, **fields)


def make_engine(load, limits=None, *, max_requests=8, max_audio_s=100.0, **options):
    limits = limits or ScheduleLimits(max_batch_size=4)
    admission = Admission(max_requests=max_requests, max_audio_s=max_audio_s)
    options = {"guards": NO_GUARDS, **options}
    return ContinuousEngine(load, limits, admission, **options)


@asynccontextmanager
async def running(runner, limits=None, **options):
    engine = make_engine(lambda: runner, limits, **options)
    await engine.start()
    try:
        yield engine
    finally:
        runner.gate.set()
        await engine.stop()


async def hold_device(engine, runner, clip=LONG):
    """Close the gate behind one running request, so that others queue."""
    runner.gate.clear()
    runner.busy.clear()
    held = asyncio.create_task(engine.submit(request(clip)))
    await asyncio.to_thread(runner.busy.wait, 60)
    return held


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - a state of the engine, no event
            await asyncio.sleep(0.001)


async def test_every_request_gets_its_own_answer(tiny, runner):
    threads = set()
    async with running(
        runner, on_iteration=lambda _report: threads.add(threading.get_ident())
    ) as engine:
        results = await asyncio.gather(*(engine.submit(request(clip)) for clip in CLIPS * 2))
        stats = engine.stats()
    assert [list(result.token_ids) for result in results] == [
        generate_alone(tiny, clip) for clip in CLIPS * 2
    ]
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    assert stats.rtfx > 0
    assert (stats.alive, stats.queued, stats.running, stats.slots) == (True, 0, 0, 4)


async def test_answers_are_decoded_jointly_with_the_ctc_head_as_generate_does(tiny_checkpoint):
    joint = Transcriber.from_pretrained(tiny_checkpoint, device="cpu")
    decodings = [Decoding(), Decoding(repetition_penalty=1.2), Decoding(num_beams=2)]

    def alone(clip, decoding):
        penalty = decoding.repetition_penalty
        if decoding.num_beams > 1:
            return search_alone(joint, clip, decoding.num_beams, penalty=penalty)[0][0]
        return generate_alone(joint, clip, penalty=penalty)

    asked = [(clip, decoding) for clip in CLIPS for decoding in decodings]
    of_the_llm_alone = [alone(*each) for each in asked]
    joint.config.ctc_decoding_weight = 0.8
    expected = [alone(*each) for each in asked]
    assert expected != of_the_llm_alone
    runner = FaultyRunner(SpeechRunner(joint, max_slots=8))
    async with running(runner, max_requests=len(asked)) as engine:
        results = await asyncio.gather(
            *(engine.submit(request(clip, decoding=decoding)) for clip, decoding in asked)
        )
    assert [list(result.token_ids) for result in results] == expected


async def test_a_lexicon_counts_as_in_generate(tmp_path):
    make_tiny_checkpoint(tmp_path, ctc_decoding_weight=0.5)
    plain = Transcriber.from_pretrained(tmp_path, device="cpu")
    write_lexicon(tmp_path, words_of(" ".join(SENTENCES)), 4.0)
    spelling = Transcriber.from_pretrained(tmp_path, device="cpu")
    decodings = [Decoding(), Decoding(repetition_penalty=1.2), Decoding(num_beams=3)]

    def alone(joint, clip, decoding):
        penalty = decoding.repetition_penalty
        if decoding.num_beams > 1:
            return search_alone(joint, clip, decoding.num_beams, penalty=penalty)[0][0]
        return generate_alone(joint, clip, penalty=penalty)

    asked = [(clip, decoding) for clip in CLIPS for decoding in decodings]
    expected = [alone(spelling, *each) for each in asked]
    for with_lexicon, clip_and_decoding in zip(expected, asked, strict=True):
        assert with_lexicon != alone(plain, *clip_and_decoding)
    runner = FaultyRunner(SpeechRunner(spelling, max_slots=8))
    async with running(runner, max_requests=len(asked)) as engine:
        results = await asyncio.gather(
            *(engine.submit(request(clip, decoding=decoding)) for clip, decoding in asked)
        )
    assert [list(result.token_ids) for result in results] == expected


async def test_the_loop_stays_free_while_the_device_works(runner):
    async with running(runner) as engine:
        held = await hold_device(engine, runner)
        async with asyncio.timeout(5):
            await asyncio.sleep(0)
        assert not held.done()
        runner.gate.set()
        await held


async def test_a_request_that_is_cancelled_frees_its_slot_within_a_step(runner):
    async with running(runner) as engine:
        held = await hold_device(engine, runner)
        steps = runner.steps
        held.cancel()
        with pytest.raises(asyncio.CancelledError):
            await held
        runner.gate.set()
        await until(lambda: engine.stats().running == 0)
        # The step that ran when the client left was the last.
        assert runner.steps == steps


async def test_a_request_that_is_cancelled_while_it_waits_never_starts(runner):
    async with running(runner, ScheduleLimits(max_batch_size=1)) as engine:
        held = await hold_device(engine, runner, CLIPS[0])
        waiting = asyncio.create_task(engine.submit(request(CLIPS[1])))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        runner.gate.set()
        await held
        await until(lambda: engine.stats().queued == 0)
        assert runner.started == [1]


async def test_silence_is_answered_and_says_nothing_of_the_rate_of_work(runner):
    async with running(runner, guards=ALL_GUARDS) as engine:
        result = await engine.submit(request(np.zeros(16_000, np.float32)))
        assert (result.text, result.finish_reason, result.batch_size) == ("", "stop", 0)
        assert engine.stats().rtfx is None
        assert runner.steps == 0


async def test_beams_are_searched_beside_others_and_more_than_there_are_slots_refused(tiny, runner):
    async with running(runner) as engine:
        plain, search = await asyncio.gather(
            engine.submit(request(CLIPS[1])),
            engine.submit(request(CLIPS[3], decoding=Decoding(num_beams=3, n_best=2))),
        )
        assert list(plain.token_ids) == generate_alone(tiny, CLIPS[1])
        expected = search_alone(tiny, CLIPS[3], 3)
        assert list(search.token_ids) == expected[0][0]
        assert [each.score for each in search.hypotheses] == pytest.approx(
            [score for _, score in expected[:2]], abs=1e-4
        )
        with pytest.raises(InvalidRequestError, match="num_beams"):
            await engine.submit(request(CLIPS[3], decoding=Decoding(num_beams=5)))


async def test_a_full_queue_refuses_before_decoding_and_says_when_to_come_back(runner):
    async with running(runner, max_requests=2) as engine:
        with engine.admit(1.0), engine.admit(1.0):
            with pytest.raises(QueueFullError, match="2 requests") as refusal, engine.admit(1.0):
                pass
            assert refusal.value.retry_after_s == 1
        with engine.admit(1.0):
            assert engine.stats().admitted == 1
        assert engine.stats().admitted == 0


async def test_admission_is_bounded_by_audio_and_what_runs_does_not_count(runner):
    async with running(runner, max_audio_s=40.0) as engine:
        with engine.admit(30.0) as ticket:
            with pytest.raises(QueueFullError, match="30 s of audio"), engine.admit(20.0):
                pass
            held = await hold_device(engine, runner)
            await until(lambda: engine.stats().running == 1)
            with engine.admit(20.0):
                assert engine.stats().admitted_audio_s == 50.0
            ticket.measure(25.0)
            assert engine.stats().admitted_audio_s == 25.0
            runner.gate.set()
            await held


async def test_memory_is_told_of_and_forgotten_through_an_engines_death(tiny):
    """Also what comes and goes while none runs: nothing is unmapped before it is forgotten."""
    heard, may_load = [], threading.Event()

    def load():
        assert may_load.wait(60)
        runner = FaultyRunner(SpeechRunner(tiny, max_slots=4))
        runner.share = lambda samples: heard.append(("share", samples[0]))
        runner.forget = lambda samples: heard.append(("forget", samples[0]))
        loaded.append(runner)
        return runner

    loaded = []
    engine = make_engine(load)
    first, second, third = (np.full(10, number, np.float32) for number in range(3))
    engine.share(first)
    engine.share(second)
    engine.forget(first)
    may_load.set()
    await engine.start()
    try:
        assert heard == [("forget", 0), ("share", 1)]
        may_load.clear()
        loaded[0].is_broken = True
        with pytest.raises(InferenceFailedError):
            await engine.submit(request(CLIPS[0]))
        heard.clear()
        gone = weakref.ref(second)
        engine.forget(second)
        del second
        gc.collect()
        assert gone() is not None
        engine.share(third)
        may_load.set()
        await until(lambda: engine.stats().alive)
        assert heard[:2] == [("forget", 1), ("share", 2)]
        await until(lambda: gone() is None)
        assert (await engine.submit(request(CLIPS[0]))).token_ids
    finally:
        await engine.stop()


async def test_a_deadline_that_passes_while_a_request_waits_or_runs_is_an_error(runner):
    async with running(runner, ScheduleLimits(max_batch_size=1)) as engine:
        runner.gate.clear()
        soon_s = time.monotonic() + 0.2
        tasks = [
            asyncio.create_task(engine.submit(request(LONG, deadline_s=soon_s))) for _ in range(2)
        ]
        await asyncio.to_thread(runner.busy.wait, 60)
        await until(lambda: time.monotonic() > soon_s)
        runner.gate.set()
        for task in tasks:
            with pytest.raises(DeadlineExceededError):
                await task
        assert engine.stats().running == 0


async def test_a_wait_for_fuller_batches_gathers_them(runner):
    limits = ScheduleLimits(max_batch_size=2, max_wait_s=60.0)
    async with running(runner, limits) as engine:
        first = asyncio.create_task(engine.submit(request(CLIPS[0])))
        await until(lambda: engine.stats().queued == 1)
        second = asyncio.create_task(engine.submit(request(CLIPS[0])))
        results = await asyncio.gather(first, second)
        assert [result.batch_size for result in results] == [2, 2]


async def test_draining_finishes_what_is_admitted_and_admits_no_more(runner):
    async with running(runner, ScheduleLimits(max_batch_size=4, max_wait_s=60.0)) as engine:

        async def admitted():
            with engine.admit(0.3):
                return await engine.submit(request(CLIPS[0]))

        work = asyncio.create_task(admitted())
        await until(lambda: engine.stats().queued == 1)
        await engine.drain(60.0)
        assert (await work).finish_reason
        with pytest.raises(ShuttingDownError), engine.admit(1.0):
            pass


async def test_what_a_drain_cannot_finish_in_time_is_refused(runner):
    async with running(runner, ScheduleLimits(max_batch_size=1)) as engine:
        with engine.admit(1.0):
            held = await hold_device(engine, runner)
            waiting = asyncio.create_task(engine.submit(request(CLIPS[0])))
            await asyncio.sleep(0)
            await engine.drain(0.01)
            for task in (held, waiting):
                with pytest.raises(ShuttingDownError):
                    await task


async def test_a_model_that_cannot_be_loaded_is_an_error_at_the_start():
    def load():
        raise ValueError("no such checkpoint")

    engine = make_engine(load)
    with pytest.raises(ValueError, match="no such checkpoint"):
        await engine.start()
    with pytest.raises(NotReadyError):
        await engine.submit(request(CLIPS[0]))
    assert not engine.stats().alive
    await engine.stop()


async def test_an_engine_that_is_stopped_while_it_loads_ends_when_it_has_loaded(runner):
    may_load = threading.Event()

    def load():
        assert may_load.wait(60)
        return runner

    engine = make_engine(load)
    starting = asyncio.create_task(engine.start())
    await asyncio.sleep(0)
    starting.cancel()
    await asyncio.wait([starting])
    may_load.set()
    await engine.stop()
    assert not engine.stats().alive


async def test_a_dead_engine_answers_everybody_and_runs_again_once(tiny):
    loaded = []

    def load():
        loaded.append(FaultyRunner(SpeechRunner(tiny, max_slots=1)))
        return loaded[-1]

    engine = make_engine(load)
    await engine.start()
    death = asyncio.create_task(engine.failed())
    try:
        work = [asyncio.create_task(engine.submit(request(CLIPS[1]))) for _ in range(3)]
        loaded[0].is_broken = True
        for error in await asyncio.gather(*work, return_exceptions=True):
            assert isinstance(error, InferenceFailedError)
        assert not engine.stats().alive
        with pytest.raises(NotReadyError):
            await engine.submit(request(CLIPS[1]))

        await until(lambda: engine.stats().alive)
        result = await engine.submit(request(CLIPS[1]))
        assert list(result.token_ids) == generate_alone(tiny, CLIPS[1])
        assert not death.done()

        loaded[1].is_broken = True
        with pytest.raises(InferenceFailedError):
            await engine.submit(request(CLIPS[1]))
        assert "the device is gone" in str(await asyncio.wait_for(death, 60))
        assert not engine.stats().alive
        assert len(loaded) == 2
    finally:
        await engine.stop()


async def test_an_engine_that_cannot_be_loaded_again_is_dead_for_good(runner):
    runners = [runner]
    engine = make_engine(runners.pop)
    await engine.start()
    runner.is_broken = True
    with pytest.raises(InferenceFailedError):
        await engine.submit(request(CLIPS[0]))
    assert isinstance(await asyncio.wait_for(engine.failed(), 60), IndexError)
    await engine.stop()


async def test_a_poisoned_request_fails_and_the_engine_lives_on(tiny, runner):
    async with running(runner) as engine:
        bad = request(poisoned(CLIPS[1], START_POISON))
        results = await asyncio.gather(
            *(engine.submit(each) for each in (request(CLIPS[1]), bad, request(CLIPS[2]))),
            return_exceptions=True,
        )
        assert isinstance(results[1], InferenceFailedError)
        for index in (0, 2):
            clip = CLIPS[1] if index == 0 else CLIPS[2]
            assert list(results[index].token_ids) == generate_alone(tiny, clip)
        assert engine.stats().alive


async def test_pieces_are_told_on_the_event_loop_before_the_answer(runner):
    told = []

    def listen(piece):
        assert asyncio.get_running_loop()
        told.append(piece)

    async with running(runner) as engine:
        result = await engine.submit(request(CLIPS[3], on_piece=listen))
    assert "".join(piece.text for piece in told) == result.text
    assert told[-1].finish_reason == result.finish_reason


async def test_a_listener_that_fails_ends_its_own_request_alone(tiny, runner):
    def listen(_piece):
        raise KeyError("a fault of the listener")

    async with running(runner) as engine:
        failing = engine.submit(request(LONG, on_piece=listen))
        results = await asyncio.gather(
            failing, engine.submit(request(CLIPS[1])), return_exceptions=True
        )
        assert isinstance(results[0], KeyError)
        assert list(results[1].token_ids) == generate_alone(tiny, CLIPS[1])
        await until(lambda: engine.stats().running == 0)


async def test_a_device_that_hangs_keeps_nobody_waiting_for_ever(runner, monkeypatch, caplog):
    monkeypatch.setattr(continuous, "_DEADLINE_GRACE_S", 0.1)
    monkeypatch.setattr(continuous, "_STOP_TIMEOUT_S", 0.1)
    async with running(runner) as engine:
        held = await hold_device(engine, runner)
        deadline_s = time.monotonic() + 0.1
        with pytest.raises(DeadlineExceededError, match="did not answer in time"):
            await engine.submit(request(CLIPS[0], deadline_s=deadline_s))
        async with asyncio.timeout(20):
            await engine.stop()
        assert "did not end" in caplog.text
        with pytest.raises(ShuttingDownError):
            await held
