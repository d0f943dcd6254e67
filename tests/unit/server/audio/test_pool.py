"""Real decoding processes, with real faults."""

import asyncio
import contextlib
import os
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from server.audio.clip import Excerpt, Progress
from server.audio.limits import AudioLimits
from server.audio.pool import DecodePool
from server.audio.probe import probe
from server.errors import AudioTooLongError, DecoderCrashedError, DecodeTimeoutError
from tests.recordings import encode, speechlike, tone, with_short_claim

pytestmark = pytest.mark.anyio

LIMITS = AudioLimits(max_audio_s=120.0)


@pytest.fixture
async def pool():
    pool = DecodePool(1, timeout_s=30.0)
    await pool.start()
    yield pool
    await pool.stop()


async def decode(pool, data, limits=LIMITS, max_excerpt_s=30.0, *, finds_speech=False):
    """Everything that comes out: the excerpts, and the last progress."""
    stream = pool.stream(
        data, limits, max_clip_s=max_excerpt_s, max_excerpt_s=max_excerpt_s,
        finds_speech=finds_speech,
    )  # fmt: skip
    found = [each async for each in stream]
    return [each for each in found if isinstance(each, Excerpt)], found[-1]


async def test_uploads_are_decoded_and_refused_in_other_processes(pool):
    (excerpt,), end = await decode(pool, encode(tone(0.5), form="wav-float"))
    np.testing.assert_array_equal(excerpt.waveform, tone(0.5))
    assert excerpt.waveform.flags.writeable
    assert (excerpt.start, excerpt.speech_start, excerpt.speech_end) == (0, 0, 8000)
    assert end == Progress(0.5, is_long=False, is_done=True)
    with pytest.raises(AudioTooLongError, match="at most 1 s"):
        await decode(pool, encode(tone(2.0)), AudioLimits(max_audio_s=1.0))
    assert os.getpid() not in pool.process_ids


async def test_decoding_leaves_the_processor_to_the_server_where_it_is_scarce(pool):
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert all(os.getpriority(os.PRIO_PROCESS, pid) > own for pid in pool.process_ids)


async def test_speech_is_found_in_other_processes(pool):
    assert await decode(pool, encode(tone(0.5)), finds_speech=True) == (
        [], Progress(0.5, is_long=False, is_done=True),
    )  # fmt: skip
    excerpts, _ = await decode(pool, encode(speechlike(2.0)), finds_speech=True)
    assert len(excerpts) == 1


async def test_a_long_recording_comes_in_pieces(pool):
    waveform = speechlike(10.0)
    excerpts, end = await decode(pool, encode(waveform, form="wav-float"), max_excerpt_s=4.0)
    np.testing.assert_array_equal(np.concatenate([e.waveform for e in excerpts]), waveform)
    assert end == Progress(10.0, is_long=True, is_done=True)


async def test_a_crash_concerns_one_request_and_the_process_is_replaced(pool):
    (process_id,) = pool.process_ids
    os.kill(process_id, signal.SIGSTOP)
    guilty = asyncio.create_task(decode(pool, encode(tone(0.5))))
    await asyncio.sleep(0)
    waiting = asyncio.create_task(decode(pool, encode(tone(0.25))))
    os.kill(process_id, signal.SIGKILL)
    with pytest.raises(DecoderCrashedError):
        await guilty
    _, end = await waiting
    assert end.decoded_s == 0.25
    assert pool.process_ids != [process_id]


async def test_a_hanging_process_is_ended_and_replaced():
    pool = DecodePool(1, timeout_s=0.2)
    await pool.start()
    try:
        (process_id,) = pool.process_ids
        os.kill(process_id, signal.SIGSTOP)
        with pytest.raises(DecodeTimeoutError, match=r"0\.2 s"):
            await decode(pool, encode(tone(0.5)))
        pool._timeout_s = 30.0
        _, end = await decode(pool, encode(tone(0.5)))
        assert end.decoded_s == 0.5
        assert pool.process_ids != [process_id]
    finally:
        await pool.stop()


HOSTILE = """#!{python}
import json, os, sys
upload, samples = map(int, sys.argv[3:])
def tell(message):
    encoded = message if isinstance(message, bytes) else json.dumps(message).encode()
    os.write(1, len(encoded).to_bytes(4, "big") + encoded)
tell({{"ready": True}})
while os.read(0, 1 << 20):
    os.ftruncate(samples, 0)
    for message in {messages}:
        tell(message)
"""


@pytest.mark.parametrize(
    "messages",
    [
        [{"start": 0, "speech": [0, 9], "samples": 9}],  # which are not there
        [{"start": 0, "speech": [0, 9], "samples": 1 << 40}],
        [{"start": 0, "speech": [0, 9], "samples": -1}],
        [{"start": 0, "speech": [0, 9], "samples": "9"}],
        [{"start": 0, "speech": None, "samples": 0}],
        [{"decoded_s": 1.0, "is_short": True}],
        [{"error": "SystemExit", "message": "no error of audio"}],
        [{}],
        [b'{"start": Infinity, "speech": [0, 9], "samples": 0}'],
        [b"[" * 60_000],
        [b"[1, 2]"],
        [b"{"],
    ],
)
async def test_a_process_that_says_something_wrong_costs_one_request(
    tmp_path, monkeypatch, messages
):
    program = tmp_path / "python"
    program.write_text(HOSTILE.format(python=sys.executable, messages=messages))
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    pool = DecodePool(1, timeout_s=30.0)
    await pool.start()
    try:
        for _ in range(2):  # the one in its place is no better
            (process_id,) = pool.process_ids
            with pytest.raises(DecoderCrashedError):
                await decode(pool, encode(tone(0.5)))
            while pool.process_ids in ([process_id], []):  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0.001)
    finally:
        await pool.stop()


