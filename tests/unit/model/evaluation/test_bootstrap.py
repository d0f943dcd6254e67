import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.evaluation.bootstrap import (
    bootstrap_rates,
    cluster_utterances,
    percentile_interval,
)
from model.evaluation.results import UtteranceResult


def make_results(speakers):
    return [
        UtteranceResult(f"u{i:03}", "a", "a", None, "en", speaker, 1.0, "stop")
        for i, speaker in enumerate(speakers)
    ]


def rates_of(errors, lengths, speakers=None, **kwargs):
    results = make_results(speakers or [None] * len(errors))
    return bootstrap_rates(
        np.array(errors, dtype=np.int64)[:, None],
        np.array(lengths, dtype=np.int64),
        cluster_utterances(results),
        **kwargs,
    )


def test_ten_known_speakers_are_resampled_as_speakers():
    clusters = cluster_utterances(make_results([f"s{i % 10}" for i in range(30)]))
    assert clusters.unit == "speaker"
    assert clusters.count == 10
    assert clusters.index[0] == clusters.index[10] == clusters.index[20]


def test_nine_known_speakers_are_resampled_as_utterances():
    clusters = cluster_utterances(make_results([f"s{i % 9}" for i in range(30)]))
    assert clusters.unit == "utterance"
    assert clusters.count == 30


def test_utterance_of_unknown_speaker_is_its_own_cluster():
    clusters = cluster_utterances(make_results([f"s{i}" for i in range(10)] + [None, None]))
    assert clusters.unit == "speaker"
    assert clusters.count == 12


def test_interval_equals_the_normal_approximation_on_a_large_sample():
    rng = np.random.default_rng(1)
    errors = rng.binomial(10, 0.2, size=2000)
    interval = percentile_interval(rates_of(errors, [10] * 2000)[:, 0])
    mean, half = errors.mean() / 10, 1.96 * errors.std() / 10 / np.sqrt(2000)
    assert interval.low == pytest.approx(mean - half, abs=0.1 * half)
    assert interval.high == pytest.approx(mean + half, abs=0.1 * half)


def test_speakers_widen_the_interval_when_their_utterances_are_alike():
    errors = [9 if i % 20 < 10 else 1 for i in range(400)]
    by_speaker = percentile_interval(
        rates_of(errors, [10] * 400, [f"s{i % 20}" for i in range(400)])[:, 0]
    )
    by_utterance = percentile_interval(rates_of(errors, [10] * 400)[:, 0])
    assert by_speaker.high - by_speaker.low > 3 * (by_utterance.high - by_utterance.low)


def test_same_seed_same_draws_and_other_seed_other_draws():
    errors, lengths = list(range(20)), [20] * 20
    np.testing.assert_array_equal(rates_of(errors, lengths), rates_of(errors, lengths))
    assert (rates_of(errors, lengths, seed=1) != rates_of(errors, lengths)).any()


def test_chunked_draws_equal_draws_at_once(monkeypatch):
    errors, lengths = list(range(20)), [20] * 20
    at_once = rates_of(errors, lengths, replicates=50)
    monkeypatch.setattr("model.evaluation.bootstrap._MAX_DRAWS", 60)
    np.testing.assert_array_equal(rates_of(errors, lengths, replicates=50), at_once)


@pytest.mark.parametrize("lengths", [[], [3, 0]])
def test_empty_references_are_refused(lengths):
    with pytest.raises(ValueError, match="non-empty references"):
        rates_of([0] * len(lengths), lengths)


@given(
    st.lists(
        st.tuples(st.integers(0, 10), st.integers(5, 10)).map(lambda p: (min(p), max(p))),
        min_size=20,
        max_size=60,
    )
)
@settings(max_examples=25, deadline=None)
def test_interval_holds_the_point_estimate(pairs):
    errors, lengths = zip(*pairs, strict=True)
    interval = percentile_interval(rates_of(errors, lengths)[:, 0])
    assert interval.low <= sum(errors) / sum(lengths) <= interval.high


@given(st.permutations(range(15)))
@settings(max_examples=25, deadline=None)
def test_draws_do_not_depend_on_the_order_of_the_utterances(order):
    results = make_results([f"s{i % 11}" for i in range(15)])
    errors = np.arange(15, dtype=np.int64)[:, None]
    lengths = np.arange(20, 35, dtype=np.int64)
    expected = bootstrap_rates(errors, lengths, cluster_utterances(results), replicates=20)
    permuted = bootstrap_rates(
        errors[list(order)],
        lengths[list(order)],
        cluster_utterances([results[i] for i in order]),
        replicates=20,
    )
    np.testing.assert_array_equal(permuted, expected)
