import torch
from hypothesis import given
from hypothesis import strategies as st

from server.engine.kv_slots import KVSlots, LayerShape, SlotPlan
from server.engine.packed_prompts import PromptBuffers, pack

PLAN = SlotPlan(8, 16, (LayerShape(1, 4, 4),), torch.float32)
LENS = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any)


def prompts(lens):
    """Embeddings (B, L, 3) and position ids (B, L) that tell their prompt and place."""
    longest = max(lens) + 1
    embeds = torch.arange(len(lens) * longest * 3.0).view(len(lens), longest, 3)
    return embeds, torch.arange(len(lens) * longest).view(len(lens), longest)


def begun(lens, used):
    slots = KVSlots(PLAN, "cpu")
    slots.join([1] * used)
    slots.begin_prefill(len(lens))
    return slots


@given(lens=LENS, used=st.integers(0, 3))
def test_each_token_keeps_its_place_and_padding_is_gone(lens, used):
    embeds, position_ids = prompts(lens)
    packed = pack(embeds, position_ids, begun(lens, used), lens)
    tokens = [(prompt, column) for prompt, length in enumerate(lens) for column in range(length)]
    assert len(packed.embeds) == len(tokens)
    for index, (prompt, column) in enumerate(tokens):
        assert packed.embeds[index].equal(embeds[prompt, column])
        assert packed.position_ids[index] == position_ids[prompt, column]
        assert packed.slots[index] == used + prompt
        assert packed.columns[index] == column
        assert packed.begins[index] == index - column


@given(batches=st.lists(LENS, min_size=1, max_size=3), more=st.integers(0, 7))
def test_buffers_hold_the_same_and_tokens_of_nobody(batches, more):
    buffers = PromptBuffers(64, torch.zeros(1, 3))
    for lens in batches:  # what was there before does not matter
        embeds, position_ids = prompts(lens)
        slots, count = begun(lens, 1), sum(lens)
        buffers.fill(count + more, embeds, position_ids, slots, lens)
        filled, packed = buffers.first(count + more), pack(embeds, position_ids, slots, lens)
        for name in packed.__slots__:
            assert getattr(filled, name)[:count].equal(getattr(packed, name))
        assert filled.slots[count:].tolist() == [PLAN.n_slots] * more
        assert filled.columns[count:].tolist() == [0] * more
        assert filled.begins[count:].tolist() == [*range(count, count + more)]
