"""Bootstrap confidence intervals of error rates.

Utterances of one speaker are alike, so whole speakers are drawn where enough of them are known;
drawing utterances then would make the intervals too narrow.

Source: Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance
evaluation", ICASSP 2004. Axis legend: C clusters, R replicates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from model.evaluation.results import UtteranceResult

REPLICATES = 2000
SEED = 0

_MIN_SPEAKERS = 10
_CONFIDENCE = 0.95
# Draws held in memory at once, 32 MB as int64.
_MAX_DRAWS = 4_000_000

ResamplingUnit = Literal["speaker", "utterance"]


@dataclass(frozen=True, slots=True)
class ConfidenceInterval:
    """The middle 95 % of the bootstrap replicates."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Clusters:
    """What is drawn as one, in an order that does not depend on the order of the utterances.

    Attributes:
        unit: what a cluster is.
        index: cluster of each utterance, (utterances,) int64.
        count: number of clusters C.
    """

    unit: ResamplingUnit
    index: NDArray[np.int64]
    count: int


def cluster_utterances(results: Sequence[UtteranceResult]) -> Clusters:
    """Group utterances by speaker if ten or more speakers are known, else leave each on its own.

    An utterance of unknown speaker among known ones is a cluster by itself.
    """
    speakers = {result.speaker for result in results if result.speaker is not None}
    unit: ResamplingUnit = "speaker" if len(speakers) >= _MIN_SPEAKERS else "utterance"
    keys = [
        ("speaker", result.speaker)
        if unit == "speaker" and result.speaker is not None
        else ("utterance", result.id)
        for result in results
    ]
    position = {key: i for i, key in enumerate(sorted(set(keys)))}
    index = np.array([position[key] for key in keys], dtype=np.int64)
    return Clusters(unit, index, len(position))


def bootstrap_rates(
    columns: NDArray[np.int64],
    reference_lengths: NDArray[np.int64],
    clusters: Clusters,
    replicates: int = REPLICATES,
    seed: int = SEED,
) -> NDArray[np.float64]:
    """Draw clusters with replacement and compute the corpus error rate of each replicate.

    Args:
        columns: (utterances, K) errors of K systems on the same utterances; every replicate
            draws the same clusters for all of them, which is what makes a comparison paired.
        reference_lengths: (utterances,) all above zero, so that no replicate divides by zero.
        clusters: of the same utterances.
        replicates: R.
        seed: of the draws.

    Returns:
        (R, K) error rates.

    Raises:
        ValueError: an utterance has an empty reference, or there is none at all.
    """
    if reference_lengths.size == 0 or int(reference_lengths.min()) < 1:
        raise ValueError("bootstrap needs utterances with non-empty references")
    stacked = np.column_stack([columns, reference_lengths])  # (utterances, K + 1)
    sums = np.zeros((clusters.count, stacked.shape[1]), dtype=np.int64)
    np.add.at(sums, clusters.index, stacked)
    rng = np.random.default_rng(seed)
    rows_at_once = max(1, _MAX_DRAWS // clusters.count)
    totals = np.empty((replicates, stacked.shape[1]), dtype=np.int64)
    for start in range(0, replicates, rows_at_once):
        rows = min(rows_at_once, replicates - start)
        draws = rng.integers(0, clusters.count, size=(rows, clusters.count))
        for k in range(stacked.shape[1]):
            totals[start : start + rows, k] = sums[draws, k].sum(axis=1)
    rates: NDArray[np.float64] = totals[:, :-1] / totals[:, -1:]
    return rates


def percentile_interval(replicates: NDArray[np.float64]) -> ConfidenceInterval:
    """Return the 2.5 and 97.5 % points of (R,) replicates."""
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(replicates, [tail, 1 - tail])
    return ConfidenceInterval(float(low), float(high))
