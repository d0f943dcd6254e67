"""Excerpts through an engine that answers when a test tells it to."""

import asyncio
import collections
import time
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.audio.clip import Excerpt, Progress
from server.engine.admission import Admission
from server.engine.decoding import Token
from server.engine.interface import EngineRequest, EngineResult, Piece
from server.errors import (
    AudioTooLongError,
    DeadlineExceededError,
    InferenceFailedError,
    QueueFullError,
)
from server.longform import Deadline, LongRecordings, RecordingTranscriber, TextInOrder

pytestmark = pytest.mark.anyio

EXCERPT_S = 10


class ScriptedEngine:
    """Says of a clip what its first sample is."""

    def __init__(self):
        self.requests = []
        self.running = self.most_running = self.cancelled = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.fails_on = self.loops_on = None

    async def submit(self, request):
        self.requests.append(request)
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            await self.may_answer.wait()
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        number = int(request.waveform[0])
        if number == self.fails_on:
            raise InferenceFailedError("the model failed on this audio")
        text = f"word{number}"
        if request.on_piece is not None:
            for part in (text[:2], text[2:]):
                request.on_piece(Piece(part, Token(5), None))
        ending = "loop" if number == self.loops_on else "stop"
        return EngineResult(text, "en", ending, (5,), 0.0, 0.0, 0.0, 0.0, 0.0, 1)


class Decoding:
    """Gives excerpts, and counts how many were asked for."""

    def __init__(self, n_excerpts, error=None):
        self.n_excerpts, self.error = n_excerpts, error
        self.given = 0
        self.is_closed = False

    async def stream(self):
        try:
            yield Progress(EXCERPT_S, is_long=self.n_excerpts > 1)
            for index in range(self.n_excerpts):
                self.given += 1
                start = index * EXCERPT_S * 16_000
                waveform = np.full(EXCERPT_S * 16_000, index, np.float32)
                yield Excerpt(waveform, start, start, start + len(waveform))
                yield Progress(EXCERPT_S * (index + 1), is_long=self.n_excerpts > 1)
            if self.error is not None:
                await settle()
                raise self.error
        finally:
            self.is_closed = True


class Bench:
    def __init__(
        self, *, in_flight=3, places=2, timeout_s=60.0, latest_s=None, previous_text="", **options
    ):
        self.engine = ScriptedEngine()
        self.admission = Admission(max_requests=100, max_audio_s=1000.0)
        self.ticket = self.admission.take(120.0)
        self.long_recordings = LongRecordings(places)
        now_s = time.monotonic()
        self.deadline = Deadline(now_s + timeout_s, None if latest_s is None else now_s + latest_s)
        self.transcriber = RecordingTranscriber(
            self.engine,
            EngineRequest("job", np.zeros(0, np.float32), 0.0, previous_text=previous_text),
            self.deadline,
            in_flight=in_flight,
            ticket=self.ticket,
            long_recordings=self.long_recordings,
            **options,
        )

    async def run(self, decoding):
        return await self.transcriber.run(decoding.stream())


async def settle():
    for _ in range(50):
        await asyncio.sleep(0)


async def test_parts_come_in_the_order_of_the_recording():
    bench = Bench()
    recording = await bench.run(Decoding(12))
    assert [part.result.text for part in recording.parts] == [f"word{i}" for i in range(12)]
    assert [part.start for part in recording.parts] == [i * 160_000 for i in range(12)]
    assert recording.duration_s == 120.0
    assert [request.id for request in bench.engine.requests[:2]] == ["job", "job/1"]


async def test_no_more_audio_is_held_than_is_in_flight():
    alive = weakref.WeakSet()
    most_alive = 0

    class Waveform(np.ndarray):
        """An array that a set can hold."""

        __hash__ = object.__hash__

    async def stream():
        nonlocal most_alive
        for index in range(30):
            waveform = np.full(16_000, index, np.float32).view(Waveform)
            alive.add(waveform)
            most_alive = max(most_alive, len(alive))
            yield Excerpt(waveform, index * 16_000, index * 16_000, (index + 1) * 16_000)
            del waveform

    bench = Bench(in_flight=3)
    bench.engine.requests = collections.deque(maxlen=1)
    recording = await bench.transcriber.run(stream())
    assert len(recording.parts) == 30
    # Those in flight, the one that is waited for, and what the engine of this test remembers.
    assert most_alive <= 3 + 2 + 1


async def test_only_so_many_excerpts_are_in_flight_and_the_decoder_waits():
    bench, decoding = Bench(in_flight=3), Decoding(20)
    bench.engine.may_answer.clear()
    work = asyncio.create_task(bench.run(decoding))
    await settle()
    assert bench.engine.running == 3
    assert decoding.given == 4
    assert (bench.admission.requests, bench.admission.audio_s) == (3, 3 * EXCERPT_S)
    bench.engine.may_answer.set()
    await work
    assert bench.engine.most_running == 3
    assert (bench.admission.requests, bench.admission.audio_s) == (1, 0.0)


async def test_a_cancelled_recording_cancels_all_its_excerpts_and_its_decoding():
    bench, decoding = Bench(in_flight=3), Decoding(20)
    bench.engine.may_answer.clear()
    work = asyncio.create_task(bench.run(decoding))
    await settle()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert (bench.engine.cancelled, bench.engine.running) == (3, 0)
    assert decoding.is_closed
    with bench.long_recordings.place(), bench.long_recordings.place():
        pass


