import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.kv_slots import KVSlots, LayerShape, plan_slots

LAYERS = (LayerShape(2, 4, 4), LayerShape(1, 4, 6))  # values may be wider than keys
CAPACITY = 40


def make_slots(n_slots=3):
    plan = plan_slots(
        LAYERS, torch.float32, slot_tokens=CAPACITY, max_slots=n_slots, budget_bytes=1 << 20
    )
    return KVSlots(plan, "cpu")


def states(n_rows, length, values):
    """Keys and values of each layer that hold `values` (R, L), so that rows can be told apart."""
    for layer in LAYERS:
        filled = values[:, None, :, None].expand(n_rows, layer.n_heads, length, 1)
        yield (
            filled.expand(-1, -1, -1, layer.key_width).clone(),
            filled.expand(-1, -1, -1, layer.value_width).clone(),
        )


def write_prompts(slots, prompts):
    slots.begin_prefill(len(prompts))
    longest = max(map(len, prompts))
    values = torch.zeros(len(prompts), longest)
    for row, prompt in enumerate(prompts):
        values[row, : len(prompt)] = torch.tensor(prompt)
    for index, (keys, vals) in enumerate(states(len(prompts), longest, values)):
        attended = slots.update(keys, vals, index)
        assert attended[0] is keys
    slots.join([len(prompt) for prompt in prompts])


def write_tokens(slots, tokens):
    """One decode step for all rows; returns what each row attends to, by layer."""
    rows = slice(0, len(tokens))
    positions = torch.tensor(slots.lens[rows])[:, None]
    slots.begin_decode(rows, positions[:, 0])
    assert positions[:, 0].tolist() == list(slots.lens)
    mask = slots.decode_mask()[:, 0, 0]
    seen = []
    values = torch.tensor(tokens)[:, None]
    for index, (keys, vals) in enumerate(states(len(tokens), 1, values)):
        all_keys, all_values = slots.update(keys, vals, index)
        for held in (all_keys, all_values):
            assert held.shape[2] == mask.shape[1]
            assert (held == held[:, :1, :, :1]).all()
            seen.append([row[0, valid, 0].tolist() for row, valid in zip(held, mask, strict=True)])
    slots.advance(rows)
    assert all(each == seen[0] for each in seen)
    return seen[0]


@settings(max_examples=60)
@given(st.data())
def test_every_row_attends_to_its_own_tokens_whatever_joins_and_leaves(data):
    slots = make_slots(4)
    rows, fresh = [], iter(range(1, 10**6))
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["join", "step", "leave", "rewind", "branch"]))
        if action == "join" and slots.free:
            lens = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=slots.free))
            prompts = [[float(next(fresh)) for _ in range(length)] for length in lens]
            write_prompts(slots, prompts)
            rows += prompts
        elif action == "step" and rows and slots.lens.max() < CAPACITY:
            tokens = [float(next(fresh)) for _ in rows]
            rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
            assert write_tokens(slots, tokens) == rows
        elif action == "leave" and rows:
            free = data.draw(st.sets(st.sampled_from(range(len(rows))), min_size=1))
            wiped = data.draw(st.sets(st.sampled_from(sorted(free))))
            for row, mover in slots.release(sorted(free), wipe=wiped):
                rows[row] = rows[mover]
            del rows[len(rows) - len(free) :]
        elif action == "rewind" and rows:
            row = data.draw(st.integers(0, len(rows) - 1))
            length = data.draw(st.integers(1, len(rows[row])))
            slots.rewind(row, length)
            rows[row] = rows[row][:length]
        elif action == "branch" and rows:
            # Beams of one prompt: equally long rows that share a beginning, and free ones.
            first = data.draw(st.integers(0, len(rows) - 1))
            alike = [row for row in range(len(rows)) if rows[row][:1] == rows[first][:1]]
            alike = [row for row in alike if len(rows[row]) == len(rows[first])]
            targets = data.draw(st.lists(st.sampled_from(alike), unique=True))
            free = range(len(rows), len(rows) + data.draw(st.integers(0, slots.free)))
            targets += free
            if targets:
                parents = [data.draw(st.sampled_from(alike)) for _ in targets]
                slots.branch(targets, parents, shared_len=1)
                old = [list(row) for row in rows]
                rows += [[] for _ in free]
                for target, parent in zip(targets, parents, strict=True):
                    rows[target] = list(old[parent])
        assert tuple(slots.lens) == tuple(map(len, rows))
        assert slots.free == 4 - len(rows)


def test_a_window_hides_what_lies_further_back():
    slots = make_slots(2)
    write_prompts(slots, [[1.0] * 9, [2.0] * 3])
    slots.begin_decode(slice(0, 2), torch.tensor(slots.lens[slice(0, 2)]))
    mask = slots.decode_mask(window=4)[:, 0, 0]
    assert mask[0].nonzero().flatten().tolist() == [6, 7, 8, 9]
    assert mask[1].nonzero().flatten().tolist() == [0, 1, 2, 3]


def test_only_the_live_length_is_attended_to():
    slots = make_slots(3)
    write_prompts(slots, [[1.0] * 9, [2.0] * 3])
    slots.begin_decode(slice(0, 2), torch.tensor(slots.lens[slice(0, 2)]))
    assert slots.decode_mask().shape == (2, 1, 1, 32)
    write_prompts(slots, [[1.0] * 35])
    slots.begin_decode(slice(0, 3), torch.tensor(slots.lens[slice(0, 3)]))
    assert slots.decode_mask().shape == (3, 1, 1, CAPACITY)


def test_a_wiped_row_leaves_no_nan_behind():
    slots = make_slots(2)
    write_prompts(slots, [[float("nan")] * 9, [2.0] * 3])
    slots.release([0], wipe=[0])
    slots.release([0])
    for layer in slots.layers:
        # The row that moved left a copy behind; what failed is gone.
        assert layer.keys[0].isfinite().all()
        assert layer.values[0].isfinite().all()


def test_a_wiped_row_whose_place_nobody_takes_is_empty():
    slots = make_slots(3)
    write_prompts(slots, [[1.0] * 3, [float("nan")] * 9, [float("nan")] * 2])
    slots.release([1, 2], wipe=[1, 2])
    for layer in slots.layers:
        assert layer.keys.isfinite().all()
        assert layer.values.isfinite().all()


def test_more_rows_than_are_free_are_refused():
    slots = make_slots(1)
    with pytest.raises(ValueError, match="2 slots are wanted, 1 are free"):
        slots.begin_prefill(2)


def test_the_plan_says_what_it_takes():
    plan = plan_slots(LAYERS, torch.bfloat16, slot_tokens=10, max_slots=5, budget_bytes=10**9)
    assert plan.slot_bytes == 10 * 2 * (2 * 8 + 1 * 10)
    assert plan.total_bytes == 5 * plan.slot_bytes
    slots = KVSlots(plan, "cpu")
    held = sum(x.nbytes for layer in slots.layers for x in (layer.keys, layer.values))
    assert held == plan.total_bytes
