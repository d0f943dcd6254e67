"""The one training loop, shared by every stage.

A stage brings a module whose forward turns a batch into a loss, and batches that are a pure
function of (epoch, index). All randomness of a step derives from (seed, epoch, index, rank), so a
run that was killed and resumed follows the curve of one that was not.

Several processes (`accelerate launch`, `torchrun`) train one run: each takes its share of every
epoch, the first of them writes the run folder.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from pydantic import BaseModel, ConfigDict, Field
from tqdm import tqdm

from model.training.run_folder import RunFolder, Window

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import FrameType

    from torch import Tensor, nn

Batch = dict[str, Any]
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Validation and saving happen on one process; the others wait as long as this.
_PATIENCE = timedelta(hours=6)


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
        """Trained parameters.

        In a group, `lr_scale` multiplies the learning rate, and `frozen_steps` puts its start (and
        its warm-up) off by so many optimiser steps.
        """

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


def learning_rate_factor(config: LoopConfig, step: int, done: float) -> float:
    """Linear warm-up, then cosine decay over the fraction of the run that is `done` in [0, 1].

    Before step 0 it is 0.
    """
    warmup = min(1.0, max(0, step + 1) / max(1, config.warmup_steps))
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
            ValueError: `output` holds a run with other settings or a damaged state, or
                TensorBoard is asked for and not installed.
        """
        self.stage = stage
        self.config = config
        self.output = output
        # Autocast is the loop's own: accelerate's precision is one for the whole process.
        self.accelerator = Accelerator(
            mixed_precision="no",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
        )
        self._stop_signal: int | None = None
        self._folder = RunFolder(output)
        settings = {"loop": config.model_dump(), "stage": identity}
        self._folder.check(settings)
        self.accelerator.wait_for_everyone()  # all have read what the first one now writes
        if self.is_main_process:
            self._folder.claim(settings)
        optimiser = torch.optim.AdamW(
            stage.parameter_groups(),
            lr=config.learning_rate,
            betas=(0.9, config.beta2),
            weight_decay=config.weight_decay,
        )
        self.module, self.optimiser = self.accelerator.prepare(stage.module, optimiser)
        self.progress = self._folder.load_state(self._trained(), self.optimiser)
        self.accelerator.wait_for_everyone()
        self._writer: Any = None
        if self.is_main_process:
            self._folder.truncate_metrics(self.progress.step, self.progress.epoch)
            self._writer = self._tensorboard() if config.tensorboard else None
        self._last_saved = self._clock = time.monotonic()

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the run folder."""
        return bool(self.accelerator.is_main_process)

    def _trained(self) -> dict[str, nn.Parameter]:
        module = self.accelerator.unwrap_model(self.module)
        return {name: p for name, p in module.named_parameters() if p.requires_grad}

    def save_state(self) -> None:
        """Write weights, optimiser and progress so that a kill loses no more than what follows."""
        self._last_saved = time.monotonic()
        if self.is_main_process:
            self._folder.save_state(self._trained(), self.optimiser, self.progress)

    def _tensorboard(self) -> Any:  # noqa: ANN401 - an optional package's class
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - optional
        except ImportError as error:
            raise ValueError(
                "TensorBoard is not installed: pip install 'speechllm[tensorboard]'"
            ) from error
        return SummaryWriter(str(self.output / "tensorboard"), purge_step=self.progress.step + 1)

    def _log(self, record: dict[str, float]) -> None:
        if not self.is_main_process:
            return
        self._folder.log(record)
        if self._writer is not None:
            for name, value in record.items():
                self._writer.add_scalar(name, value, record["step"])
            self._writer.flush()

    def run(self) -> bool:
        """Train until the last epoch, then write the product: the last epoch's weights.

        Returns:
            False when `max_steps` or a signal (SIGINT, SIGTERM) stopped the run before its end;
            its state is saved, and the same command goes on from there.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        with self._stopping_at_a_step():
            finished = all(
                self._epoch(epoch) for epoch in range(self.progress.epoch, self.config.epochs)
            )
        if not finished:
            self.save_state()
        elif self.is_main_process:
            self.stage.save(self.output)
        if self.is_main_process:
            self._folder.plot()
        if self._writer is not None:
            self._writer.close()
        self.accelerator.end_training()
        return finished

    @contextmanager
    def _stopping_at_a_step(self) -> Iterator[None]:
        """Let a signal end the run after the step in hand, whose state is whole.

        A second signal does what it did before.
        """

        def note(number: int, _frame: FrameType | None) -> None:
            self._stop_signal = number
            signal.signal(number, former[signal.Signals(number)])

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
        for number in _STOP_SIGNALS:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _epoch(self, epoch: int) -> bool:
        """Train one epoch from where the run stands and validate; false when it was stopped."""
        if self._should_stop():
            return False
        ranks = self.accelerator
        batches = self.stage.epoch(epoch, ranks.process_index, ranks.num_processes)
        if epoch == 0 and self.is_main_process:
            self._warn_of_long_warmup(len(batches))
        self.module.train()
        self._clock = time.monotonic()
        with tqdm(
            total=len(batches),
            initial=self.progress.batch,
            desc=f"epoch {epoch + 1}/{self.config.epochs}",
            unit="batch",
            disable=not ranks.is_local_main_process,
            mininterval=2.0,
        ) as bar:
            start = self.progress.batch
            for index, batch in enumerate(batches.iterate(start), start=start):
                done = (epoch + index / len(batches)) / self.config.epochs
                stepped = self._step(batch, (epoch, index, len(batches)), done)
                self.progress.batch = index + 1
                bar.update()
                if stepped and self.progress.step % self.config.log_every_steps == 0:
                    self._report(done, bar)
                if stepped and time.monotonic() - self._last_saved > self.config.save_every_s:
                    self.save_state()
                # An epoch that is through is validated before the run may stop.
                if stepped and index + 1 < len(batches) and self._should_stop():
                    return False
        self.progress.epoch, self.progress.batch = epoch + 1, 0
        self._validate()
        self.save_state()
        return True

    def _warn_of_long_warmup(self, n_batches: int) -> None:
        """A run that ends in its warm-up has hardly learnt anything, and nothing else shows it."""
        n_steps = self.config.epochs * math.ceil(n_batches / self.config.grad_accumulation)
        if 2 * self.config.warmup_steps > n_steps:
            tqdm.write(
                f"warning: {self.config.warmup_steps} steps of warm-up in about {n_steps}; "
                f"--warmup-steps {n_steps // 10} leaves it time at the full learning rate"
            )

    def _should_stop(self) -> bool:
        """Whether `max_steps` is reached or any process got a signal."""
        limit = self.config.max_steps
        if limit is not None and self.progress.step >= limit:
            return True
        stopped = self._stop_signal is not None
        if self.accelerator.num_processes == 1:
            return stopped
        votes = torch.tensor(float(stopped), device=self.accelerator.device)
        return bool(self.accelerator.reduce(votes, reduction="sum") > 0)

    def _step(self, batch: Batch, place: tuple[int, int, int], done: float) -> bool:
        """One batch forward and backward; true when the optimiser stepped.

        `place` is the epoch, the batch's index in it, and the number of batches.
        """
        epoch, index, total = place
        self._seed(epoch, index)
        # The last window of an epoch may be short; its gradient is the mean of what it has.
        first = index // self.config.grad_accumulation * self.config.grad_accumulation
        size = min(self.config.grad_accumulation, total - first)
        stepping = index == first + size - 1
        for group in self.optimiser.param_groups:
            step = self.progress.step - group.get("frozen_steps", 0)
            factor = learning_rate_factor(self.config, step, done)
            group["lr"] = self.config.learning_rate * factor * group.get("lr_scale", 1.0)
        with nullcontext() if stepping else self.accelerator.no_sync(self.module):
            with self._autocast():
                outputs: dict[str, Tensor] = self.module(batch)
            loss = outputs["loss"]
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss.item()} at epoch {epoch}, batch {index}; lower the "
                    "learning rate, or look for damaged audio in that batch"
                )
            self.accelerator.backward(loss / size)
        if stepping:
            norm = self.accelerator.clip_grad_norm_(
                self.module.parameters(), self.config.max_grad_norm
            )
            outputs = {**outputs, "grad_norm": norm}
            self.optimiser.step()
            self.optimiser.zero_grad()
            self.progress.step += 1
        values = {name: float(value.detach()) for name, value in outputs.items()}
        self._measure(values, float(batch["audio_s"]))
        return stepping

    def _autocast(self) -> torch.autocast:
        enabled = self.config.precision == "bf16"
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=enabled)

    def _seed(self, epoch: int, index: int) -> None:
        """Make the step's dropout and masks a function of its place and rank alone.

        numpy's SeedSequence mixes the numbers; its result is the same in every version.
        """
        entropy = (self.config.seed, epoch, index, self.accelerator.process_index)
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))

    def _measure(self, values: dict[str, float], audio_s: float) -> None:
        """Add a batch of all ranks to the log window; the time is that since the last batch."""
        n_ranks = self.accelerator.num_processes
        if n_ranks > 1:  # reduced now, so that the state of one rank is the state of all
            names = [*values, "audio_s"]
            local = torch.tensor([*values.values(), audio_s], device=self.accelerator.device)
            mean = self.accelerator.reduce(local, reduction="mean")
            values = dict(zip(names, mean.tolist(), strict=True))
            audio_s = values.pop("audio_s") * n_ranks
        self.progress.audio_s += audio_s
        self.progress.window.add(values, audio_s)
        now = time.monotonic()
        self.progress.window.elapsed_s += now - self._clock
        self.progress.elapsed_s += now - self._clock
        self._clock = now

    def _report(self, done: float, bar: Any) -> None:  # noqa: ANN401 - tqdm
        """Log the window's means and start a new window."""
        window = self.progress.window
        rate = window.audio_s / max(window.elapsed_s, 1e-9)
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
        self.progress.window = Window()

    def _validate(self) -> None:
        """Validate on the first process while the others wait, and log the figures."""
        if self.is_main_process:
            module = self.accelerator.unwrap_model(self.module)
            module.eval()
            # Decoding grows its shapes step by step: compiling for each would take minutes.
            eager = torch.compiler.set_stance("force_eager")
            with torch.no_grad(), self._autocast(), eager:
                figures = self.stage.validate(module)
            if figures:
                record = {"step": self.progress.step, "epoch": self.progress.epoch}
                self._log(record | {f"dev_{name}": value for name, value in figures.items()})
                line = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
                tqdm.write(f"epoch {self.progress.epoch}  dev  {line}")
                self._folder.plot()
        self.accelerator.wait_for_everyone()
