"""Training curves as a PNG."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from pathlib import Path

_FEW_POINTS = 30
_NOT_CURVES = {"step", "epoch", "elapsed_s"}


def plot_curves(metrics: Path, image: Path) -> None:
    """Draw every series of a metrics JSONL over the optimiser steps, one panel each."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    names: dict[str, None] = {}
    for record in records:
        names.update(dict.fromkeys(key for key in record if key not in _NOT_CURVES))
    if not names:
        return
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.5 * columns, 3 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        points = [(record["step"], record[name]) for record in records if name in record]
        axis.plot(*zip(*points, strict=True), marker="." if len(points) < _FEW_POINTS else None)
        axis.set_title(name.replace("_", " "))
        axis.set_xlabel("optimiser step")
        axis.grid(alpha=0.3)
    figure.savefig(image, dpi=110)
    plt.close(figure)
