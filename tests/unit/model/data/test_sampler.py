import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.data.sampler import DurationBucketSampler

DURATIONS_S = st.lists(st.floats(0.05, 40.0), min_size=1, max_size=120)
BUDGET_S = st.floats(1.0, 120.0)
SEED = st.integers(0, 2**31)


def speech_like(n, seed=0):
    return np.clip(np.random.default_rng(seed).lognormal(1.3, 0.6, n), 0.3, 20.0)


def all_ranks(durations_s, budget_s, world_size, seed=0, epoch=0):
    samplers = [
        DurationBucketSampler(durations_s, budget_s, seed, world_size=world_size, rank=rank)
        for rank in range(world_size)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [list(sampler) for sampler in samplers]


@given(DURATIONS_S, BUDGET_S, SEED, st.booleans())
def test_every_index_comes_exactly_once_an_epoch(durations_s, budget_s, seed, shuffle):
    sampler = DurationBucketSampler(durations_s, budget_s, seed, shuffle=shuffle)
    batches = list(sampler)
    assert sorted(index for batch in batches for index in batch) == list(range(len(durations_s)))
    assert len(sampler) == len(batches)


@given(DURATIONS_S, BUDGET_S, SEED)
def test_padded_audio_stays_within_the_budget_but_for_a_clip_alone(durations_s, budget_s, seed):
    for batch in DurationBucketSampler(durations_s, budget_s, seed):
        padded_s = max(durations_s[index] for index in batch) * len(batch)
        assert padded_s <= budget_s or len(batch) == 1


@given(DURATIONS_S, BUDGET_S, st.integers(2, 5), st.integers(0, 9))
def test_ranks_get_equally_many_batches_and_together_every_index(
    durations_s, budget_s, world_size, epoch
):
    ranks = all_ranks(durations_s, budget_s, world_size, epoch=epoch)
    assert len({len(batches) for batches in ranks}) == 1
    indices = [index for batches in ranks for batch in batches for index in batch]
    assert set(indices) == set(range(len(durations_s)))
    repeated = len(indices) - len(set(indices))
    if repeated:  # only where no batch was left to split
        assert all(len(batch) == 1 for batches in ranks for batch in batches)
        assert repeated < world_size


@given(DURATIONS_S, BUDGET_S, st.integers(0, 3), st.data())
def test_resuming_at_a_batch_gives_the_remaining_ones(durations_s, budget_s, epoch, data):
    sampler = DurationBucketSampler(durations_s, budget_s, seed=1)
    sampler.set_epoch(epoch)
    whole = list(sampler)
    start = data.draw(st.integers(0, len(whole)))
    resumed = DurationBucketSampler(durations_s, budget_s, seed=1)
    resumed.set_epoch(epoch, start_batch=start)
    assert list(resumed) == whole[start:]
    assert len(resumed) == len(whole) - start


def test_iterating_twice_gives_the_same_and_another_epoch_or_seed_another_order():
    durations_s = speech_like(200)
    sampler = DurationBucketSampler(durations_s, 60.0, seed=0)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    # Not the same batches in another order, either: clips meet other clips.
    assert len({frozenset(batch) for batch in first} & {frozenset(batch) for batch in second}) < 10
    assert list(DurationBucketSampler(durations_s, 60.0, seed=1)) != first


def test_without_shuffling_batches_go_from_short_to_long_in_every_epoch():
    durations_s = speech_like(100)
    sampler = DurationBucketSampler(durations_s, 30.0, seed=0, shuffle=False)
    order = [durations_s[index] for batch in sampler for index in batch]
    assert order == sorted(order)
    before = list(sampler)
    sampler.set_epoch(5)
    assert list(sampler) == before


def test_little_of_a_batch_is_padding_and_the_budget_is_used():
    durations_s = speech_like(2_000)
    batches = list(DurationBucketSampler(durations_s, 120.0, seed=0))
    padded_s = [durations_s[batch].max() * len(batch) for batch in batches]
    assert 1 - durations_s.sum() / sum(padded_s) < 0.08
    assert np.mean(padded_s) > 0.9 * 120.0


def test_ranks_share_batches_without_repeats_where_they_can_be_split():
    ranks = all_ranks([1.0] * 10, budget_s=4.0, world_size=4)  # 3 batches of 4, 4 and 2
    assert sorted(index for (batch,) in ranks for index in batch) == list(range(10))


def test_three_clips_on_two_ranks_repeat_one():
    ranks = all_ranks([5.0, 5.0, 5.0], budget_s=5.0, world_size=2)
    assert [len(batches) for batches in ranks] == [2, 2]
    assert {index for batches in ranks for (index,) in batches} == {0, 1, 2}


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"durations_s": []}, "no durations"),
        ({"durations_s": [1.0, 0.0]}, "above 0 s"),
        ({"durations_s": [1.0, float("nan")]}, "finite"),
        ({"max_batch_audio_s": 0.0}, "max_batch_audio_s"),
        ({"rank": 2, "world_size": 2}, "rank 2"),
    ],
)
def test_impossible_input_is_refused(options, fault):
    usual = {"durations_s": [1.0], "max_batch_audio_s": 1.0, "seed": 0}
    with pytest.raises(ValueError, match=fault):
        DurationBucketSampler(**{**usual, **options})


def test_resuming_behind_the_last_batch_is_refused():
    sampler = DurationBucketSampler([1.0, 1.0], 1.0, seed=0)
    with pytest.raises(ValueError, match="has 2 batches"):
        sampler.set_epoch(0, start_batch=3)
