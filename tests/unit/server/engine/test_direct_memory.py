"""Memory that a device fetches clips from: what is pinned, when, and what is let go again."""

import os

import numpy as np
import pytest
import torch

from model.transcription import Transcriber
from server.engine.direct_memory import DirectMemory, cuda_memory
from server.engine.runner import SpeechRunner
from server.engine.shared_samples import SharedSamples
from tests.speech_models import generate_alone, noise

CHUNK = 16_384  # samples


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr("server.engine.direct_memory._CHUNK_BYTES", 4 * CHUNK)


class Pins:
    """Pins that are no more than a list."""

    def __init__(self, *, can=True):
        self.can = can
        self.held = {}
        self.tried = 0
        self.memory = DirectMemory(self.pin, self.unpin)

    def pin(self, address, size):
        self.tried += 1
        if self.can:
            assert address not in self.held
            self.held[address] = size
        return self.can

    def unpin(self, addresses):
        for address in addresses:
            del self.held[address]


def test_a_chunk_is_pinned_when_the_first_clip_lies_there():
    pins, samples = Pins(), np.zeros(3 * CHUNK - 1000, np.float32)
    pins.memory.share(samples)
    pins.memory.share(samples)
    assert not pins.held
    assert pins.memory.holds(samples[10:500])
    assert pins.memory.holds(samples[CHUNK - 500 : CHUNK])
    assert list(pins.held.values()) == [4 * CHUNK]
    assert pins.memory.holds(samples[2 * CHUNK :])
    assert sorted(pins.held.values()) == [4 * (CHUNK - 1000), 4 * CHUNK]
    pins.memory.forget(samples)
    assert not pins.held
    assert not pins.memory.holds(samples[10:500])
    pins.memory.forget(samples)


def test_clips_elsewhere_or_in_two_chunks_or_with_gaps_are_not_fetched():
    pins, samples = Pins(), np.zeros(2 * CHUNK, np.float32)
    other = np.zeros(2 * CHUNK, np.float32)
    pins.memory.share(samples)
    assert not pins.memory.holds(other[:100])
    assert not pins.memory.holds(samples[CHUNK - 1 : CHUNK + 1])
    assert not pins.memory.holds(samples[:100:2])
    assert not pins.held
    pins.memory.share(other)
    assert pins.memory.holds(other[:100])
    pins.memory.holds(samples[:100])
    pins.memory.forget(other)
    assert len(pins.held) == 1
    assert pins.memory.holds(samples[:100])


def test_what_cannot_be_pinned_is_tried_once():
    pins, samples = Pins(can=False), np.zeros(CHUNK, np.float32)
    pins.memory.share(samples)
    assert not pins.memory.holds(samples)
    assert not pins.memory.holds(samples[:10])
    assert pins.tried == 1
    pins.memory.forget(samples)  # and has nothing to let go


def test_clips_say_the_same_fetched_and_copied(tiny_checkpoint):
    tiny, pins = Transcriber.from_pretrained(tiny_checkpoint, device="cpu"), Pins()
    runner = SpeechRunner(tiny, max_slots=3, pads_batches=True, direct_memory=pins.memory)
    shared = SharedSamples.create(CHUNK * 8)
    os.close(shared.file)
    runner.share(shared.memory)
    clips = [noise(seconds, seed) for seed, seconds in enumerate((0.4, 0.9, 0.3))]
    there = [shared.view(shared.put(clip)) for clip in clips]
    for lying in (there, [there[0], clips[1], there[2]]):  # one among them is elsewhere
        runner.start([runner.plan(clip) for clip in lying])
        said = [[] for _ in clips]
        for _ in range(3):
            for row, token in enumerate(runner.step(slice(0, 3))):
                said[row].append(token.id)
        runner.release(range(3))
        assert said == [generate_alone(tiny, clip)[:3] for clip in clips]
    assert pins.held
    runner.forget(shared.memory)
    assert not pins.held


class Runtime:
    """CUDA's, as far as it pins memory."""

    def __init__(self):
        self.status, self.pinned, self.waited = 0, {}, 0

    def cudaHostRegister(self, address, size, flags):  # noqa: N802 - CUDA's name
        if not self.status:
            self.pinned[address] = (size, flags)
        return self.status

    def cudaHostUnregister(self, address):  # noqa: N802 - likewise
        assert self.waited
        return 0 if self.pinned.pop(address, None) else 713

    def wait(self, _device):
        self.waited += 1


def test_the_runtime_is_asked_to_pin_and_waited_for_before_it_lets_go(monkeypatch, caplog):
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", runtime.wait)
    memory = cuda_memory.__wrapped__(torch.device("cpu"))
    samples = np.zeros(2 * CHUNK, np.float32)
    memory.share(samples)
    assert memory.holds(samples[:CHUNK])
    assert list(runtime.pinned.values()) == [(4 * CHUNK, 1)]
    runtime.status = 2  # out of memory
    assert not memory.holds(samples[CHUNK:])
    assert "cannot be pinned" in caplog.text
    memory.forget(samples)
    assert not runtime.pinned
    assert runtime.waited == 1
    memory.forget(samples)  # waits for nothing
    assert runtime.waited == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_fetches_clips_from_shared_memory_and_lets_go_of_it():
    device = torch.device("cuda:0")
    memory, shared = cuda_memory(device), SharedSamples.create(CHUNK * 8)
    os.close(shared.file)
    memory.share(shared.memory)
    there = shared.view(shared.put(noise(0.9)))
    assert memory.holds(there)
    assert torch.from_numpy(there).is_pinned()
    fetched = torch.from_numpy(there).to(device, non_blocking=True)
    np.testing.assert_array_equal(fetched.cpu().numpy(), there)
    assert cuda_memory(device) is memory  # for the next engine, too
    memory.forget(shared.memory)
    assert not torch.from_numpy(there).is_pinned()
    memory.share(shared.memory)
    assert memory.holds(there)
    memory.forget(shared.memory)
    torch.zeros(1, device=device)  # no error was left behind
