"""The written-out pass against the LLM's own; what it says is tested with the runner."""

import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from server.engine.decoder_pass import LlamaPass, ModelPass, choose_pass
from server.engine.kv_slots import KVSlots, layer_shapes, plan_slots
from server.engine.packed_linear import PackedLinear, laid_out, pack_linear_layers
from tests.speech_models import FAMILIES

PROMPT_LENS = (17, 3, 5)  # the first longer than a window


def make_llm(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.inference_mode()
def run(llm, decoder_pass, steps=3):
    """Logits of some decode steps, rows of different length."""
    plan = plan_slots(
        layer_shapes(llm), llm.dtype, slot_tokens=64, max_slots=len(PROMPT_LENS), budget_bytes=1e9
    )
    slots = KVSlots(plan, "cpu")
    generator = torch.Generator().manual_seed(1)
    shape = (len(PROMPT_LENS), max(PROMPT_LENS), llm.config.hidden_size)
    prompts = torch.randn(shape, generator=generator).to(llm.dtype)
    slots.begin_prefill(len(PROMPT_LENS))
    positions = torch.arange(shape[1]).expand(shape[:2])
    decoder_pass.prefill(prompts, positions, slots, PROMPT_LENS)
    slots.join(PROMPT_LENS)
    logits = []
    for _ in range(steps):
        embeds = torch.randn((shape[0], 1, shape[2]), generator=generator).to(llm.dtype)
        rows = slice(0, shape[0])
        columns = torch.tensor(slots.lens[rows])
        slots.begin_decode(rows, columns)
        logits.append(decoder_pass(embeds, columns[:, None], slots))
        slots.advance(rows)
    return torch.stack(logits)


@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral"])
def test_the_written_out_pass_gives_the_logits_of_the_llm(family):
    llm = make_llm(FAMILIES[family])
    expected = run(llm, ModelPass(llm))
    lean = choose_pass(llm)
    assert isinstance(lean, LlamaPass)
    torch.testing.assert_close(run(llm, lean), expected, rtol=1e-4, atol=1e-4)


needs_bf16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bf16 on this processor"
)


@needs_bf16
@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2"])
def test_packed_layers_are_as_exact_as_plain_ones(family):
    llm = make_llm(FAMILIES[family])
    exact = run(llm, ModelPass(llm))
    llm.bfloat16()
    plain = run(llm, ModelPass(llm))
    pack_linear_layers(llm)
    assert isinstance(llm.lm_head, PackedLinear)
    assert llm.dtype == torch.bfloat16
    for decoder_pass in (ModelPass(llm), choose_pass(llm)):
        packed = run(llm, decoder_pass)
        assert (packed - exact).norm() < 1.5 * (plain - exact).norm()


class Watched(nn.Sequential):
    """Two layers; notes how many weights there are whenever one of them is replaced."""

    def __init__(self, weights, counts):
        super().__init__(*(nn.Linear(16, 16, dtype=torch.bfloat16) for _ in range(2)))
        weights += [weakref.ref(layer.weight) for layer in self]
        self.note = lambda: counts.append(sum(weight() is not None for weight in weights))

    def __setattr__(self, name, value):
        if isinstance(value, PackedLinear):
            self.note()
        super().__setattr__(name, value)


@needs_bf16
def test_a_plain_weight_goes_before_the_next_is_packed():
    weights, counts = [], []
    pack_linear_layers(nn.Sequential(*(Watched(weights, counts) for _ in range(3))))
    assert counts == [6, 5, 4, 3, 2, 1]


def test_layers_that_gain_nothing_stay_plain():
    llm = make_llm(FAMILIES["qwen2"])
    pack_linear_layers(llm)
    assert not any(isinstance(each, PackedLinear) for each in llm.modules())


@pytest.mark.parametrize(
    ("shape", "dtype", "is_turned"),
    [
        ((1920, 384), torch.float32, True),
        ((384, 960), torch.float32, True),
        ((768, 768), torch.float32, False),  # not that narrow
        ((4096, 512), torch.float32, False),  # 8 MiB
        ((1920, 384), torch.bfloat16, False),
    ],
)
def test_small_weights_are_turned_in_memory_and_stay_the_same(shape, dtype, is_turned):
    weight = torch.randn(shape, dtype=dtype)
    turned = laid_out(weight)
    assert torch.equal(turned, weight)
    assert turned.t().is_contiguous() == is_turned
    assert turned.is_contiguous() != is_turned


def test_weights_are_turned_in_the_llm_and_in_its_joined_products():
    llm = make_llm(FAMILIES["qwen2"])
    expected = run(llm, ModelPass(llm))
    embeddings = llm.get_input_embeddings().weight
    pack_linear_layers(llm)
    assert llm.lm_head.weight.t().is_contiguous()
    assert embeddings.is_contiguous()  # which the output layer shared
    lean = choose_pass(llm)
    attention = llm.model.layers[0].self_attn
    assert attention.q_proj.weight.stride(0) == attention.k_proj.weight.stride(0) == 1
    for decoder_pass in (ModelPass(llm), lean):
        torch.testing.assert_close(run(llm, decoder_pass), expected, rtol=1e-4, atol=1e-4)


def test_the_llm_itself_works_on_and_shares_the_memory():
    llm = make_llm(FAMILIES["qwen2"])
    ids = torch.arange(10)[None]
    with torch.inference_mode():
        before = llm(ids).logits
        LlamaPass(llm)
        torch.testing.assert_close(llm(ids).logits, before)
    attention = llm.model.layers[0].self_attn
    start = attention.q_proj.weight.untyped_storage().data_ptr()
    assert attention.v_proj.weight.untyped_storage().data_ptr() == start


@pytest.mark.parametrize("family", ["gpt2", "gemma", "qwen2, one layer of a sliding window"])
def test_llms_built_otherwise_keep_their_own_forward(family):
    assert isinstance(choose_pass(make_llm(FAMILIES[family])), ModelPass)


def test_an_altered_llama_keeps_its_own_forward():
    plain = FAMILIES["llama"]
    altered = LlamaConfig(**{**plain.to_diff_dict(), "mlp_bias": True})
    assert isinstance(choose_pass(make_llm(altered)), ModelPass)
    other_act = LlamaConfig(**{**plain.to_diff_dict(), "hidden_act": "gelu"})
    assert isinstance(choose_pass(make_llm(other_act)), ModelPass)
    adapted = get_peft_model(make_llm(plain), LoraConfig(target_modules=["q_proj"]))
    assert isinstance(choose_pass(adapted.get_base_model()), ModelPass)