async def test_a_large_upload_takes_no_memory_once_it_is_read(pool, monkeypatch):
    (worker,) = pool._workers
    monkeypatch.setattr("server.audio.pool._LEND_AFTER_S", 600.0)  # it stays the only one
    for seconds, is_kept in ((1.0, True), (300.0, False), (2.0, True)):
        waveform = np.zeros(int(seconds * 16_000), np.float32)
        limits = AudioLimits(max_audio_s=400.0)
        excerpts, end = await decode(pool, encode(waveform), limits, max_excerpt_s=30.0)
        assert sum(len(each.waveform) for each in excerpts) == len(waveform)
        assert end.decoded_s == seconds
        assert bool(os.fstat(worker._upload).st_size) is is_kept


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux")
async def test_a_process_can_fill_no_more_than_64_mib_of_a_file(pool):
    (process_id,) = pool.process_ids
    assert resource.prlimit(process_id, resource.RLIMIT_FSIZE) == (64 << 20, 64 << 20)


@pytest.mark.parametrize("turns", range(12))
def test_a_start_that_is_broken_off_leaves_nothing_open(turns):
    async def break_off():
        pool = DecodePool(2, timeout_s=30.0)
        starting = asyncio.create_task(pool.start())
        for _ in range(turns):
            await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        await pool.stop()

    open_before = sorted(Path("/proc/self/fd").iterdir())
    asyncio.run(break_off())
    assert sorted(Path("/proc/self/fd").iterdir()) == open_before


async def test_a_caller_that_leaves_costs_no_process(pool):
    before = pool.process_ids
    leaving = asyncio.create_task(decode(pool, encode(tone(25.0, 44_100), 44_100, "mp3")))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    _, end = await decode(pool, encode(tone(0.5)))
    assert end.decoded_s == 0.5
    assert pool.process_ids == before


async def test_a_reader_who_leaves_a_long_recording_ends_its_process(pool):
    (process_id,) = pool.process_ids
    long = encode(tone(100.0), form="flac")
    async with contextlib.aclosing(
        pool.stream(long, LIMITS, max_clip_s=5.0, max_excerpt_s=5.0)
    ) as stream:
        assert (await anext(stream)).is_long
    _, end = await decode(pool, encode(tone(0.5)))
    assert end.decoded_s == 0.5
    assert pool.process_ids != [process_id]


async def test_a_slow_reader_holds_up_the_decoder_and_nobody_else(pool):
    (process_id,) = pool.process_ids
    long = encode(tone(100.0), form="flac")
    stream = pool.stream(long, LIMITS, max_clip_s=5.0, max_excerpt_s=5.0, finds_speech=False)
    async with contextlib.aclosing(stream):
        assert (await anext(stream)).is_long
        # Only another process can decode this one.
        async with asyncio.timeout(60):
            await decode(pool, encode(tone(0.5)))
        assert process_id in pool.process_ids
        assert len(pool.process_ids) == 2
        read = [each async for each in stream]
    lengths = [len(each.waveform) for each in read if isinstance(each, Excerpt)]
    assert sum(lengths) == 1_600_000
    while len(pool.process_ids) > 1:  # noqa: ASYNC110 - nothing tells of its end
        await asyncio.sleep(0.01)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' /proc")
async def test_an_hour_takes_no_more_memory_than_a_minute(pool):
    (process_id,) = pool.process_ids
    hour = encode(np.zeros(3600 * 16_000, np.int16), form="flac")
    limits = AudioLimits(max_audio_s=3600.0)
    await decode(pool, encode(tone(60.0)), max_excerpt_s=30.0)
    before_kib = peak_kib(process_id)
    stream = pool.stream(hour, limits, max_clip_s=30.0, max_excerpt_s=30.0, finds_speech=False)
    samples = 0
    async with contextlib.aclosing(stream):
        async for each in stream:
            samples += len(each.waveform) if isinstance(each, Excerpt) else 0
            if process_id in pool.process_ids:
                after_kib = peak_kib(process_id)
    assert samples == 3600 * 16_000
    assert after_kib - before_kib < 64 * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' /proc")
@pytest.mark.parametrize("form", ["ogg-opus", "m4a", "webm", "flac", "mp3"])
async def test_a_long_upload_that_claims_a_second_is_refused_when_it_crosses_the_limit(pool, form):
    forged = with_short_claim(encode(np.zeros(300 * 16_000, np.float32), form=form), form)
    assert 0 < probe(forged).duration_s <= 1.0
    (process_id,) = pool.process_ids
    await decode(pool, encode(tone(2.0), form=form))
    before_kib = peak_kib(process_id)
    limits = AudioLimits(max_audio_s=60.0)
    stream = pool.stream(forged, limits, max_clip_s=30.0, max_excerpt_s=15.0, finds_speech=False)
    given = []
    with pytest.raises(AudioTooLongError, match="more than that"):
        await collect(stream, given)
    samples = sum(len(each.waveform) for each in given if isinstance(each, Excerpt))
    assert 30 * 16_000 <= samples <= 60 * 16_000
    if process_id in pool.process_ids:  # else it had to wait for us, and another took its place
        # All of it would be 19 MB.
        assert peak_kib(process_id) - before_kib < 16 * 1024


async def collect(stream, given):
    async for each in stream:
        given.append(each)


def peak_kib(process_id):
    for line in Path(f"/proc/{process_id}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise AssertionError


async def test_stopping_leaves_no_process_behind():
    pool = DecodePool(2, timeout_s=30.0)
    await pool.start()
    process_ids = pool.process_ids
    assert len(process_ids) == 2
    await pool.stop()
    for process_id in process_ids:
        with pytest.raises(ProcessLookupError):
            os.kill(process_id, 0)