async def test_an_excerpt_that_fails_fails_the_recording_and_ends_the_rest():
    bench, decoding = Bench(), Decoding(20)
    bench.engine.fails_on = 4
    with pytest.raises(InferenceFailedError):
        await bench.run(decoding)
    assert bench.engine.running == 0
    assert decoding.is_closed
    assert decoding.given < 12


async def test_audio_that_turns_out_bad_ends_what_runs():
    bench = Bench()
    bench.engine.may_answer.clear()
    with pytest.raises(AudioTooLongError):
        await bench.run(Decoding(2, AudioTooLongError("too long")))
    assert bench.engine.cancelled == 2


async def test_long_recordings_are_bounded_and_short_ones_are_not():
    bench = Bench(places=1)
    with bench.long_recordings.place():
        with pytest.raises(QueueFullError, match="1 long") as caught:
            await bench.run(Decoding(2))
        assert caught.value.retry_after_s > 0
        assert not bench.engine.requests
        assert len((await Bench(places=1).run(Decoding(1))).parts) == 1
        short = Bench()
        short.transcriber._long_recordings = bench.long_recordings
        assert len((await short.run(Decoding(1))).parts) == 1


async def test_later_excerpts_have_later_deadlines_unless_the_client_says_otherwise():
    bench = Bench(timeout_s=60.0)
    await bench.run(Decoding(3))
    begin_s = bench.deadline.begin_s
    deadlines_s = [request.deadline_s for request in bench.engine.requests]
    assert deadlines_s == pytest.approx([begin_s, begin_s + 10, begin_s + 20])
    bench = Bench(timeout_s=60.0, latest_s=65.0)
    await bench.run(Decoding(3))
    begin_s = bench.deadline.begin_s
    deadlines_s = [request.deadline_s for request in bench.engine.requests]
    assert deadlines_s == pytest.approx([begin_s, begin_s + 5, begin_s + 5])


async def test_a_decoder_that_gives_nothing_until_the_deadline_is_given_up():
    async def stuck():
        await asyncio.Event().wait()
        yield Progress(0.0, is_long=False)

    with pytest.raises(DeadlineExceededError):
        await Bench(timeout_s=0.01).transcriber.run(stuck())


async def test_a_conditioned_excerpt_waits_for_the_text_of_the_one_before():
    bench = Bench(conditioned=True)
    bench.engine.loops_on = 2
    recording = await bench.run(Decoding(5))
    assert bench.engine.most_running == 1
    assert [part.result.text for part in recording.parts] == [f"word{i}" for i in range(5)]
    given = [request.previous_text for request in bench.engine.requests]
    # A text that looped is no example to follow.
    assert given == ["", "word0", "word1", "", "word3"]


async def test_unconditioned_excerpts_have_no_text_before_them():
    bench = Bench()
    await bench.run(Decoding(3))
    assert {request.previous_text for request in bench.engine.requests} == {""}


async def test_what_was_said_before_a_recording_stands_before_its_first_excerpt():
    for conditioned in (False, True):
        bench = Bench(conditioned=conditioned, previous_text="earlier")
        await bench.run(Decoding(2))
        given = [request.previous_text for request in bench.engine.requests]
        assert given == ["earlier", "word0" if conditioned else ""]


async def test_a_long_recording_tells_how_far_it_is_done():
    told = []
    await Bench(on_advance=told.append).run(Decoding(5))
    processed_s = [each.processed_s for each in told]
    assert processed_s == sorted(set(processed_s))
    assert processed_s[-1] == 50.0
    claimed = []
    await Bench(on_advance=claimed.append, claimed_s=51.0).run(Decoding(5))
    assert {each.total_s for each in claimed} == {51.0}


async def test_a_short_recording_tells_nothing_on_the_way():
    told = []
    await Bench(on_advance=told.append).run(Decoding(1))
    assert told == []


async def test_nothing_said_is_no_part():
    recording = await Bench().run(Decoding(0))
    assert (recording.parts, recording.duration_s) == ([], EXCERPT_S)


async def test_text_is_told_in_order_and_makes_up_the_whole():
    told = []
    bench = Bench(on_text=told.append)
    await bench.run(Decoding(9))
    assert "".join(told) == " ".join(f"word{i}" for i in range(9))


@given(st.lists(st.lists(st.sampled_from(["a", "b c", ""]), max_size=3), max_size=6), st.randoms())
def test_pieces_that_come_in_any_order_are_told_in_the_recordings(texts, random):
    told = []
    in_order = TextInOrder(told.append)
    steps = [(index, n) for index, pieces in enumerate(texts) for n in range(len(pieces) + 1)]
    waiting = {index: list(pieces) for index, pieces in enumerate(texts)}
    order = [index for index, _ in steps]
    random.shuffle(order)
    for index in order:
        if waiting[index]:
            in_order.push(index, Piece(waiting[index].pop(0), Token(5), None))
        else:
            in_order.end(index)
    joined = ["".join(pieces) for pieces in texts]
    assert "".join(told) == " ".join(text for text in joined if text)
