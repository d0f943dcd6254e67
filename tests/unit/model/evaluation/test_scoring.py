import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.evaluation.results import UtteranceResult
from model.evaluation.scoring import (
    ErrorCounts,
    count_character_errors,
    count_word_errors,
    has_loop,
    score_text,
    score_utterance,
    sum_counts,
)

words = st.lists(st.sampled_from(["нэг", "хоёр", "гурав", "йод", "өө"]), max_size=12).map(" ".join)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("a b c d", "a b c d", ErrorCounts(hits=4)),
        ("a b c d", "a x c d", ErrorCounts(hits=3, substitutions=1)),
        ("a b c d", "a d", ErrorCounts(hits=2, deletions=2)),
        ("a b", "a y b z", ErrorCounts(hits=2, insertions=2)),
        ("a b c d", "x b c d e", ErrorCounts(hits=3, substitutions=1, insertions=1)),
        ("a b c", "", ErrorCounts(deletions=3)),
        ("", "a b", ErrorCounts(inserted_on_empty=2)),
        ("", "", ErrorCounts()),
    ],
)
def test_word_counts_equal_those_made_by_hand(reference, hypothesis, expected):
    assert count_word_errors(reference, hypothesis) == expected


def test_character_counts_include_the_spaces_between_words():
    assert count_character_errors("ab cd", "abcd") == ErrorCounts(hits=4, deletions=1)
    assert count_character_errors("", "ab c") == ErrorCounts(inserted_on_empty=4)


def test_corpus_rate_weighs_utterances_by_length_and_leaves_out_empty_references():
    total = sum_counts(
        [
            ErrorCounts(hits=9, substitutions=1),
            ErrorCounts(deletions=2),
            ErrorCounts(inserted_on_empty=7),
        ]
    )
    assert total == ErrorCounts(hits=9, substitutions=1, deletions=2, inserted_on_empty=7)
    assert total.rate == pytest.approx(3 / 12)


def test_rate_of_empty_references_alone_is_none():
    assert sum_counts([ErrorCounts(inserted_on_empty=3)]).rate is None
    assert sum_counts([]).rate is None


def test_raw_scores_see_case_and_punctuation_and_normalised_scores_do_not():
    scores = score_text("Хоёр, гурав.", "хоёр гурав", "mn")
    assert scores.word_raw == ErrorCounts(substitutions=2)
    assert scores.word_normalised == ErrorCounts(hits=2)
    assert scores.char_normalised.errors == 0
    assert scores.char_raw == ErrorCounts(hits=9, substitutions=1, deletions=2)


def test_losing_the_breve_of_short_i_is_an_error_in_mongolian():
    assert score_text("сайн", "саин", "mn").word_normalised == ErrorCounts(substitutions=1)


def test_english_spelling_and_numbers_are_no_errors_after_normalisation():
    scores = score_text("The colour is twenty five.", "the color is 25", "en")
    assert scores.word_normalised.errors == 0
    assert scores.word_raw.errors == 4


def test_reference_emptied_by_the_normaliser_has_no_part_in_the_rate():
    scores = score_text("Hmm.", "hmm yes", "en")
    assert scores.word_normalised == ErrorCounts(inserted_on_empty=1)
    assert scores.word_raw.reference_length == 1


def test_ctc_text_is_scored_apart():
    result = UtteranceResult("u", "one two", "one two", "one", "en", None, 1.0, "stop")
    scored = score_utterance(result)
    assert scored.scores.word_raw.errors == 0
    assert scored.ctc_scores is not None
    assert scored.ctc_scores.word_raw == ErrorCounts(hits=1, deletions=1)


@given(words)
def test_identical_texts_have_no_errors(text):
    scores = score_text(text, text, "mn")
    assert scores.word_raw.errors == scores.char_normalised.errors == 0
    assert scores.word_raw.inserted_on_empty == 0


@given(words, words)
def test_counts_add_up_to_the_lengths_of_both_texts(reference, hypothesis):
    counts = count_word_errors(reference, hypothesis)
    said = len(hypothesis.split())
    assert counts.reference_length == len(reference.split())
    inserted = counts.insertions + counts.inserted_on_empty
    assert counts.hits + counts.substitutions + inserted == said


@pytest.mark.parametrize(
    ("hypothesis", "reference"),
    [
        ("no no no no", "no"),
        ("the cat sat the cat sat the cat sat the cat sat", "the cat sat"),
        ("Үгүй, үгүй. Үгүй үгүй!", "үгүй"),
        ("a " * 50, ""),
        ("three three three three three", "three three"),
        ("ха" * 10, "ха"),
    ],
)
def test_loop_is_found(hypothesis, reference):
    assert has_loop(hypothesis, reference)


@pytest.mark.parametrize(
    ("hypothesis", "reference"),
    [
        ("", ""),
        ("very very very good", "very good"),
        ("no no no no", "no no"),
        ("five five five five five", "five five five five five"),
        ("one two three four five six seven eight", "one"),
        ("no yes no yes no yes", "no yes"),
    ],
)
def test_ordinary_repetition_is_no_loop(hypothesis, reference):
    assert not has_loop(hypothesis, reference)


@given(words)
def test_a_text_never_loops_against_itself(text):
    assert not has_loop(text, text)
