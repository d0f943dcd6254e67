"""An engine in another process, here over a socket pair within one."""

import asyncio
import os
import pickle
import socket
import time
from contextlib import asynccontextmanager

import numpy as np
import pytest

from model.transcription import Transcriber
from server.board import Board, Seat
from server.engine.admission import Admission
from server.engine.continuous import ContinuousEngine
from server.engine.decoding import Decoding
from server.engine.interface import NO_GUARDS, EngineRequest
from server.engine.remote import _LENGTH, EngineHost, RemoteEngine, _Channel
from server.engine.runner import SpeechRunner
from server.engine.scheduler import ScheduleLimits
from server.engine.shared_samples import SharedSamples
from server.errors import (
    DeadlineExceededError,
    InferenceFailedError,
    InvalidRequestError,
    NotReadyError,
    QueueFullError,
    ShuttingDownError,
)
from server.metrics import merge_metrics
from tests.faulty_runner import FaultyRunner
from tests.speech_models import generate_alone, noise

pytestmark = pytest.mark.anyio

CLIPS = [noise(seconds, seed) for seed, seconds in enumerate((0.3, 2.9, 1.1, 4.0))]
LONG = noise(30.0, 9)


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint):
    return Transcriber.from_pretrained(tiny_checkpoint, device="cpu")


@pytest.fixture
def runner(tiny):
    return FaultyRunner(SpeechRunner(tiny, max_slots=4))


def request(waveform, **fields):
    return EngineRequest("test", waveform, waveform.size / 16_000, **fields)


class Server:
    """A host, and as many front ends' engines as are asked for."""

    def __init__(self, load, front_ends=2, max_requests=8, room_s=120.0):
        self.board = Board.create(front_ends, 1)
        own = Admission(max_requests=1, max_audio_s=1.0)
        self.engine = ContinuousEngine(
            load, ScheduleLimits(max_batch_size=4), own, guards=NO_GUARDS
        )
        self.host = EngineHost(
            self.engine, self.board, own_metrics=lambda: text_of(100), merge_metrics=merge_metrics
        )
        self.remotes, self.serving = [], []
        for place in range(front_ends):
            ours, theirs = socket.socketpair()
            samples = SharedSamples.create(int(room_s * 16_000))
            theirs_too = SharedSamples(samples.file)
            os.close(samples.file)
            seat = Seat(self.board, place)
            admission = Admission(
                max_requests=max_requests,
                max_audio_s=1000.0,
                requests=seat.tally("requests"),
                audio_s=seat.tally("audio_s"),
            )
            own = text_of(place + 1)
            self.remotes.append(
                RemoteEngine(
                    theirs, self.board, theirs_too, admission, own_metrics=lambda own=own: own
                )
            )
            self.serving.append(asyncio.create_task(self.host.serve(ours, samples)))

    async def start(self):
        async with asyncio.TaskGroup() as group:
            for each in (*self.remotes, self.host):
                group.create_task(each.start())

    async def stop(self):
        for remote in self.remotes:
            await remote.stop()
        await asyncio.gather(*self.serving)
        await self.host.stop()


def text_of(count):
    """Metrics of a process that has counted so much."""
    return f"# TYPE work counter\nwork_total {count}\n".encode()


@asynccontextmanager
async def serving(runner, **options):
    server = Server(lambda: runner, **options)
    await server.start()
    try:
        yield server
    finally:
        runner.gate.set()
        await server.stop()


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - a state of the engine, no event
            await asyncio.sleep(0.001)


async def test_every_front_end_gets_its_own_answers(tiny, runner):
    async with serving(runner) as server:
        asked = [(remote, clip) for clip in CLIPS for remote in server.remotes]
        results = await asyncio.gather(*(each.submit(request(clip)) for each, clip in asked))
        expected = [generate_alone(tiny, clip) for _, clip in asked]
        assert [list(result.token_ids) for result in results] == expected
        for remote in server.remotes:
            assert remote.capabilities == server.engine.capabilities


async def test_pieces_come_before_the_answer(runner):
    async with serving(runner) as server:
        pieces = []
        result = await server.remotes[0].submit(request(CLIPS[3], on_piece=pieces.append))
        assert "".join(piece.text for piece in pieces) == result.text
        assert [p.token.id for p in pieces][: len(result.token_ids)] == list(result.token_ids)

        def refuse(_piece):
            raise RuntimeError("the listener is gone")

        with pytest.raises(RuntimeError, match="the listener is gone"):
            await server.remotes[0].submit(request(CLIPS[3], on_piece=refuse))
        await until(lambda: server.engine.stats().running == 0)


async def test_a_refusal_keeps_its_kind_and_its_reason(runner):
    async with serving(runner) as server:
        with pytest.raises(InvalidRequestError) as refused:
            await server.remotes[0].submit(request(CLIPS[0], prompt="word " * 5000))
        assert refused.value.message
        assert refused.value.param == "prompt"


