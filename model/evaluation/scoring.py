"""Error counts of one transcript: words and characters, raw and normalised."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import jiwer

from model.evaluation.normalisation import normalise_basic, normaliser_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from model.evaluation.results import UtteranceResult

# Copies in a row that a hypothesis must have beyond what its reference has to count as a loop:
# "very very very" is speech, four in a row where the reference has one is a decoder that is stuck.
_EXTRA_WORD_COPIES = 3

# A unit of up to 16 characters ten times in a row, for loops inside a word and for scripts that
# write no spaces.
_CHARACTER_LOOP = re.compile(r"(.{1,16}?)\1{9}")


@dataclass(frozen=True, slots=True)
class ErrorCounts:
    """Counts of a minimal edit-distance alignment; the S/D/I split is that of one such alignment.

    A reference without any words (non-speech) has nothing to be wrong about: whatever is put out
    for it is counted apart, in `inserted_on_empty`, and stays outside of the rate.
    """

    hits: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    inserted_on_empty: int = 0

    @property
    def errors(self) -> int:
        """Substitutions, deletions and insertions against non-empty references."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def reference_length(self) -> int:
        """Words or characters in the reference."""
        return self.hits + self.substitutions + self.deletions

    @property
    def rate(self) -> float | None:
        """Errors by reference length; None where the reference is empty."""
        return self.errors / self.reference_length if self.reference_length else None


@dataclass(frozen=True, slots=True)
class TextScores:
    """The four scores of a hypothesis."""

    word_raw: ErrorCounts
    word_normalised: ErrorCounts
    char_raw: ErrorCounts
    char_normalised: ErrorCounts


METRICS = tuple(field.name for field in fields(TextScores))


@dataclass(frozen=True, slots=True)
class ScoredUtterance:
    """A result with everything that is derived from its texts.

    Attributes:
        result: what the model put out.
        scores: of the hypothesis.
        ctc_scores: of the CTC head's greedy text; None where it was not asked for.
        repeats: whether the hypothesis is stuck in a loop, see `has_loop`.
    """

    result: UtteranceResult
    scores: TextScores
    ctc_scores: TextScores | None
    repeats: bool


def score_utterance(result: UtteranceResult) -> ScoredUtterance:
    """Score one result with the normaliser of its language."""
    ctc_scores = None
    if result.ctc_hypothesis is not None:
        ctc_scores = score_text(result.reference, result.ctc_hypothesis, result.language)
    return ScoredUtterance(
        result=result,
        scores=score_text(result.reference, result.hypothesis, result.language),
        ctc_scores=ctc_scores,
        repeats=has_loop(result.hypothesis, result.reference),
    )


def score_text(reference: str, hypothesis: str, language: str | None) -> TextScores:
    """Count word and character errors, raw (only white space collapsed) and normalised.

    Args:
        reference: what was said; "" for non-speech.
        hypothesis: what the model put out.
        language: chooses the normaliser.
    """
    normalise = normaliser_for(language)
    raw_pair = (" ".join(reference.split()), " ".join(hypothesis.split()))
    normalised_pair = (normalise(reference), normalise(hypothesis))
    return TextScores(
        word_raw=count_word_errors(*raw_pair),
        word_normalised=count_word_errors(*normalised_pair),
        char_raw=count_character_errors(*raw_pair),
        char_normalised=count_character_errors(*normalised_pair),
    )


def count_word_errors(reference: str, hypothesis: str) -> ErrorCounts:
    """Align the words of two texts; words are what white space separates."""
    return _counts(jiwer.process_words([reference], [hypothesis]))


def count_character_errors(reference: str, hypothesis: str) -> ErrorCounts:
    """Align the characters of two texts, the spaces between words included."""
    return _counts(jiwer.process_characters([reference], [hypothesis]))


def sum_counts(counts: Iterable[ErrorCounts]) -> ErrorCounts:
    """Add up the counts of many utterances into those of the corpus."""
    rows = [
        (c.hits, c.substitutions, c.deletions, c.insertions, c.inserted_on_empty) for c in counts
    ]
    return ErrorCounts(*(sum(column) for column in zip(*rows, strict=True)))


def has_loop(hypothesis: str, reference: str) -> bool:
    """Tell whether a hypothesis is stuck repeating itself.

    It is when, after `normalise_basic`, either
    - a word n-gram of any length n stands in it, without a gap, at least three times more often
      in a row than the most repeated n-gram of that length does in the reference (which counts
      once where nothing is repeated, so four in a row at the least), or
    - some 1 to 16 characters stand in it ten times in a row, and no such run is in the reference.
    """
    said, expected = normalise_basic(hypothesis), normalise_basic(reference)
    if _CHARACTER_LOOP.search(said) and not _CHARACTER_LOOP.search(expected):
        return True
    said_words, expected_words = said.split(), expected.split()
    longest = len(said_words) // (_EXTRA_WORD_COPIES + 1)
    return any(
        _copies_in_a_row(said_words, n) - _copies_in_a_row(expected_words, n) >= _EXTRA_WORD_COPIES
        for n in range(1, longest + 1)
    )


def _copies_in_a_row(words: Sequence[str], n: int) -> int:
    """Most times that one n-gram follows itself directly; 1 where none does."""
    longest = run = 0
    for i in range(n, len(words)):
        run = run + 1 if words[i] == words[i - n] else 0
        longest = max(longest, run)
    return longest // n + 1


def _counts(alignment: jiwer.WordOutput | jiwer.CharacterOutput) -> ErrorCounts:
    if not alignment.references[0]:
        return ErrorCounts(inserted_on_empty=alignment.insertions)
    return ErrorCounts(
        alignment.hits, alignment.substitutions, alignment.deletions, alignment.insertions
    )
