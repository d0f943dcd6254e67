"""A live session on an engine whose answers are scripted, so that time and faults can be chosen.

Its transcripts tell of their audio: a word for each half second.
"""

import asyncio
import contextlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.audio.turns import VadOptions
from server.engine.admission import Admission
from server.engine.interface import Capabilities, EngineResult
from server.errors import (
    BufferEmptyError,
    BufferFullError,
    InferenceFailedError,
    InvalidRequestError,
    QueueFullError,
    RateLimitedError,
)
from server.metrics import Metrics
from server.realtime import (
    Cleared,
    Committed,
    Completed,
    Delta,
    Failed,
    OpenSessions,
    RealtimeSession,
    SessionConfig,
    SessionLimits,
    SpeechStarted,
    SpeechStopped,
)
from tests.recordings import speechlike

RATE = 16_000
WORD = RATE // 2


def transcript(waveform):
    return " ".join(f"w{i}" for i in range(len(waveform) // WORD))


class ScriptedEngine:
    capabilities = Capabilities(max_audio_s=4.0)

    def __init__(self, answer=transcript):
        self.answer = answer
        self.admission = Admission(max_requests=4, max_audio_s=60.0)
        self.asked = []
        self.cancelled = 0
        self.gate = asyncio.Event()
        self.gate.set()

    @contextlib.contextmanager
    def admit(self, audio_s):
        self.admission.check(audio_s, running=0, running_audio_s=0.0)
        ticket = self.admission.take(audio_s)
        try:
            yield ticket
        finally:
            ticket.give_back()

    async def submit(self, request):
        self.asked.append(request)
        try:
            await self.gate.wait()
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        text = self.answer(request.waveform)
        return EngineResult(text, "en", "stop", (1, 2), 0.0, 0.0, 0.0, 0.0, 0.0, 1)


@contextlib.asynccontextmanager
async def open_session(engine=None, config=None, charge=None, **limits):
    """Yield a running session and the list of its events."""
    engine = engine or ScriptedEngine()
    events = []
    with engine.admit(0.0) as ticket:
        ticket.measure(0.0, clips=0)
        session = RealtimeSession(
            engine,
            ticket,
            SessionLimits(
                **{
                    "max_buffer_s": 60.0,
                    "partial_interval_s": 0.5,
                    "request_timeout_s": 60.0,
                    "max_piece_s": 15.0,
                }
                | limits
            ),
            Metrics(),
            id_="sess_test",
            emit=events.append,
            charge=charge or (lambda _audio_s: contextlib.nullcontext()),
        )
        session.configure(config or SessionConfig(rate_hz=RATE))
        async with asyncio.TaskGroup() as group:
            worker = group.create_task(session.run())
            yield session, events
            worker.cancel()
        assert engine.admission.requests == 0, "an idle session counts as no request"


def pcm(samples):
    return (samples * 32_767).astype("<i2").tobytes()


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario, 60))


async def wait_for(condition):
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - of code that has no event for it
            await asyncio.sleep(0.001)


def silence(seconds):
    """Next to silent noise, so that no two stretches are alike."""
    n_samples = round(seconds * RATE)
    noise = np.random.default_rng(n_samples).integers(-9, 9, n_samples) / 32_768
    return noise.astype(np.float32)


TURN = pcm(np.concatenate([silence(0.5), speechlike(3.0, 2), silence(1.0)]))
TWO_TURNS = pcm(
    np.concatenate(
        [
            silence(0.3), speechlike(1.2, 1), silence(1.0),
            speechlike(3.0, 2), speechlike(3.0, 3), silence(1.1),
        ]
    )
)  # fmt: skip


