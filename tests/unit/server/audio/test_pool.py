"""Real decoding processes, with real faults."""

import asyncio
import os
import signal

import numpy as np
import pytest

from server.audio.limits import AudioLimits
from server.audio.pool import DecodePool
from server.errors import AudioTooLongError, DecoderCrashedError, DecodeTimeoutError
from tests.recordings import encode, tone

pytestmark = pytest.mark.anyio

LIMITS = AudioLimits(max_audio_s=30.0)


@pytest.fixture
async def pool():
    pool = DecodePool(1, timeout_s=30.0)
    await pool.start()
    yield pool
    await pool.stop()


async def test_uploads_are_decoded_and_refused_in_other_processes(pool):
    clip = await pool.decode(encode(tone(0.5), form="wav-float"), LIMITS)
    np.testing.assert_array_equal(clip.waveform, tone(0.5))
    assert clip.waveform.flags.writeable
    with pytest.raises(AudioTooLongError, match="at most 1 s"):
        await pool.decode(encode(tone(2.0)), AudioLimits(max_audio_s=1.0))
    assert os.getpid() not in pool.process_ids


async def test_a_crash_concerns_one_request_and_the_process_is_replaced(pool):
    (process_id,) = pool.process_ids
    os.kill(process_id, signal.SIGSTOP)
    guilty = asyncio.create_task(pool.decode(encode(tone(0.5)), LIMITS))
    await asyncio.sleep(0)
    waiting = asyncio.create_task(pool.decode(encode(tone(0.25)), LIMITS))
    os.kill(process_id, signal.SIGKILL)
    with pytest.raises(DecoderCrashedError):
        await guilty
    assert (await waiting).duration_s == 0.25
    assert pool.process_ids != [process_id]


async def test_a_hanging_process_is_ended_and_replaced():
    pool = DecodePool(1, timeout_s=0.2)
    await pool.start()
    try:
        (process_id,) = pool.process_ids
        os.kill(process_id, signal.SIGSTOP)
        with pytest.raises(DecodeTimeoutError, match=r"0\.2 s"):
            await pool.decode(encode(tone(0.5)), LIMITS)
        pool._timeout_s = 30.0
        assert (await pool.decode(encode(tone(0.5)), LIMITS)).duration_s == 0.5
        assert pool.process_ids != [process_id]
    finally:
        await pool.stop()


async def test_a_caller_that_leaves_costs_no_process(pool):
    before = pool.process_ids
    long = encode(tone(25.0, 44_100), 44_100, "mp3")
    leaving = asyncio.create_task(pool.decode(long, LIMITS))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert (await pool.decode(encode(tone(0.5)), LIMITS)).duration_s == 0.5
    assert pool.process_ids == before


async def test_stopping_leaves_no_process_behind():
    pool = DecodePool(2, timeout_s=30.0)
    await pool.start()
    process_ids = pool.process_ids
    assert len(process_ids) == 2
    await pool.stop()
    for process_id in process_ids:
        with pytest.raises(ProcessLookupError):
            os.kill(process_id, 0)
