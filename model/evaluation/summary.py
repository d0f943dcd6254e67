"""Corpus figures of an evaluation: in total and by language."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from model.evaluation.bootstrap import (
    ConfidenceInterval,
    ResamplingUnit,
    bootstrap_rates,
    cluster_utterances,
    percentile_interval,
)
from model.evaluation.errors import EvaluationError
from model.evaluation.scoring import METRICS, ErrorCounts, sum_counts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from model.evaluation.scoring import ScoredUtterance, TextScores

UNKNOWN_LANGUAGE = "unknown"


@dataclass(frozen=True, slots=True)
class CorpusRate:
    """One error rate of a corpus.

    Attributes:
        counts: summed over the utterances.
        rate: errors by reference length; None when all references are empty.
        interval: 95 % bootstrap interval; None when there are fewer than two clusters to draw.
    """

    counts: ErrorCounts
    rate: float | None
    interval: ConfidenceInterval | None


@dataclass(frozen=True, slots=True)
class GroupSummary:
    """Figures of one set of utterances. All rates are fractions, not percent.

    Attributes:
        utterances: all of them, non-speech included.
        duration_s: of their audio.
        resampling_unit: what the bootstrap drew.
        metrics: error rates of the model's text, by name of the metric.
        ctc_metrics: the same of the CTC head's text; None where it was not scored.
        deletion_rate: deleted words by reference words, normalised; None without speech.
        eos_rate: share of utterances that the model ended itself (finish_reason "stop").
        repetition_rate: share of utterances stuck in a loop, see `scoring.has_loop`.
        non_speech_utterances: those whose reference is empty.
        non_speech_with_text: those of them for which the model put out any text.
    """

    utterances: int
    duration_s: float
    resampling_unit: ResamplingUnit
    metrics: dict[str, CorpusRate]
    ctc_metrics: dict[str, CorpusRate] | None
    deletion_rate: float | None
    eos_rate: float
    repetition_rate: float
    non_speech_utterances: int
    non_speech_with_text: int

    @property
    def non_empty_rate(self) -> float | None:
        """Share of non-speech utterances with any output; None where there are none."""
        if not self.non_speech_utterances:
            return None
        return self.non_speech_with_text / self.non_speech_utterances


def summarise(utterances: Sequence[ScoredUtterance]) -> GroupSummary:
    """Compute the figures of a set of utterances.

    Raises:
        EvaluationError: there are none.
    """
    if not utterances:
        raise EvaluationError("nothing to score: there are no transcribed utterances")
    metrics = {metric: corpus_rate(utterances, metric) for metric in METRICS}
    with_ctc = all(utterance.ctc_scores is not None for utterance in utterances)
    non_speech = [u for u in utterances if not u.result.reference.strip()]
    words = metrics["word_normalised"].counts
    return GroupSummary(
        utterances=len(utterances),
        duration_s=sum(u.result.duration_s for u in utterances),
        resampling_unit=cluster_utterances([u.result for u in utterances]).unit,
        metrics=metrics,
        ctc_metrics={metric: corpus_rate(utterances, metric, ctc=True) for metric in METRICS}
        if with_ctc
        else None,
        deletion_rate=words.deletions / words.reference_length if words.reference_length else None,
        eos_rate=float(np.mean([u.result.finish_reason == "stop" for u in utterances])),
        repetition_rate=float(np.mean([u.repeats for u in utterances])),
        non_speech_utterances=len(non_speech),
        non_speech_with_text=sum(bool(u.result.hypothesis.strip()) for u in non_speech),
    )


def group_by_language(
    utterances: Sequence[ScoredUtterance],
) -> dict[str, list[ScoredUtterance]]:
    """Split utterances by their language tag, the tags in alphabetical order."""
    groups: dict[str, list[ScoredUtterance]] = {}
    for utterance in utterances:
        groups.setdefault(utterance.result.language or UNKNOWN_LANGUAGE, []).append(utterance)
    return dict(sorted(groups.items()))


def corpus_rate(
    utterances: Sequence[ScoredUtterance], metric: str, *, ctc: bool = False
) -> CorpusRate:
    """Compute one error rate with its interval.

    Args:
        utterances: at least one.
        metric: one of `METRICS`.
        ctc: score the CTC head's text; every utterance must have it.
    """
    counts = [_counts_of(utterance, metric, ctc=ctc) for utterance in utterances]
    corpus = sum_counts(counts)
    # An empty reference has no part in the rate, so it has none in the draws either.
    spoken = [i for i, count in enumerate(counts) if count.reference_length]
    clusters = cluster_utterances([utterances[i].result for i in spoken])
    interval = None
    if clusters.count > 1:
        replicates = bootstrap_rates(
            np.array([[counts[i].errors] for i in spoken], dtype=np.int64),
            np.array([counts[i].reference_length for i in spoken], dtype=np.int64),
            clusters,
        )
        interval = percentile_interval(replicates[:, 0])
    return CorpusRate(corpus, corpus.rate, interval)


def _counts_of(utterance: ScoredUtterance, metric: str, *, ctc: bool) -> ErrorCounts:
    scores: TextScores | None = utterance.ctc_scores if ctc else utterance.scores
    if scores is None:
        raise ValueError(f"utterance {utterance.result.id!r} has no CTC text")
    counts: ErrorCounts = getattr(scores, metric)
    return counts
