"""Figures of an evaluation, as PNG files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from model.evaluation.summary import corpus_rate

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from model.evaluation.scoring import ScoredUtterance
    from model.evaluation.summary import CorpusRate

# Upper edges of the duration buckets, in seconds; the last bucket is open.
_DURATION_EDGES_S = (1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 30.0)
# A hypothesis may have any number of insertions; beyond this, utterances share the last bar.
_MAX_SHOWN_WER = 1.5
_BAR_WIDTH = 0.1
_COLOUR = "#33658a"
_PERCENT = 100


def plot_wer_by_duration(path: Path, utterances: Sequence[ScoredUtterance]) -> None:
    """Draw normalised corpus WER for each bucket of clip duration, with 95 % intervals."""
    buckets: dict[int, list[ScoredUtterance]] = {}
    for utterance in _speech(utterances):
        bucket = int(np.searchsorted(_DURATION_EDGES_S, utterance.result.duration_s, side="left"))
        buckets.setdefault(bucket, []).append(utterance)
    figure, axes = _new_figure("Clip duration, s", "WER, %")
    for x, bucket in enumerate(sorted(buckets)):
        rate = corpus_rate(buckets[bucket], "word_normalised")
        _draw_bar(axes, x, rate, f"n={len(buckets[bucket])}")
    axes.set_xticks(range(len(buckets)), [_bucket_label(bucket) for bucket in sorted(buckets)])
    axes.set_title("Normalised word error rate by clip duration (95 % bootstrap intervals)")
    axes.set_ylim(bottom=0)
    axes.margins(y=0.15)
    figure.savefig(path)


def plot_wer_distribution(path: Path, utterances: Sequence[ScoredUtterance]) -> None:
    """Draw how many utterances have which normalised WER, beside the corpus figure."""
    speech = _speech(utterances)
    rates = np.array([u.scores.word_normalised.rate or 0.0 for u in speech])
    edges = np.arange(0, _MAX_SHOWN_WER + 2 * _BAR_WIDTH, _BAR_WIDTH)
    # Round before binning: 0.3 as a quotient may fall just below the edge 0.3.
    shown = np.minimum(np.round(rates, 9), _MAX_SHOWN_WER + _BAR_WIDTH / 2)
    counts, _ = np.histogram(shown, bins=np.round(edges, 9))
    figure, axes = _new_figure("WER of the utterance, %", "Utterances")
    axes.bar(
        edges[:-1] * _PERCENT,
        counts,
        width=_BAR_WIDTH * _PERCENT,
        align="edge",
        color=_COLOUR,
        edgecolor="white",
    )
    if speech:
        corpus = corpus_rate(speech, "word_normalised").rate or 0.0
        label = f"corpus WER {corpus * _PERCENT:.1f} %"
        position = min(corpus, _MAX_SHOWN_WER + _BAR_WIDTH / 2)
        axes.axvline(position * _PERCENT, color="#c8553d", linestyle="--", label=label)
        axes.legend(frameon=False)
    ticks = np.arange(0, _MAX_SHOWN_WER + _BAR_WIDTH, 0.25) * _PERCENT
    axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks[:-1]] + [f"≥ {ticks[-1]:.0f}"])
    axes.set_title("Normalised word error rate of single utterances")
    figure.savefig(path)


def _speech(utterances: Sequence[ScoredUtterance]) -> list[ScoredUtterance]:
    return [u for u in utterances if u.scores.word_normalised.reference_length]


def _new_figure(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """Make a figure without pyplot, which would keep global state and look for a display."""
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def _draw_bar(axes: Axes, x: int, rate: CorpusRate, label: str) -> None:
    height = (rate.rate or 0.0) * _PERCENT
    axes.bar(x, height, color=_COLOUR)
    top = height
    if rate.interval is not None:
        low, high = rate.interval.low * _PERCENT, rate.interval.high * _PERCENT
        below, above = max(0.0, height - low), max(0.0, high - height)
        axes.errorbar(x, height, yerr=[[below], [above]], color="black", capsize=4)
        top = max(top, high)
    axes.annotate(label, (x, top), (0, 4), textcoords="offset points", ha="center", fontsize=8)


def _bucket_label(bucket: int) -> str:
    if bucket == len(_DURATION_EDGES_S):
        return f"> {_DURATION_EDGES_S[-1]:g}"
    low = _DURATION_EDGES_S[bucket - 1] if bucket else 0
    return f"{low:g}–{_DURATION_EDGES_S[bucket]:g}"
