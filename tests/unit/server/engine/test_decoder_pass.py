"""The written-out pass against the LLM's own; what it says is tested with the runner."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from server.engine.decoder_pass import LlamaPass, ModelPass, choose_pass
from server.engine.kv_slots import KVSlots, layer_shapes, plan_slots
from tests.speech_models import FAMILIES

PROMPT_LENS = (7, 3, 5)


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
    prompts = torch.randn(shape, generator=generator)
    slots.begin_prefill(len(PROMPT_LENS))
    positions = torch.arange(shape[1]).expand(shape[:2])
    llm.base_model(inputs_embeds=prompts, position_ids=positions, past_key_values=slots)
    slots.join(PROMPT_LENS)
    logits = []
    for _ in range(steps):
        embeds = torch.randn((shape[0], 1, shape[2]), generator=generator)
        rows = slice(0, shape[0])
        logits.append(decoder_pass(embeds, slots.begin_decode(rows), slots))
        slots.advance(rows)
    return torch.stack(logits)


@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral"])
def test_the_written_out_pass_gives_the_logits_of_the_llm(family):
    llm = make_llm(FAMILIES[family])
    expected = run(llm, ModelPass(llm))
    lean = choose_pass(llm)
    assert isinstance(lean, LlamaPass)
    torch.testing.assert_close(run(llm, lean), expected, rtol=1e-4, atol=1e-4)


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
