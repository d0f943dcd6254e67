"""The kernels against the LLM's own forward; without a CUDA device, Triton interprets them."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from model.transcription import Transcriber
from server.engine.core import EngineCore
from server.engine.decoder_pass import LlamaPass, ModelPass, choose_pass
from server.engine.interface import NO_GUARDS, EngineRequest
from server.engine.kv_slots import KVSlots, layer_shapes, plan_slots
from server.engine.recordings import CudaGraphs
from server.engine.runner import SpeechRunner
from server.engine.scheduler import ScheduleLimits
from tests.conftest import make_tiny_checkpoint
from tests.speech_models import generate_alone, noise

pytest.importorskip("triton")

from server.engine import fused_pass, packed_linear
from server.engine.fused_pass import FusedPass, can_fuse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_SIZES = {
    "vocab_size": 320, "hidden_size": 96, "intermediate_size": 72, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 1024, "initializer_range": 0.2, "bos_token_id": None,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLMS = {
    "qwen2": Qwen2Config(**_SIZES, tie_word_embeddings=True),
    "llama, one key head for each query": LlamaConfig(**{**_SIZES, "num_key_value_heads": 6}),
    "llama, scaled positions": LlamaConfig(
        **_SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    ),
    "mistral, a sliding window": MistralConfig(**_SIZES, sliding_window=12),
}
PROMPT_LENS = (7, 33, 20)  # one token more than blocks hold, too


@pytest.fixture(autouse=True, scope="module")
def plain_weights():
    """As they lie on a CUDA device, for which the kernels are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_linear, "_MOST_TURNED_BYTES", 0)
        yield


def make_llm(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LLMS[name]).eval().to(DEVICE)


@torch.inference_mode()
def run(llm, decoder_pass, rows, steps=2):
    """Keys, values and logits of prompts that start behind others, and of some steps."""
    plan = plan_slots(
        layer_shapes(llm), llm.dtype, slot_tokens=64, max_slots=rows, budget_bytes=1e9
    )
    slots = KVSlots(plan, DEVICE)
    generator = torch.Generator().manual_seed(1)
    lens = [PROMPT_LENS[row % len(PROMPT_LENS)] for row in range(rows)]
    shape = (rows, max(lens), llm.config.hidden_size)
    prompts = torch.randn(shape, generator=generator).to(DEVICE)
    positions = torch.arange(shape[1], device=DEVICE).expand(shape[:2])
    for first, last in ((0, 1), (1, rows)) if rows > 1 else ((0, 1),):
        slots.begin_prefill(last - first, after=first)
        decoder_pass.prefill(prompts[first:last], positions[first:last], slots, lens[first:last])
    slots.join(lens)
    cached = [
        torch.stack((layer.keys, layer.values))[:, row, :, :length]
        for layer in slots.layers
        for row, length in enumerate(lens)
    ]
    logits = []
    for _ in range(steps):
        embeds = torch.randn((rows, 1, shape[2]), generator=generator).to(DEVICE)
        columns = torch.tensor(slots.lens, device=DEVICE)
        slots.begin_decode(slice(0, rows), columns)
        # Positions that do not follow from the column, as of audio beside its text.
        logits.append(decoder_pass(embeds, (columns - 2)[:, None], slots).clone())
        slots.advance(slice(0, rows))
    return cached, torch.stack(logits)