async def test_who_leaves_frees_a_slot_and_so_does_a_front_end(runner):
    async with serving(runner) as server:
        first, second = server.remotes
        leaving = asyncio.create_task(first.submit(request(LONG)))
        await until(lambda: server.engine.stats().running == 1)
        leaving.cancel()
        await until(lambda: server.engine.stats().running == 0)
        left = asyncio.create_task(first.submit(request(LONG)))
        await until(lambda: server.engine.stats().running == 1)
        first._channel._transport.abort()  # as if its process had died
        await until(lambda: server.engine.stats().running == 0)
        with pytest.raises(InferenceFailedError):
            await left
        assert (await second.submit(request(CLIPS[0]))).token_ids


async def test_the_runner_knows_the_memory_of_each_front_end_as_long_as_it_lives(runner):
    known = {}
    runner.share = lambda samples: known.update({id(samples): samples})  # twice is once
    runner.forget = lambda samples: known.pop(id(samples))
    async with serving(runner) as server:
        await server.remotes[0].submit(request(CLIPS[0]))
        assert len(known) == 2
        server.remotes[0]._channel._transport.abort()
        await until(lambda: len(known) == 1)
        assert (await server.remotes[1].submit(request(CLIPS[0]))).token_ids


async def test_admission_sees_what_others_have_taken_on(runner):
    async with serving(runner, max_requests=3) as server:
        first, second = server.remotes
        with first.admit(1.0), first.admit(1.0), second.admit(2.0) as ticket:
            assert first.stats().admitted == second.stats().admitted == 3
            assert first.stats().admitted_audio_s == 4.0
            for each in (first, second):
                with pytest.raises(QueueFullError), each.admit(1.0):
                    pass
            ticket.give_back()
            with first.admit(1.0):
                pass
        server.board.clear(0)
        assert second.stats().admitted == 0
        await second.drain(1.0)
        with pytest.raises(ShuttingDownError), second.admit(1.0):
            pass
        with first.admit(1.0):  # the other goes on
            pass


async def test_metrics_are_gathered_from_all_and_what_was_counted_stays(runner):
    async with serving(runner) as server:
        for each in server.remotes:
            assert b"work_total 103.0" in await each.metrics()
        server.remotes[0]._channel._transport.abort()
        await server.serving[0]
        assert b"work_total 103.0" in await server.remotes[1].metrics()


async def test_what_is_no_message_ends_the_channel_not_the_engine(runner):
    async with serving(runner) as server:
        first, second = server.remotes
        waiting = asyncio.create_task(first.submit(request(LONG)))
        await until(lambda: server.engine.stats().running == 1)
        first._channel._transport.write(_LENGTH.pack(5) + b"12345")
        with pytest.raises(pickle.UnpicklingError):
            await server.serving[0]
        with pytest.raises(InferenceFailedError):
            await waiting
        assert "has ended" in str(await first.failed())
        assert (await second.submit(request(CLIPS[0]))).token_ids
        await until(lambda: server.engine.stats().running == 0)
        server.serving[0] = asyncio.sleep(0)


async def test_what_cannot_be_sent_ends_the_channel_and_nobody_waits(runner):
    async with serving(runner) as server:
        first, second = server.remotes
        waiting = asyncio.create_task(first.submit(request(LONG)))
        await until(lambda: server.engine.stats().running == 1)
        with pytest.raises(InferenceFailedError):
            await first.submit(request(CLIPS[0], prompt=lambda: "no text"))
        with pytest.raises(InferenceFailedError):
            await waiting
        assert isinstance(await first.failed(), (AttributeError, pickle.PicklingError))
        assert (await second.submit(request(CLIPS[0]))).token_ids


async def test_a_clip_waits_for_room_until_others_are_answered(tiny, runner):
    """Room for two clips, one of which is cancelled half way, and many more that come at once."""
    async with serving(runner, front_ends=1, room_s=7.0) as server:
        (remote,) = server.remotes
        leaving = asyncio.create_task(remote.submit(request(CLIPS[1])))
        asked = [asyncio.create_task(remote.submit(request(clip))) for clip in (LONG[:64_000],)]
        await until(lambda: server.engine.stats().running == 2)
        asked += [asyncio.create_task(remote.submit(request(clip))) for clip in CLIPS * 3]
        await asyncio.sleep(0)
        assert len(remote._lent) < len(asked)
        leaving.cancel()
        expected = [generate_alone(tiny, clip) for clip in (LONG[:64_000], *CLIPS * 3)]
        assert [list((await each).token_ids) for each in asked] == expected
        assert not remote._lent


