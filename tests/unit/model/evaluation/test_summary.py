import pytest

from model.evaluation.errors import EvaluationError
from model.evaluation.results import UtteranceResult
from model.evaluation.scoring import ErrorCounts, score_utterance
from model.evaluation.summary import group_by_language, summarise


def scored(utterance_id, reference, hypothesis, **fields):
    values = {
        "ctc_hypothesis": None,
        "language": "en",
        "speaker": None,
        "duration_s": 2.0,
        "finish_reason": "stop",
    }
    return score_utterance(
        UtteranceResult(utterance_id, reference, hypothesis, **(values | fields))
    )


MIXED = [
    scored("a", "The cat sat.", "the cat sat"),
    scored("b", "a dog", "dog"),
    scored("c", "", "thank you", language="mn"),
    scored("d", "", "", language="mn", duration_s=4.0),
    scored("e", "хоёр", "хоёр хоёр хоёр хоёр хоёр", language="mn", finish_reason="length"),
]


def test_figures_equal_those_made_by_hand():
    total = summarise(MIXED)
    assert total.utterances == 5
    assert total.duration_s == 12.0
    words = total.metrics["word_normalised"]
    assert words.counts == ErrorCounts(hits=5, deletions=1, insertions=4, inserted_on_empty=2)
    assert words.rate == pytest.approx(5 / 6)
    assert total.metrics["word_raw"].counts.substitutions == 2
    assert total.deletion_rate == pytest.approx(1 / 6)
    assert total.eos_rate == pytest.approx(4 / 5)
    assert total.repetition_rate == pytest.approx(1 / 5)
    assert total.non_speech_utterances == 2
    assert total.non_speech_with_text == 1
    assert total.non_empty_rate == 0.5
    assert total.ctc_metrics is None
    assert total.resampling_unit == "utterance"


def test_order_of_the_utterances_changes_nothing():
    shuffled = [MIXED[i] for i in (3, 0, 4, 1, 2)]
    assert summarise(shuffled) == summarise(MIXED)


def test_perfect_transcripts_have_no_errors_and_an_interval_of_zero():
    perfect = [scored(str(i), f"word {i}", f"word {i}") for i in range(12)]
    words = summarise(perfect).metrics["word_raw"]
    assert words.rate == 0
    assert words.interval is not None
    assert (words.interval.low, words.interval.high) == (0, 0)


def test_empty_hypotheses_delete_every_word():
    silent = summarise([scored("a", "one two", ""), scored("b", "three", "")])
    assert silent.metrics["word_raw"].rate == 1
    assert silent.deletion_rate == 1


def test_non_speech_alone_has_no_error_rate():
    noise = summarise([scored("a", "", ""), scored("b", " ", "x")])
    assert noise.metrics["word_normalised"].rate is None
    assert noise.metrics["word_normalised"].interval is None
    assert noise.deletion_rate is None
    assert noise.non_empty_rate == 0.5


def test_one_utterance_has_no_interval():
    assert summarise([scored("a", "one two", "one")]).metrics["word_raw"].interval is None


def test_ctc_text_is_summarised_when_every_utterance_has_it():
    both = [
        scored("a", "one two", "one two", ctc_hypothesis="one"),
        scored("b", "three", "three", ctc_hypothesis="three"),
    ]
    total = summarise(both)
    assert total.ctc_metrics is not None
    assert total.ctc_metrics["word_raw"].rate == pytest.approx(1 / 3)
    assert total.metrics["word_raw"].rate == 0


def test_nothing_to_score_is_refused():
    with pytest.raises(EvaluationError, match="no transcribed utterances"):
        summarise([])


def test_groups_hold_every_utterance_once():
    groups = group_by_language([*MIXED, scored("f", "x", "x", language=None)])
    assert {name: len(group) for name, group in groups.items()} == {
        "en": 2,
        "mn": 3,
        "unknown": 1,
    }
