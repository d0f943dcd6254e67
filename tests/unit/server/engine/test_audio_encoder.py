"""Recorded shapes on the CPU, where a recording is the function itself."""

import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.transcription import Transcriber
from server.engine import audio_encoder
from server.engine.audio_encoder import AudioEncoder, RecordedAudioEncoder
from server.engine.recordings import CudaGraphs
from server.engine.runner import SpeechRunner
from tests.speech_models import noise

MODES = ("trimmed", "padded")


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint):
    return Transcriber.from_pretrained(tiny_checkpoint, device="cpu")


@pytest.fixture
def encoders(tiny, monkeypatch):
    """Makes the two of a mode, and lists the shapes that are recorded."""

    def make(mode, record=lambda run: run):
        monkeypatch.setattr(tiny.model.config, "encoder_mode", mode)
        monkeypatch.setattr(tiny.processor, "encoder_mode", mode)
        parts = tiny.model, tiny.processor
        return AudioEncoder(*parts), RecordedAudioEncoder(*parts, record, most_clips=8)

    return make


def assert_same(anew, recorded, clips):
    with torch.inference_mode():
        expected, expected_lens = anew(clips)
        frames, lens = recorded(clips)
    assert lens.tolist() == expected_lens.tolist()
    assert frames.shape == expected.shape
    for row, expected_row, length in zip(frames, expected, lens.tolist(), strict=True):
        torch.testing.assert_close(row[:length], expected_row[:length], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_recorded_batches_are_encoded_as_they_are_anew(mode, encoders):
    """One after another, so that what a batch leaves behind would be heard in the next."""
    anew, recorded = encoders(mode)
    sizes = st.lists(st.integers(1, 60_000), min_size=1, max_size=5)

    @settings(max_examples=8 if mode == "padded" else 25, deadline=None)
    @given(st.lists(sizes, min_size=1, max_size=3))
    def check(batches):
        for batch in batches:
            clips = [noise(size / 16_000, seed)[:size] for seed, size in enumerate(batch)]
            assert_same(anew, recorded, clips)

    check()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seconds", [2.0, 2.01, 29.99, 30.0])
def test_clips_as_long_as_a_recording_and_the_window(mode, seconds, encoders):
    assert_same(*encoders(mode), [noise(seconds, 1), noise(0.5, 2)])


def test_a_clip_that_is_too_long_is_refused(encoders):
    for encoder in encoders("trimmed"):
        with pytest.raises(ValueError, match="longer than the encoder's 30 s window"):
            encoder([noise(30.5, 1)])


def test_after_warming_up_nothing_is_recorded_and_large_batches_run_anew(encoders, monkeypatch):
    monkeypatch.setattr(audio_encoder, "_MOST_FRAMES", 1_600)
    shapes = []

    def record(run):
        shapes.append(tuple(run().shape[:2]))
        return run

    anew, recorded = encoders("trimmed", record)
    with torch.inference_mode():
        recorded.warm_up()
    # Encoder frames, half as many as of mel.
    assert shapes[0] in {(1, 800), (2, 400), (4, 200), (8, 100)}  # the largest first
    most_rows = {800: 1, 600: 1, 400: 2, 300: 2, 200: 4, 150: 4, 100: 8}
    assert set(shapes) == {
        (rows, length)
        for length, most in most_rows.items()
        for rows in (1, 2, 3, 4, 6, 8)
        if rows <= most
    }
    assert len(shapes) == len(set(shapes))
    for lengths in ((1.0,), (3.0, 1.0), (7.9, 0.2), (1.0,) * 8, (3.0,) * 5, (1.0,) * 9, (20.0,)):
        clips = [noise(seconds, seed) for seed, seconds in enumerate(lengths)]
        assert_same(anew, recorded, clips)
    assert len(shapes) == len(set(shapes)) == 20


def test_a_large_encoder_is_recorded_for_small_batches_only(encoders, tiny, monkeypatch):
    parameters = sum(each.numel() for each in tiny.model.encoder.parameters())
    monkeypatch.setattr(audio_encoder, "_MOST_FLOPS", parameters * 400.0)
    shapes = []

    def record(run):
        shapes.append(tuple(run().shape[:2]))
        return run

    anew, recorded = encoders("trimmed", record)
    assert_same(anew, recorded, [noise(1.0, 1), noise(2.0, 2)])
    assert_same(anew, recorded, [noise(1.0, 1), noise(1.0, 2), noise(1.0, 3)])
    assert_same(anew, recorded, [noise(5.0, 1)])
    assert shapes == [(2, 100)]


def test_what_cannot_be_recorded_runs_anew(encoders, caplog):
    def record(_run):
        raise RuntimeError("no graph of this")

    anew, recorded = encoders("trimmed", record)
    for seconds in (1.0, 3.0):
        assert_same(anew, recorded, [noise(seconds, 1)])
    assert [each.message for each in caplog.records] == [
        "the encoder could not be recorded, and runs unrecorded from now on"
    ]


def test_an_encoder_that_is_gone_keeps_no_memory(encoders):
    _, recorded = encoders("trimmed")
    with torch.inference_mode():
        recorded([np.zeros(16_000, np.float32)])
    gone = weakref.ref(recorded)
    gc.collect()
    gc.disable()
    try:
        del recorded
        assert gone() is None
    finally:
        gc.enable()


def test_what_a_poisoned_clip_leaves_behind_is_not_heard_in_the_next(encoders):
    anew, recorded = encoders("trimmed")
    with torch.inference_mode():
        recorded._encode(torch.full((1, 80, 400), torch.nan), torch.tensor([400]))
    assert_same(anew, recorded, [noise(2.5, 1)])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", MODES)
def test_graphs_on_cuda_say_what_the_encoder_says_whatever_ran_between(tiny_checkpoint, mode):
    transcriber = Transcriber.from_pretrained(tiny_checkpoint, device="cuda", dtype="fp32")
    transcriber.model.config.encoder_mode = transcriber.processor.encoder_mode = mode
    runner = SpeechRunner(transcriber, max_slots=4, record=CudaGraphs())
    runner.warm_up()
    anew = AudioEncoder(transcriber.model, transcriber.processor)
    for seed, seconds in enumerate((0.3, 2.9, 1.1, 4.0)):
        clips = [noise(seconds, seed), noise(0.5 * seconds, seed + 9)]
        assert_same(anew, runner._encode, clips)
        runner.start([runner.plan(clips[0])])
        runner.step(slice(0, seed + 1))
