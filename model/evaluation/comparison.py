"""Paired comparison of two systems on the same utterances."""

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
from model.evaluation.scoring import METRICS, ErrorCounts, score_text, sum_counts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from model.evaluation.results import UtteranceResult
    from model.evaluation.scoring import TextScores

_MAX_IDS_NAMED = 3


@dataclass(frozen=True, slots=True)
class Comparison:
    """One metric of two systems.

    Attributes:
        metric: one of `METRICS`.
        rate_a: corpus error rate of the first system.
        rate_b: of the second.
        difference: rate_b - rate_a; negative when the second is better.
        interval: 95 % bootstrap interval of the difference; None with fewer than two clusters.
        probability_of_improvement: share of the replicates in which the second system's rate is
            strictly below the first's; None with fewer than two clusters.
        resampling_unit: what the bootstrap drew.
    """

    metric: str
    rate_a: float
    rate_b: float
    difference: float
    interval: ConfidenceInterval | None
    probability_of_improvement: float | None
    resampling_unit: ResamplingUnit


def compare_results(
    results_a: Sequence[UtteranceResult], results_b: Sequence[UtteranceResult]
) -> list[Comparison]:
    """Compare the second system with the first, each metric on the same draws for both.

    Utterances of empty reference have no error rate and take no part.

    Raises:
        EvaluationError: the two differ in utterances, references or languages, or none of the
            references has any words.
    """
    paired = _pair(results_a, results_b)
    scores_a = [score_text(a.reference, a.hypothesis, a.language) for a, _ in paired]
    scores_b = [score_text(b.reference, b.hypothesis, b.language) for _, b in paired]
    utterances = [a for a, _ in paired]
    return [_compare(metric, utterances, scores_a, scores_b) for metric in METRICS]


def _pair(
    results_a: Sequence[UtteranceResult], results_b: Sequence[UtteranceResult]
) -> list[tuple[UtteranceResult, UtteranceResult]]:
    by_id = {result.id: result for result in results_b}
    only_a = sorted({result.id for result in results_a} - by_id.keys())
    only_b = sorted(by_id.keys() - {result.id for result in results_a})
    if only_a or only_b:
        raise EvaluationError(
            "the two files are not about the same utterances: "
            f"{len(only_a)} only in the first{_named(only_a)}, "
            f"{len(only_b)} only in the second{_named(only_b)}"
        )
    paired = [(result, by_id[result.id]) for result in results_a]
    for a, b in paired:
        if a.reference != b.reference:
            raise EvaluationError(f"utterance {a.id!r} has different references in the two files")
        if a.language != b.language:
            raise EvaluationError(f"utterance {a.id!r} has different languages in the two files")
    return paired


def _named(ids: Sequence[str]) -> str:
    if not ids:
        return ""
    more = ", …" if len(ids) > _MAX_IDS_NAMED else ""
    return f" ({', '.join(ids[:_MAX_IDS_NAMED])}{more})"


def _compare(
    metric: str,
    utterances: Sequence[UtteranceResult],
    scores_a: Sequence[TextScores],
    scores_b: Sequence[TextScores],
) -> Comparison:
    counts_a: list[ErrorCounts] = [getattr(scores, metric) for scores in scores_a]
    counts_b: list[ErrorCounts] = [getattr(scores, metric) for scores in scores_b]
    rate_a, rate_b = sum_counts(counts_a).rate, sum_counts(counts_b).rate
    if rate_a is None or rate_b is None:
        raise EvaluationError("there is nothing to compare: no reference has any words")
    spoken = [i for i, count in enumerate(counts_a) if count.reference_length]
    clusters = cluster_utterances([utterances[i] for i in spoken])
    interval = probability = None
    if clusters.count > 1:
        rates = bootstrap_rates(
            np.array([[counts_a[i].errors, counts_b[i].errors] for i in spoken], dtype=np.int64),
            np.array([counts_a[i].reference_length for i in spoken], dtype=np.int64),
            clusters,
        )
        interval = percentile_interval(rates[:, 1] - rates[:, 0])
        probability = float(np.mean(rates[:, 1] < rates[:, 0]))
    return Comparison(
        metric=metric,
        rate_a=rate_a,
        rate_b=rate_b,
        difference=rate_b - rate_a,
        interval=interval,
        probability_of_improvement=probability,
        resampling_unit=clusters.unit,
    )
