"""A training run on disk.

run.json          settings; a resumed run must repeat them
state/            trained weights, optimiser moments, progress; swapped in as a whole
metrics.jsonl     measurements, each with the optimiser step it was taken at
curves.png        the same as curves
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model.training.curves import plot_curves

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from accelerate.optimizer import AcceleratedOptimizer
    from torch import Tensor, nn

# What may differ between a run and its resumption: none of it moves the weights' path.
_FREE = {"max_steps", "save_every_s", "log_every_steps", "tensorboard"}


@dataclass(slots=True)
class Window:
    """Sums since the last log line."""

    elapsed_s: float = 0.0
    audio_s: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, values: Mapping[str, float], audio_s: float) -> None:
        """Add one batch's measurements."""
        self.audio_s += audio_s
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Mean of each measurement over the batches that have it."""
        return {name: total / self.counts[name] for name, total in self.sums.items()}


@dataclass(slots=True)
class Progress:
    """Where a run stands; `batch` counts within `epoch`, `step` counts optimiser steps."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    audio_s: float = 0.0
    elapsed_s: float = 0.0
    window: Window = field(default_factory=Window)


class RunFolder:
    """Reads and writes one run's files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics = path / "metrics.jsonl"

    def check(self, settings: Mapping[str, Mapping[str, Any]]) -> None:
        """Compare `settings` (group, name, value) with those the folder's run was started with.

        Raises:
            ValueError: names the settings that differ.
        """
        path = self.path / "run.json"
        if not path.exists():
            return
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); remove the folder") from error
        wanted = json.loads(json.dumps(settings, default=str))
        changed = sorted(
            f"{group}.{name}"
            for group, values in wanted.items()
            for name in {*values, *found.get(group, {})} - _FREE
            if values.get(name) != found.get(group, {}).get(name)
        )
        if changed:
            raise ValueError(
                f"{self.path} holds a run with other settings ({', '.join(changed)}); "
                "repeat its settings to resume it, or choose another output folder"
            )

    def claim(self, settings: Mapping[str, Mapping[str, Any]]) -> None:
        """Make the folder and note the settings."""
        self.path.mkdir(parents=True, exist_ok=True)
        fresh = self.path / "run.json.new"
        fresh.write_text(json.dumps(settings, indent=2, ensure_ascii=False, default=str) + "\n")
        fresh.replace(self.path / "run.json")

    def save_state(
        self,
        trained: Mapping[str, nn.Parameter],
        optimiser: AcceleratedOptimizer,
        progress: Progress,
    ) -> None:
        """Write the state; a kill at any moment leaves the old or the new one whole."""
        fresh, state, old = (self.path / name for name in ("state.new", "state", "state.old"))
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        save_file(
            {name: p.detach().cpu().contiguous() for name, p in trained.items()},
            fresh / "weights.safetensors",
        )
        moments: dict[str, Tensor] = {}
        for name, parameter in trained.items():
            for key, value in optimiser.state.get(parameter, {}).items():
                moments[f"{name}:{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
        save_file(moments, fresh / "optimiser.safetensors")
        (fresh / "progress.json").write_text(json.dumps(asdict(progress)))
        if state.exists():
            shutil.rmtree(old, ignore_errors=True)
            state.rename(old)
        fresh.rename(state)
        shutil.rmtree(old, ignore_errors=True)

    def load_state(
        self, trained: Mapping[str, nn.Parameter], optimiser: AcceleratedOptimizer
    ) -> Progress:
        """Put the saved state, if there is one, into the parameters and the optimiser.

        Raises:
            ValueError: the state is damaged or belongs to other parameters.
        """
        state = self.path / "state"
        if not state.exists():
            state = self.path / "state.old"  # killed between the two renames
        if not state.exists():
            return Progress()
        try:
            weights = load_file(state / "weights.safetensors")
            moments = load_file(state / "optimiser.safetensors")
            fields = json.loads((state / "progress.json").read_text())
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{state} is damaged ({error}); remove the run folder") from error
        shapes = {name: parameter.shape for name, parameter in trained.items()}
        if {name: weight.shape for name, weight in weights.items()} != shapes:
            raise ValueError(f"{state} holds other trained tensors than this stage has")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(weights[name])
        for entry, value in moments.items():
            name, key = entry.rsplit(":", 1)
            parameter = trained[name]
            # AdamW keeps its step counts on the CPU.
            placed = value if key == "step" else value.to(parameter.device)
            optimiser.state[parameter][key] = placed
        return Progress(**{**fields, "window": Window(**fields.get("window", {}))})

    def truncate_metrics(self, step: int, epoch: int) -> None:
        """Drop what was logged after optimiser step `step` or, in validation, after `epoch`.

        A line cut short by a kill goes too.
        """
        if not self._metrics.exists():
            return
        kept = []
        for line in self._metrics.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            validated = any(name.startswith("dev_") for name in record)
            if record["step"] <= step and not (validated and record["epoch"] > epoch):
                kept.append(line + "\n")
        fresh = self.path / "metrics.jsonl.new"
        fresh.write_text("".join(kept))
        fresh.replace(self._metrics)

    def log(self, record: Mapping[str, float]) -> None:
        """Append one record."""
        with self._metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def plot(self) -> None:
        """Draw the curves, if anything was measured."""
        if self._metrics.exists():
            plot_curves(self._metrics, self.path / "curves.png")