def transcript_by_place(waveform):
    """Names each half second of TWO_TURNS whose middle is in the waveform."""
    samples = np.frombuffer(TWO_TURNS, "<i2").astype(np.float32) / np.float32(32_768)
    windows = np.flatnonzero(samples[: len(samples) - 64] == waveform[0])
    (start,) = {int(at) for at in windows if np.array_equal(samples[at : at + 64], waveform[:64])}
    first, stop = ((position + WORD // 2) // WORD for position in (start, start + len(waveform)))
    return " ".join(f"w{i}" for i in range(first, stop))


def find(events, kind):
    return [event for event in events if isinstance(event, kind)]


def texts(events):
    return [event.text for event in find(events, Completed)]


def check_deltas(events):
    """What was told of each turn makes up its text, and comes before it."""
    told = {}
    for event in events:
        if isinstance(event, Delta):
            told[event.item_id] = told.get(event.item_id, "") + event.text
        elif isinstance(event, Completed):
            assert told.get(event.item_id, "") == event.text


def test_a_turn_is_told_from_its_begin_to_its_text():
    async def scenario():
        async with open_session() as (session, events):
            for start in range(0, len(TURN), 3200):
                await session.append(TURN[start : start + 3200])
                await asyncio.sleep(0)
            await session.finish()
        return events

    events = run(scenario())
    assert isinstance(events[0], SpeechStarted)
    kinds = [type(event) for event in events if not isinstance(event, Delta)]
    assert kinds == [SpeechStarted, SpeechStopped, Committed, Completed]
    assert len({event.item_id for event in events}) == 1
    deltas = [i for i, event in enumerate(events) if isinstance(event, Delta)]
    stopped = [type(event) for event in events].index(SpeechStopped)
    assert deltas[0] < stopped, "text is told while somebody speaks"
    check_deltas(events)
    start_s, end_s = events[0].start_ms / 1000, events[stopped].end_ms / 1000
    assert start_s == pytest.approx(0.2, abs=0.2)
    assert start_s + 1 < end_s < 3.9
    assert find(events, Completed)[0].audio_s == pytest.approx(end_s - start_s, abs=0.001)


@settings(max_examples=15)
@given(cuts=st.lists(st.integers(0, len(TWO_TURNS)), max_size=12))
def test_any_split_of_the_audio_gives_the_same_texts(cuts):
    async def scenario(edges):
        async with open_session(ScriptedEngine(transcript_by_place)) as (session, events):
            for start, end in pairwise(edges):
                await session.append(TWO_TURNS[start:end])
            await session.finish()
        return events

    whole = run(scenario([0, len(TWO_TURNS)]))
    split = run(scenario([0, *sorted(cuts), len(TWO_TURNS)]))
    assert len(texts(whole)) == 2
    assert texts(split) == texts(whole)
    check_deltas(split)
    expected = list(
        range(int(texts(whole)[1].split()[0][1:]), int(texts(whole)[1].split()[-1][1:]))
    )
    assert texts(whole)[1].split()[:-1] == [f"w{i}" for i in expected], "no word twice, none lost"
    previous = [event.previous_item_id for event in find(split, Committed)]
    assert previous == [None, find(split, Committed)[0].item_id]


@settings(max_examples=10)
@given(answers=st.lists(st.sampled_from(["a b c", "a b d e", "b c", "", "a b c d"]), min_size=40))
def test_deltas_make_up_the_text_even_if_the_model_contradicts_itself(answers):
    async def scenario():
        left = iter(answers * 10)
        async with open_session(ScriptedEngine(lambda _: next(left))) as (session, events):
            for start in range(0, len(TWO_TURNS), 8000):
                await session.append(TWO_TURNS[start : start + 8000])
                await asyncio.sleep(0.001)
            await session.finish()
        return events

    events = run(scenario())
    assert len(texts(events)) == 2
    check_deltas(events)


def test_the_end_of_a_turn_does_not_wait_for_a_transcript_of_its_beginning():
    async def scenario():
        engine = ScriptedEngine()
        async with open_session(engine) as (session, events):
            engine.gate.clear()
            await session.append(TURN[: len(TURN) // 2])
            await wait_for(lambda: engine.asked)
            await session.append(TURN[len(TURN) // 2 :])
            await wait_for(lambda: len(engine.asked) == 2)
            engine.gate.set()
            await session.finish()
        return engine, events

    engine, events = run(scenario())
    assert engine.cancelled == 1
    assert len(engine.asked) == 2
    assert len(texts(events)) == 1


def test_a_client_may_commit_by_itself():
    async def scenario():
        async with open_session(config=SessionConfig(rate_hz=RATE, vad=None)) as (session, events):
            with pytest.raises(BufferEmptyError):
                await session.commit()
            await session.append(pcm(speechlike(10.0)))
            assert events == []
            await session.commit()
            await session.append(pcm(silence(1.0)))
            await session.commit()
            with pytest.raises(BufferEmptyError):
                await session.commit()
            await session.finish()
        return events

    events = run(scenario())
    assert find(events, SpeechStarted) == []
    spoken, silent = find(events, Completed)
    assert spoken.text.count("w0") > 2, "what is longer than the model takes is cut"
    assert spoken.audio_s == pytest.approx(10.0, abs=0.6)
    assert (silent.text, silent.audio_s) == ("", 0.0)
    check_deltas(events)


def test_a_commit_ends_an_open_turn():
    async def scenario():
        async with open_session() as (session, events):
            with pytest.raises(BufferEmptyError):
                await session.commit()
            await session.append(pcm(speechlike(2.0)))
            await session.commit()
            await session.finish()
        return events

    events = run(scenario())
    assert find(events, SpeechStopped) == []
    assert len(find(events, Committed)) == len(texts(events)) == 1


def test_what_is_cleared_is_not_transcribed():
    async def scenario():
        async with open_session(partial_interval_s=0.0) as (session, events):
            await session.append(pcm(speechlike(2.0)))
            session.clear()
            await session.append(pcm(silence(2.0)))
            await session.finish()
        return events

    events = run(scenario())
    assert [type(event) for event in events] == [SpeechStarted, Cleared]


def test_a_committed_turn_keeps_its_configuration():
    first = SessionConfig(rate_hz=RATE, vad=None, prompt="one", language="en", logprobs=True)
    second = SessionConfig(rate_hz=RATE, vad=None, prompt="two", language="mn")

    async def scenario():
        engine = ScriptedEngine()
        async with open_session(engine, config=first) as (session, events):
            for config in (second, first):
                await session.append(pcm(speechlike(2.0)))
                await session.commit()
                session.configure(config)
            await session.finish()
        return [request.prompt for request in engine.asked], find(events, Completed)

    prompts, completed = run(scenario())
    assert prompts == ["one", "two"]
    assert [each.language for each in completed] == ["en", "mn"]
    assert [each.logprobs is None for each in completed] == [False, True]


@pytest.mark.parametrize("rate_hz", [8000, 24_000])
def test_times_stay_right_however_often_audio_is_cleared(rate_hz):
    block = np.zeros(rate_hz // 10, "<i2").tobytes()
    speech = np.interp(np.arange(0, 3.0, 1 / rate_hz), np.arange(0, 3.0, 1 / RATE), speechlike(3.0))
    turn = np.concatenate([np.zeros(rate_hz), speech])

    async def scenario(clears):
        async with open_session(config=SessionConfig(rate_hz=rate_hz)) as (session, events):
            for _ in range(100):
                await session.append(block)
                if clears:
                    session.clear()
            await session.append(pcm(turn))
            await session.finish()
        return find(events, SpeechStarted)[0].start_ms

    assert run(scenario(clears=True)) == pytest.approx(run(scenario(clears=False)), abs=40)


def test_audio_that_comes_too_fast_is_refused_and_the_rest_goes_on():
    async def scenario():
        engine = ScriptedEngine()
        config = SessionConfig(rate_hz=RATE, vad=None)
        async with open_session(engine, config, max_buffer_s=3.0) as (session, events):
            await session.append(pcm(speechlike(2.0)))
            with pytest.raises(BufferFullError):
                await session.append(pcm(speechlike(2.0)))
            engine.gate.clear()
            await session.commit()
            with pytest.raises(BufferFullError):
                await session.append(pcm(speechlike(2.0)))
            engine.gate.set()
            await wait_for(lambda: texts(events))
            await session.append(pcm(speechlike(2.0)))
        return events

    assert len(texts(run(scenario()))) == 1


@pytest.mark.parametrize("error", [InferenceFailedError("no"), RateLimitedError("slower")])
def test_a_turn_that_fails_fails_alone(error):
    class FailsOnce:
        is_done = False

        @contextlib.asynccontextmanager
        async def __call__(self, _audio_s):
            if not self.is_done:
                self.is_done = True
                raise error
            yield

    async def scenario():
        async with open_session(charge=FailsOnce()) as (session, events):
            await session.append(TWO_TURNS)
            await session.finish()
        return events

    events = run(scenario())
    (failed,) = find(events, Failed)
    assert failed.error is error
    assert len(find(events, Committed)) == 2
    (completed,) = find(events, Completed)
    assert completed.item_id != failed.item_id


def test_a_full_engine_costs_early_text_and_no_turn():
    async def scenario():
        engine = ScriptedEngine()
        async with open_session(engine) as (session, events):
            with contextlib.ExitStack() as others:
                for _ in range(4):
                    others.enter_context(engine.admit(1.0))
                await session.append(TURN)
                await session.finish()
        return engine, events

    engine, events = run(scenario())
    assert len(engine.asked) == 1
    assert len(texts(events)) == 1


def test_how_audio_is_heard_changes_only_between_turns():
    async def scenario():
        async with open_session() as (session, events):
            await session.append(pcm(speechlike(1.0)))
            session.configure(SessionConfig(rate_hz=RATE, prompt="Transcribe."))
            with pytest.raises(InvalidRequestError):
                session.configure(SessionConfig(rate_hz=8_000))
            await session.commit()
            session.configure(SessionConfig(rate_hz=8_000, vad=VadOptions(0.5, 100, 200)))
            await session.append(pcm(speechlike(2.0)[::2]))
            await session.finish()
        return events

    events = run(scenario())
    second = find(events, SpeechStarted)[1]
    assert second.start_ms == pytest.approx(1000, abs=150), "time goes on from the first format"


def test_places_are_bounded_and_draining_waits_for_them():
    async def scenario():
        sessions = OpenSessions(1)
        with sessions.place():
            with pytest.raises(QueueFullError), sessions.place():
                pass
            draining = asyncio.create_task(sessions.drain(60))
            await sessions.closing.wait()
            assert not draining.done()
        await draining
        await sessions.drain(0)

    run(scenario())