@pytest.mark.parametrize(
    ("name", "rows"), [*((name, rows) for name in LLMS for rows in (1, 3)), ("qwen2", 2)]
)
def test_the_kernels_give_what_the_llm_gives(name, rows, monkeypatch):
    monkeypatch.setattr(fused_pass, "_ATTENDED_BLOCK", 16)  # so that a row takes several
    llm = make_llm(name)
    expected_cached, expected = run(llm, ModelPass(llm), rows)
    cached, logits = run(llm, FusedPass(llm), rows)
    for ours, theirs in zip(cached, expected_cached, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_logits", [1, 7, 16, 65, 200])
def test_the_likeliest_token_is_the_first_of_the_largest(n_logits, dtype, monkeypatch):
    monkeypatch.setattr(fused_pass, "_LOGIT_BLOCK", 16)
    monkeypatch.setattr(fused_pass, "_LOGIT_PARTS", 4)  # of which some have nothing to look at
    decoder_pass = FusedPass(make_llm("qwen2"))
    generator = torch.Generator().manual_seed(n_logits)
    logits = torch.randint(-3, 3, (40, n_logits), generator=generator).to(dtype).to(DEVICE)
    largest, ids = decoder_pass.likeliest(logits)
    assert largest.equal(logits.amax(-1).double())
    is_largest = logits == logits.amax(-1, keepdim=True)
    assert ids.equal(is_largest.double().argmax(-1).double())


def test_a_logit_that_is_not_finite_is_told(monkeypatch):
    monkeypatch.setattr(fused_pass, "_LOGIT_BLOCK", 16)
    monkeypatch.setattr(fused_pass, "_LOGIT_PARTS", 4)
    decoder_pass = FusedPass(make_llm("qwen2"))
    logits = torch.zeros(3, 70, device=DEVICE)
    logits[0, 69], logits[1, 3], logits[2] = float("nan"), float("inf"), float("-inf")
    assert not decoder_pass.likeliest(logits)[0].isfinite().any()


@pytest.fixture(scope="module")
def transcriber(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fused") / "checkpoint"
    make_tiny_checkpoint(folder, llm_config=LLMS["qwen2"])
    return Transcriber.from_pretrained(folder, device=DEVICE, dtype="fp32")


@pytest.mark.parametrize("is_recorded", [False, True])
def test_an_engine_of_kernels_says_what_generate_says(transcriber, is_recorded):
    """Recorded, if not as CUDA graphs, as functions that read their inputs where those do."""
    record = None
    if is_recorded:
        record = CudaGraphs() if DEVICE == "cuda" else lambda run: run
    runner = SpeechRunner(
        transcriber, max_slots=5, pads_batches=True, make_pass=FusedPass, record=record
    )
    core = EngineCore(runner, ScheduleLimits(5), guards=NO_GUARDS)
    clips = [noise(seconds, seed) for seed, seconds in enumerate((0.3, 1.9, 0.6, 1.1))]
    arriving, answers = [*enumerate(clips)], {}
    while arriving or core.idle_s() is not None:
        for key, clip in arriving[:2]:
            core.submit(key, EngineRequest(str(key), clip, clip.size / 16_000), 0.0)
        del arriving[:2]
        answers |= dict(core.iterate().answers)
    expected = [generate_alone(transcriber, clip) for clip in clips]
    assert [list(answers[key].token_ids) for key in range(len(clips))] == expected


def test_heads_that_the_kernels_cannot_compute_are_left_to_others():
    def llm(**changes):
        return AutoModelForCausalLM.from_config(LlamaConfig(**{**_SIZES, **changes}))

    assert can_fuse(llm())
    assert not can_fuse(llm(head_dim=48))
    assert not can_fuse(llm(head_dim=16))
    changing = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert not can_fuse(llm(rope_parameters=changing))


def test_where_kernels_cannot_be_compiled_they_are_left_alone(monkeypatch, caplog):
    llm = make_llm("qwen2")
    assert fused_pass.can_compile(llm)
    assert not caplog.records

    def fail(*_args, **_kwargs):
        raise RuntimeError("Failed to find C compiler.\nSet CC.")

    monkeypatch.setattr(fused_pass, "small_product", fail)
    assert not fused_pass.can_compile(llm)
    (record,) = caplog.records
    assert record.getMessage().endswith("RuntimeError: Failed to find C compiler.")
    monkeypatch.setattr(
        fused_pass, "small_product", lambda inputs, *_args, **_kwargs: inputs @ inputs.T
    )
    assert not fused_pass.can_compile(llm), "wrong sums"


def test_the_kernels_are_chosen_on_a_cuda_device_only():
    expected = FusedPass if DEVICE == "cuda" else LlamaPass
    assert type(choose_pass(make_llm("qwen2"))) is expected