async def test_who_waits_for_room_hears_of_the_deadline_and_of_the_engines_death(runner):
    async with serving(runner, front_ends=1, room_s=4.1) as server:
        (remote,) = server.remotes
        runner.gate.clear()  # nothing goes on
        first = asyncio.create_task(remote.submit(request(CLIPS[3])))
        await until(lambda: remote._lent)
        late = request(CLIPS[3], deadline_s=time.monotonic() - 10)
        with pytest.raises(DeadlineExceededError):
            await remote.submit(late)
        waiting = asyncio.create_task(remote.submit(request(CLIPS[3])))
        await asyncio.sleep(0)
        server.host.die(RuntimeError("the device is gone"))
        for each in (first, waiting):
            with pytest.raises(InferenceFailedError):
                await each


async def test_who_leaves_before_the_engine_has_heard_of_it_gives_its_place_back(runner):
    async with serving(runner, front_ends=1, room_s=2.0) as server:
        (remote,) = server.remotes
        for _ in range(20):
            leaving = asyncio.create_task(remote.submit(request(CLIPS[2])))
            await asyncio.sleep(0)
            leaving.cancel()
            await asyncio.wait([leaving])
            await until(lambda: not remote._lent)
        assert (await remote.submit(request(CLIPS[2]))).token_ids


async def test_messages_arrive_whole_in_whatever_parts_they_come():
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    receiver, heard = await _Channel.over(theirs), []
    listening = asyncio.create_task(receiver.listen(lambda *message: heard.append(message)))
    rng = np.random.default_rng(0)
    sent = [("submit", key, "x" * size) for key, size in enumerate((0, 1, 700, 0, 30_000))]
    packets = (pickle.dumps(some) for some in (sent[:1], sent[1:2], [], sent[2:4], sent[4:]))
    whole = b"".join(_LENGTH.pack(len(packet)) + packet for packet in packets)
    loop = asyncio.get_running_loop()
    while whole:
        size = int(rng.integers(1, 400))
        await loop.sock_sendall(ours, whole[:size])
        await asyncio.sleep(0)
        whole = whole[size:]
    await until(lambda: len(heard) == len(sent))
    assert heard == sent
    ours.close()
    await listening
    with pytest.raises(ConnectionResetError):
        await receiver.drain()
    await receiver.close()


async def test_what_arrives_before_anybody_listens_is_heard_first():
    ours, theirs = socket.socketpair()
    packets = (pickle.dumps([("submit", key, None)]) for key in range(3))
    for packet in packets:
        ours.sendall(_LENGTH.pack(len(packet)) + packet)
    receiver, heard = await _Channel.over(theirs), []
    await until(lambda: len(receiver._early) == 3)
    listening = asyncio.create_task(receiver.listen(lambda _, key, __: heard.append(key)))
    await until(lambda: len(heard) == 3)
    packet = pickle.dumps([("submit", 3, None)])
    ours.sendall(_LENGTH.pack(len(packet)) + packet)
    await until(lambda: len(heard) == 4)
    assert heard == [0, 1, 2, 3]
    ours.close()
    await listening
    await receiver.close()


async def test_who_cannot_bear_an_early_message_hears_no_other():
    ours, theirs = socket.socketpair()
    packet = pickle.dumps([("submit", key, None) for key in range(3)])
    ours.sendall(_LENGTH.pack(len(packet)) + packet)
    receiver = await _Channel.over(theirs)
    await until(lambda: receiver._early)

    def refuse(_kind, key, _value):
        raise LookupError(key)

    with pytest.raises(LookupError, match="0"):
        await receiver.listen(refuse)
    assert ours.recv(1) == b""  # it is closed
    ours.close()
    await receiver.close()


async def test_without_its_engine_a_front_end_knows_why(runner):
    async with serving(runner) as server:
        asked = asyncio.create_task(server.remotes[0].submit(request(LONG)))
        await until(lambda: server.engine.stats().running == 1)
        server.host.die(RuntimeError("the device is gone"))
        with pytest.raises(InferenceFailedError):
            await asked
        for each in server.remotes:
            assert str(await each.failed()) == "the device is gone"
            assert not each.stats().alive
            with pytest.raises(NotReadyError):
                await each.submit(request(CLIPS[0]))


async def test_a_model_that_cannot_be_loaded_is_told_to_all():
    def load():
        raise ValueError("no such weights")

    server = Server(load)
    results = await asyncio.gather(
        *(each.start() for each in (*server.remotes, server.host)), return_exceptions=True
    )
    assert [str(result) for result in results] == ["no such weights"] * 3
    await server.stop()


async def test_sampling_goes_with_the_request(runner):
    async with serving(runner) as server:
        decoding = Decoding(temperature=1.0, seed=7, logprobs=True)
        clip = request(CLIPS[1], decoding=decoding)
        here = await server.engine.submit(clip)
        there = await server.remotes[0].submit(clip)
        assert there.token_ids == here.token_ids
        assert there.token_bytes == here.token_bytes
        assert b"".join(there.token_bytes).decode(errors="replace").strip() == there.text
        np.testing.assert_allclose(there.logprobs, here.logprobs, rtol=1e-5)
