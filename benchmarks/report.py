"""What every benchmark leaves behind: JSON, a markdown table, a plot, and the machine it ran on."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure


def describe_machine() -> dict[str, object]:
    """What the figures depend on; `load` tells whether other work ran beside them."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 1),
    }


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table whose first column is text and the others are numbers."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def write_report(stem: Path, data: dict[str, object], text: str, figure: Figure) -> None:
    """Write `stem`.json, .md and .png; the machine's description joins the first two.

    Args:
        stem: path without a suffix; its folder is made.
        data: all figures.
        text: markdown, with the tables.
        figure: the plot.
    """
    machine = describe_machine()
    stem.parent.mkdir(parents=True, exist_ok=True)
    whole = json.dumps({"machine": machine, **data}, indent=2)
    stem.with_suffix(".json").write_text(whole + "\n")
    described = ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None)
    stem.with_suffix(".md").write_text(f"{text}\n\nMachine: {described}.\n")
    figure.savefig(stem.with_suffix(".png"), dpi=120)
