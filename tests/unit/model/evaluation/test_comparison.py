import dataclasses

import pytest

from model.evaluation.comparison import compare_results
from model.evaluation.errors import EvaluationError
from model.evaluation.results import UtteranceResult


def make_results(hypotheses, reference="one two three four"):
    return [
        UtteranceResult(f"u{i}", reference, hypothesis, None, "en", None, 1.0, "stop")
        for i, hypothesis in enumerate(hypotheses)
    ]


SOME_WRONG = make_results(["one two three four", "one two", "one two three five", "one"] * 5)
ALL_RIGHT = make_results(["one two three four"] * 20)


def test_identical_files_do_not_differ():
    for comparison in compare_results(SOME_WRONG, list(reversed(SOME_WRONG))):
        assert comparison.rate_a == comparison.rate_b > 0
        assert comparison.difference == 0
        assert comparison.interval is not None
        assert (comparison.interval.low, comparison.interval.high) == (0, 0)
        assert comparison.probability_of_improvement == 0


def test_better_system_has_a_negative_difference_and_a_probability_of_one():
    words = compare_results(SOME_WRONG, ALL_RIGHT)[0]
    assert words.metric == "word_raw"
    assert words.rate_a == pytest.approx((0 + 2 + 1 + 3) / 16)
    assert words.rate_b == 0
    assert words.difference == pytest.approx(-words.rate_a)
    assert words.interval is not None
    assert words.interval.low < words.difference < words.interval.high < 0
    assert words.probability_of_improvement == 1


def test_swapping_the_systems_mirrors_the_difference():
    forth = compare_results(SOME_WRONG, ALL_RIGHT)[0]
    back = compare_results(ALL_RIGHT, SOME_WRONG)[0]
    assert back.difference == -forth.difference
    assert back.interval is not None
    assert forth.interval is not None
    assert back.interval.low == pytest.approx(-forth.interval.high)
    assert back.probability_of_improvement == 0


def test_pairing_narrows_the_interval_of_systems_that_fail_alike():
    worse_by_one_word = make_results(["one two three x", "one x", "one two x five", "x"] * 5)
    words = compare_results(SOME_WRONG, worse_by_one_word)[0]
    assert words.difference == pytest.approx(1 / 4)
    assert words.interval is not None
    assert words.interval.low == pytest.approx(1 / 4)
    assert words.interval.high == pytest.approx(1 / 4)


def test_other_utterances_are_refused_and_named():
    with pytest.raises(EvaluationError, match=r"1 only in the first \(u19\), 0 only in the second"):
        compare_results(ALL_RIGHT, ALL_RIGHT[:-1])
    with pytest.raises(EvaluationError, match=r"17 only in the second \(u10, u11, u12, …\)"):
        compare_results(ALL_RIGHT[:3], ALL_RIGHT)


@pytest.mark.parametrize("change", [{"reference": "five"}, {"language": "mn"}])
def test_same_utterance_with_another_reference_or_language_is_refused(change):
    changed = [dataclasses.replace(ALL_RIGHT[0], **change), *ALL_RIGHT[1:]]
    with pytest.raises(EvaluationError, match=f"'u0' has different {next(iter(change))}s"):
        compare_results(ALL_RIGHT, changed)


def test_non_speech_alone_cannot_be_compared():
    noise = make_results(["", "x"], reference="")
    with pytest.raises(EvaluationError, match="no reference has any words"):
        compare_results(noise, noise)


def test_single_utterance_has_a_difference_but_no_interval():
    words = compare_results(SOME_WRONG[1:2], ALL_RIGHT[1:2])[0]
    assert words.difference == pytest.approx(-1 / 2)
    assert words.interval is None
    assert words.probability_of_improvement is None
