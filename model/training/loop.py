"""The one training loop, shared by every stage.

A stage brings a module whose forward turns a batch into a loss, and batches that are a pure
function of (epoch, index). All randomness of a step derives from (seed, epoch, index, rank), so a
run that was killed and resumed follows the curve of one that was not.

The state of a run lies in `<output>/state/` (safetensors and JSON, swapped in atomically), its
measurements in `<output>/metrics.jsonl`, its curves in `<output>/curves.png`.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from model.training.curves import plot_curves

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor, nn

Batch = dict[str, Any]


class LoopConfig(BaseModel):
    """How a stage is optimised. Saved into the run folder; a resumed run must equal it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(10, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    warmup_steps: int = Field(1000, ge=0, description="optimiser steps of linear warm-up")
    final_lr_ratio: float = Field(0.02, ge=0, le=1, description="end of the cosine decay")
    weight_decay: float = Field(0.01, ge=0)
    beta2: float = Field(0.98, gt=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    grad_accumulation: int = Field(1, ge=1, description="batches for one optimiser step")
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = 0
    log_every_steps: int = Field(10, ge=1)
    save_every_s: float = Field(300.0, gt=0, description="seconds between states on disk")
    max_steps: int | None = Field(None, ge=1, description="stop early, the schedule unchanged")
    tensorboard: bool = False


class Stage(Protocol):
    """What the loop trains."""

    @property
    def module(self) -> nn.Module:
        """Forward takes a batch and returns {"loss": (), …other scalars}."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trained parameters; `lr_scale` in a group multiplies the learning rate."""

    def epoch(self, epoch: int, rank: int, world_size: int) -> EpochBatches:
        """The batches of one epoch, the same number on every rank."""

    def validate(self, module: nn.Module) -> dict[str, float]:
        """Figures of merit after an epoch; empty when there is nothing to validate on."""

    def save(self, folder: Path) -> None:
        """Write the stage's product."""


class EpochBatches(Protocol):
    """One epoch: its length, and its batches from any index on. A batch holds `audio_s`."""

    def __len__(self) -> int: ...

    def iterate(self, start: int) -> Iterator[Batch]:
        """Yield the batches from index `start` on."""


@dataclass(slots=True)
class Progress:
    """Where a run stands; `batch` counts within `epoch`, `step` counts optimiser steps."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    audio_s: float = 0.0
    elapsed_s: float = 0.0


@dataclass(slots=True)
class _Window:
    """Sums between two log lines."""

    started: float = field(default_factory=time.monotonic)
    batches: int = 0
    audio_s: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, outputs: dict[str, Tensor], audio_s: float) -> None:
        self.batches += 1
        self.audio_s += audio_s
        for name, value in outputs.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.detach())

    def means(self) -> dict[str, float]:
        return {name: total / self.batches for name, total in self.sums.items()}


def learning_rate_factor(config: LoopConfig, step: int, done: float) -> float:
    """Linear warm-up, then cosine decay over the fraction of the run that is `done` in [0, 1]."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return warmup * (config.final_lr_ratio + (1 - config.final_lr_ratio) * cosine)


class TrainingLoop:
    """Train one stage into `output`, resuming what a killed run left there."""

    def __init__(
        self, stage: Stage, config: LoopConfig, output: Path, identity: dict[str, Any]
    ) -> None:
        """Prepare the run folder.

        Args:
            stage: what is trained.
            config: how.
            output: the run folder; holds the product at the end.
            identity: everything else that must not change between a run and its resumption.

        Raises:
            ValueError: `output` holds a run with another configuration.
        """
        self.stage = stage
        self.config = config
        self.output = output
        self.accelerator = Accelerator(
            mixed_precision="bf16" if config.precision == "bf16" else "no",
            gradient_accumulation_steps=config.grad_accumulation,
        )
        self.progress = Progress()
        self._claim_folder(identity)
        # A product that exists is a finished run: `run` then has nothing to do.
        set_seed(config.seed)
        groups = stage.parameter_groups()
        optimiser = torch.optim.AdamW(
            groups,
            lr=config.learning_rate,
            betas=(0.9, config.beta2),
            weight_decay=config.weight_decay,
        )
        self.module, self.optimiser = self.accelerator.prepare(stage.module, optimiser)
        self._resume()
        self._last_saved = time.monotonic()
        self._writer = self._tensorboard() if config.tensorboard else None

    # -- the run folder ------------------------------------------------------------------------

    def _claim_folder(self, identity: dict[str, Any]) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        record = {"loop": self.config.model_dump(), "stage": identity}
        record = json.loads(json.dumps(record, default=str))
        path = self.output / "run.json"
        if path.exists():
            found = json.loads(path.read_text())
            changed = sorted(
                f"{part}.{key}"
                for part in ("loop", "stage")
                for key in {*record[part], *found.get(part, {})}
                if record[part].get(key) != found.get(part, {}).get(key)
                and key not in {"max_steps", "save_every_s", "log_every_steps", "tensorboard"}
            )
            if changed:
                raise ValueError(
                    f"{self.output} holds a run with other settings ({', '.join(changed)}); "
                    "repeat its settings to resume it, or choose another output folder"
                )
        if self.accelerator.is_main_process:
            path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")

    @property
    def _state(self) -> Path:
        return self.output / "state"

    def _trained(self) -> dict[str, nn.Parameter]:
        module = self.accelerator.unwrap_model(self.module)
        return {name: p for name, p in module.named_parameters() if p.requires_grad}

    def save_state(self) -> None:
        """Write weights, optimiser and progress so that a kill at any moment loses nothing."""
        self._last_saved = time.monotonic()
        if not self.accelerator.is_main_process:
            return
        fresh = self.output / "state.new"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        trained = self._trained()
        save_file({name: p.detach().cpu().contiguous() for name, p in trained.items()},
                  fresh / "weights.safetensors")  # fmt: skip
        moments: dict[str, Tensor] = {}
        for name, parameter in trained.items():
            for key, value in self.optimiser.state.get(parameter, {}).items():
                moments[f"{name}:{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
        save_file(moments, fresh / "optimiser.safetensors")
        progress = {name: getattr(self.progress, name) for name in Progress.__slots__}
        (fresh / "progress.json").write_text(json.dumps(progress))
        old = self.output / "state.old"
        shutil.rmtree(old, ignore_errors=True)
        if self._state.exists():
            self._state.rename(old)
        fresh.rename(self._state)
        shutil.rmtree(old, ignore_errors=True)

    def _resume(self) -> None:
        state = self._state
        if not state.exists() and (self.output / "state.old").exists():
            state = self.output / "state.old"  # killed between the two renames
        if not state.exists():
            return
        trained = self._trained()
        weights = load_file(state / "weights.safetensors")
        if weights.keys() != trained.keys():
            raise ValueError(f"{state} holds other trained tensors than this stage has")
        moments = load_file(state / "optimiser.safetensors")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(weights[name])
                entries = {
                    key.rsplit(":", 1)[1]: value
                    for key, value in moments.items()
                    if key.rsplit(":", 1)[0] == name
                }
                self.optimiser.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device)
                    for key, value in entries.items()
                }
        self.progress = Progress(**json.loads((state / "progress.json").read_text()))
        self._truncate_metrics()

    def _truncate_metrics(self) -> None:
        """Drop what was logged after the state that is resumed."""
        path = self.output / "metrics.jsonl"
        if path.exists() and self.accelerator.is_main_process:
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            kept = [line for line in lines if line["step"] <= self.progress.step]
            path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def _tensorboard(self) -> Any:  # noqa: ANN401 - an optional package's class
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - optional

        return SummaryWriter(str(self.output / "tensorboard"))

    def _log(self, record: dict[str, float]) -> None:
        if not self.accelerator.is_main_process:
            return
        with (self.output / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self._writer is not None:
            for name, value in record.items():
                self._writer.add_scalar(name, value, record["step"])

    # -- the run -------------------------------------------------------------------------------

    def run(self) -> None:
        """Train until the last epoch, then write the product."""
        first = self.progress.epoch
        for epoch in range(first, self.config.epochs):
            finished = self._epoch(epoch)
            if not finished:
                self.save_state()
                return
            self.progress.epoch, self.progress.batch = epoch + 1, 0
            self._validate()
            self.save_state()
        if self.accelerator.is_main_process:
            self.stage.save(self.output)
            plot_curves(self.output / "metrics.jsonl", self.output / "curves.png")

    def _validate(self) -> None:
        module = self.accelerator.unwrap_model(self.module)
        module.eval()
        with torch.no_grad(), self.accelerator.autocast():
            figures = self.stage.validate(module)
        if figures:
            record = {"step": self.progress.step, "epoch": self.progress.epoch}
            self._log(record | {f"dev_{name}": value for name, value in figures.items()})
            if self.accelerator.is_main_process:
                line = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
                tqdm.write(f"epoch {self.progress.epoch}  dev  {line}")
                plot_curves(self.output / "metrics.jsonl", self.output / "curves.png")

    def _epoch(self, epoch: int) -> bool:
        """Train one epoch from where the run stands; false when `max_steps` stopped it."""
        ranks = self.accelerator
        batches = self.stage.epoch(epoch, ranks.process_index, ranks.num_processes)
        total = len(batches)
        bar = tqdm(
            total=total,
            initial=self.progress.batch,
            desc=f"epoch {epoch + 1}/{self.config.epochs}",
            unit="batch",
            disable=not ranks.is_local_main_process,
            mininterval=2.0,
        )
        window = _Window()
        self.module.train()
        with bar:
            for index, batch in enumerate(
                batches.iterate(self.progress.batch), start=self.progress.batch
            ):
                done = (epoch + index / total) / self.config.epochs
                last = index == total - 1
                stepped = self._step(batch, (epoch, index), done, window, last=last)
                self.progress.batch = index + 1
                bar.update()
                if stepped and self.progress.step % self.config.log_every_steps == 0:
                    window = self._report(window, done, bar)
                if stepped and time.monotonic() - self._last_saved > self.config.save_every_s:
                    self.save_state()
                if self.config.max_steps is not None and (
                    self.progress.step >= self.config.max_steps
                ):
                    return False
        return True

    def _step(
        self, batch: Batch, place: tuple[int, int], done: float, window: _Window, *, last: bool
    ) -> bool:
        """One batch forward and backward; true when the optimiser stepped."""
        epoch, index = place
        seed = (self.config.seed, epoch, index, self.accelerator.process_index)
        torch.manual_seed(hash(seed) & 0x7FFFFFFF)
        stepping = last or (index + 1) % self.config.grad_accumulation == 0
        self.accelerator.gradient_state._set_sync_gradients(stepping)
        factor = learning_rate_factor(self.config, self.progress.step, done)
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.learning_rate * factor * group.get("lr_scale", 1.0)
        with self.accelerator.autocast():
            outputs = self.module(batch)
        loss = outputs["loss"]
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {float(loss)} at epoch {epoch}, batch {index}; lower the learning "
                "rate, or look for damaged audio in that batch"
            )
        self.accelerator.backward(loss)
        if stepping:
            norm = self.accelerator.clip_grad_norm_(
                self.module.parameters(), self.config.max_grad_norm
            )
            outputs = {**outputs, "grad_norm": norm}
            self.optimiser.step()
            self.optimiser.zero_grad()
            self.progress.step += 1
        audio_s = float(batch["audio_s"]) * self.accelerator.num_processes
        self.progress.audio_s += audio_s
        window.add(outputs, audio_s)
        return stepping

    def _report(self, window: _Window, done: float, bar: Any) -> _Window:  # noqa: ANN401 - tqdm
        elapsed = time.monotonic() - window.started
        self.progress.elapsed_s += elapsed
        rate = window.audio_s / elapsed
        learning_rate = self.optimiser.param_groups[0]["lr"]
        means = window.means()
        record = {
            "step": self.progress.step,
            "epoch": round(done * self.config.epochs, 4),
            "learning_rate": learning_rate,
            "audio_s_per_s": round(rate, 2),
            "elapsed_s": round(self.progress.elapsed_s, 1),
            **means,
        }
        self._log(record)
        remaining_s = self.progress.elapsed_s * (1 - done) / max(done, 1e-9)
        bar.set_postfix_str(
            f"loss {means['loss']:.3f}  lr {learning_rate:.1e}  {rate:.0f} audio-s/s  "
            f"run ETA {remaining_s / 60:.0f} min"
        )
        return _Window()
