"""Fixed shapes and padding rows on the CPU, where a recording is the function itself."""

import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.transcription import Transcriber
from server.engine.core import EngineCore
from server.engine.decode_step import RecordedStep
from server.engine.interface import NO_GUARDS, EngineRequest
from server.engine.kv_slots import KVSlots, LayerShape, SlotPlan
from server.engine.recordings import bucket, buckets
from server.engine.runner import SpeechRunner
from server.engine.scheduler import ScheduleLimits
from tests.speech_models import generate_alone, noise

CLIPS = [noise(seconds, seed) for seed, seconds in enumerate((0.3, 2.9, 1.1, 4.0, 0.7, 9.0))]


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint):
    return Transcriber.from_pretrained(tiny_checkpoint, device="cpu")


@given(st.integers(1, 300), st.sampled_from([1, 128]), st.integers(1, 300))
def test_a_bucket_holds_the_count_and_no_more_than_there_is(count, smallest, largest):
    if count <= largest:
        size = bucket(count, smallest, largest)
        assert count <= size <= largest
        assert size <= max(1.5 * count, smallest)
        assert size in buckets(smallest, largest)


def transcribe(tiny, record):
    """Answers of an engine where a clip arrives at every iteration."""
    runner = SpeechRunner(tiny, max_slots=7, record=record)
    core = EngineCore(runner, ScheduleLimits(7), guards=NO_GUARDS)
    answers, arriving = {}, list(enumerate(CLIPS))
    while arriving or core.idle_s() is not None:
        if arriving:
            key, clip = arriving.pop(0)
            core.submit(key, EngineRequest(str(key), clip, clip.size / 16_000), 0.0)
        answers |= dict(core.iterate().answers)
    return [list(answers[key].token_ids) for key in range(len(CLIPS))]


def test_steps_of_recorded_shapes_say_what_generate_says(tiny):
    shapes = []

    def record(run):
        output = run()  # once more than it counts, as warming up does
        if isinstance(output, tuple):  # a step's, not the encoder's
            shapes.append(len(output[0]))
        return run

    expected = [generate_alone(tiny, clip) for clip in CLIPS]
    assert transcribe(tiny, record) == expected
    assert set(shapes) <= {1, 2, 3, 4, 6, 7}  # five take six slots
    assert len(shapes) > 1


def test_a_step_of_some_rows_leaves_the_others_alone(tiny):
    """As after a failed step, which is tried again in halves."""
    runner = SpeechRunner(tiny, max_slots=8, record=lambda run: run)
    runner.start([runner.plan(clip) for clip in CLIPS])
    runner.step(slice(0, 6))
    layers = runner._slots.layers
    before = [layer.keys[3:].clone() for layer in layers]
    runner.step(slice(0, 3))
    assert all(torch.equal(a, b.keys[3:]) for a, b in zip(before, layers, strict=True))


def test_warming_up_records_every_shape(tiny):
    shapes = []

    def record(run):
        output = run()
        if isinstance(output, tuple):  # a step's, not the encoder's
            shapes.append(len(output[0]))
        return run

    runner = SpeechRunner(tiny, max_slots=7, record=record)
    runner.warm_up()
    n_lengths = len(buckets(128, runner._slots.plan.slot_tokens))
    assert sorted(shapes) == sorted([1, 2, 3, 4, 6, 7] * n_lengths)
    recorded = len(shapes)
    rows = runner.start([runner.plan(clip) for clip in CLIPS[:5]]) and slice(0, 5)
    for _ in range(20):
        runner.step(rows)
    assert len(shapes) == recorded


def test_a_runner_that_is_gone_keeps_no_memory(tiny):
    runner = SpeechRunner(tiny, max_slots=2, record=lambda run: run)
    runner.warm_up()
    slots = weakref.ref(runner._slots)
    gc.collect()
    gc.disable()
    try:
        del runner
        assert slots() is None
    finally:
        gc.enable()


def test_prompts_are_filled_up_with_tokens_that_go_to_no_slot():
    """So prompts for the last slots are recorded, too, and write into nobody's."""
    plan = SlotPlan(5, 300, (LayerShape(1, 4, 4),), torch.float32)
    slots, seen = KVSlots(plan, "cpu"), []

    class Spy:
        is_recordable = reads_own_lengths = True

        def prefill_packed(self, prompts, _slots):
            seen.append((prompts.slots.tolist(), prompts.embeds[:, 0].tolist()))

    steps = RecordedStep(torch.nn.Embedding(3, 8), Spy(), slots, lambda run: run)

    def start(*lens):
        slots.begin_prefill(len(lens))
        embeds = torch.arange(1.0, len(lens) + 1)[:, None, None].expand(-1, max(lens), 8)
        steps.prefill(embeds, torch.zeros(embeds.shape[:2], dtype=torch.int64), lens)
        slots.join(lens)

    start(10)
    start(70)
    start(60, 3, 3)
    taken, embeds = zip(*seen, strict=True)
    assert taken == (
        [0] * 10 + [5] * 54,
        [1] * 70 + [5] * 26,
        [2] * 60 + [3] * 3 + [4] * 3 + [5] * 30,
    )
    assert embeds[-1][:66] == [1] * 60 + [2] * 3 + [3] * 3


def test_where_nothing_can_be_recorded_steps_run_as_they_are(tiny, caplog):
    def record(_run):
        raise RuntimeError("no graph")

    assert transcribe(tiny, record) == [generate_alone(tiny, clip) for clip in CLIPS]
    whats = [each.args[0] for each in caplog.records]
    assert whats == ["the encoder", "what the LLM does"]
