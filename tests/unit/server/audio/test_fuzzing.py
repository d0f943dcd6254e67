"""Damaged files of every format: nothing but an answer or a refusal comes out, and soon."""

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.audio.clip import Excerpt, Progress
from server.audio.limits import AudioLimits
from server.audio.pool import DecodePool
from server.audio.probe import probe
from server.errors import AudioError, DecoderCrashedError, DecodeTimeoutError
from tests.mutations import damaged
from tests.recordings import FORMATS, encode, speechlike

FILES = {
    form: encode(np.tile(speechlike(0.4), 3 if form == "webm" else 1), form=form)
    for form in FORMATS
}
LIMITS = AudioLimits(max_audio_s=5.0)
TIMEOUT_S = 20.0
_MEMORY_KIB = 1 << 20  # resident; the worker's own limit is on address space


@settings(max_examples=400)
@given(damaged(list(FILES.values())))
def test_the_probe_refuses_damaged_headers_or_makes_finite_claims(data):
    began_s = time.perf_counter()
    try:
        found = probe(data)
    except AudioError:
        return
    finally:
        assert time.perf_counter() - began_s < 5
    assert found.duration_s is None or 0 <= found.duration_s < float("inf")
    assert found.sample_rate_hz is None or found.sample_rate_hz >= 0
    assert found.channels is None or found.channels >= 0


class Decoders:
    """A pool of real processes on a loop of its own, for tests that hypothesis drives."""

    def __init__(self):
        self.runner = asyncio.Runner()
        self.pool = DecodePool(1, TIMEOUT_S)
        self.runner.run(self.pool.start())

    def decode(self, data):
        return self.runner.run(self._decode(data))

    async def _decode(self, data):
        stream = self.pool.stream(data, LIMITS, max_clip_s=1.0, max_excerpt_s=1.0)
        return [each async for each in stream]

    def peak_kib(self):
        status = [Path(f"/proc/{pid}/status") for pid in self.pool.process_ids]
        lines = [line for each in status if each.exists() for line in each.read_text().splitlines()]
        return max((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), default=0)

    def stop(self):
        self.runner.run(self.pool.stop())
        self.runner.close()


@pytest.fixture(scope="module")
def decoders():
    decoders = Decoders()
    yield decoders
    decoders.stop()


@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_decoders_survive_damaged_files_or_are_replaced(decoders, form, data):
    damaged_file = data.draw(damaged([FILES[form], *FILES.values()]))
    began_s = time.monotonic()
    try:
        found = decoders.decode(damaged_file)
    except (AudioError, DecoderCrashedError, DecodeTimeoutError):
        found = []
    assert time.monotonic() - began_s < TIMEOUT_S + 10
    for each in found:
        if isinstance(each, Excerpt):
            assert np.isfinite(each.waveform).all()
            assert 0 < len(each.waveform) <= 16_000
            assert each.start + len(each.waveform) <= LIMITS.max_audio_s * 16_000 + 1
    assert decoders.peak_kib() < _MEMORY_KIB


@pytest.mark.parametrize("form", FORMATS)
def test_a_good_file_is_decoded_after_all_that(decoders, form):
    found = decoders.decode(FILES[form])
    assert isinstance(found[-1], Progress)
    assert found[-1].is_done
