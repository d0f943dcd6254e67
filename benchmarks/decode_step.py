"""What one decode step takes, and what the machine would let it take.

    python -m benchmarks.decode_step --shape small --rows 1,8,32

Ways, each timed in every round so that the machine's drift hits all of them:

- engine: the runner's step, token choice included.
- engine, LLM's own forward: the same through transformers' `forward`.
- generate: a step of transformers' `generate`, from two runs of different length.
- linear layers: the LLM's matrix products alone, each called as in the model.
- bytes: weights, keys and values over the measured read bandwidth. A model that stays in the
  processor's cache is below it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional

from benchmarks.report import markdown_table, write_report
from benchmarks.shapes import Shape, make_checkpoint
from model.log_mel import SAMPLE_RATE_HZ
from model.transcription import Transcriber
from server.engine.decoder_pass import ModelPass
from server.engine.kv_slots import layer_shapes
from server.engine.packed_linear import PackedLinear
from server.engine.recordings import CudaGraphs
from server.engine.runner import SpeechRunner, use_cpu_threads

if TYPE_CHECKING:
    from collections.abc import Callable


ENGINE = "engine"
ENGINE_OWN_FORWARD = "engine, LLM's own forward"
GENERATE = "generate"
LINEAR = "linear layers"
BYTES = "bytes"
WAYS = (ENGINE, ENGINE_OWN_FORWARD, GENERATE, LINEAR, BYTES)
BANDWIDTH_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}  # on a GPU, long against a launch
BANDWIDTH_READS = 5
FRAME_HZ = 50  # of Whisper's encoder


@dataclass(slots=True)
class Times:
    """Of single steps, seconds: on the clock, and of the processor, all threads together."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def add(self, run: Callable[[], None], steps: int) -> None:
        """Time a run of so many steps."""
        _wait_for_gpu()
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        run()
        _wait_for_gpu()
        self.wall_s.append((time.perf_counter() - wall_s) / steps)
        self.cpu_s.append((time.process_time() - cpu_s) / steps)

    @property
    def wall_ms(self) -> float:
        """Median, milliseconds."""
        return 1000 * statistics.median(self.wall_s)

    @property
    def cpu_ms(self) -> float:
        """Median, milliseconds."""
        return 1000 * statistics.median(self.cpu_s)


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class EngineSteps:
    """A runner with all its rows started on clips of equal length."""

    def __init__(self, runner: SpeechRunner, rows: int, clip_s: float) -> None:
        """Encode and prefill."""
        self._runner, self._rows = runner, slice(0, rows)
        rng = np.random.default_rng(0)
        clips = rng.normal(0, 0.1, (rows, round(clip_s * SAMPLE_RATE_HZ))).astype(np.float32)
        runner.start([runner.plan(clip) for clip in clips])

    def run(self, steps: int) -> None:
        """Run decode steps from the prompt on, as the engine does."""
        for row in range(self._rows.stop):
            self._runner.restart(row, 1.0)
        if not self._runner.may_run_ahead:
            for _ in range(steps):
                self._runner.step(self._rows)
            return
        self._runner.begin_step()
        for _ in range(steps - 1):
            self._runner.begin_step()
            self._runner.finish_step()
        self._runner.finish_step()

    def end(self) -> None:
        """Free the rows."""
        self._runner.release(range(self._rows.stop))


@torch.inference_mode()
def run_generate(transcriber: Transcriber, rows: int, context: int, steps: int) -> None:
    """Prefill, and `steps` decode steps."""
    llm = transcriber.model.llm
    ids = torch.randint(llm.config.vocab_size, (rows, context), device=transcriber.device)
    count = steps + 1  # the prefill gives the first token
    llm.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=count,
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )


def time_generate(
    times: Times, transcriber: Transcriber, rows: int, context: int, steps: int
) -> None:
    """Subtract a run of one step from one of `steps` more."""
    short, long = Times(), Times()
    short.add(lambda: run_generate(transcriber, rows, context, 1), 1)
    long.add(lambda: run_generate(transcriber, rows, context, 1 + steps), 1)
    times.wall_s.append((long.wall_s[0] - short.wall_s[0]) / steps)
    times.cpu_s.append((long.cpu_s[0] - short.cpu_s[0]) / steps)


class LinearLayers:
    """The LLM's matrix products, without anything between them."""

    def __init__(self, transcriber: Transcriber, rows: int) -> None:
        """Take every linear layer, the output layer included."""
        llm = transcriber.model.llm
        linears = [each for each in llm.modules() if isinstance(each, nn.Linear | PackedLinear)]
        # Random, since the engine's weights may be packed; products take as long with any.
        make = partial(torch.randn, device=llm.device, dtype=llm.dtype)
        self._calls = [(make(each.out_features, each.in_features), each.bias) for each in linears]
        widths = {each.in_features for each in linears}
        self._inputs = {width: make(rows, width) for width in widths}
        self.bytes = sum(weight.nbytes for weight, _ in self._calls)

    @torch.inference_mode()
    def run(self, steps: int) -> None:
        """Call them all, `steps` times."""
        for _ in range(steps):
            for weight, bias in self._calls:
                functional.linear(self._inputs[weight.shape[1]], weight, bias)


def token_bytes(transcriber: Transcriber) -> int:
    """Keys and values of one token."""
    llm = transcriber.model.llm
    widths = sum(each.n_heads * (each.key_width + each.value_width) for each in layer_shapes(llm))
    return widths * int(llm.dtype.itemsize)


def measure_bandwidth(device: torch.device) -> float:
    """Bytes a second that a sum over a large buffer reads; the best of some."""
    buffer = torch.ones(BANDWIDTH_BYTES[device.type] // 4, device=device)
    seconds = []
    for _ in range(BANDWIDTH_READS):
        started = time.perf_counter()
        buffer.sum().item()
        seconds.append(time.perf_counter() - started)
    return buffer.nbytes / min(seconds)


def measure(
    transcriber: Transcriber,
    rows: int,
    *,
    generating: Transcriber,
    steps: int,
    rounds: int,
    clip_s: float,
) -> dict[str, Times]:
    """Time every way at one batch size.

    Args:
        transcriber: for the engine, which may pack its weights.
        rows: batch size.
        generating: the same checkpoint, for `generate`.
        steps: in one measurement.
        rounds: that are measured.
        clip_s: context, seconds of audio.
    """
    times: defaultdict[str, Times] = defaultdict(Times)
    record = CudaGraphs() if transcriber.device.type == "cuda" else None
    runners = {
        ENGINE_OWN_FORWARD: SpeechRunner(transcriber, max_slots=rows, make_pass=ModelPass),
        ENGINE: SpeechRunner(transcriber, max_slots=rows, record=record),
    }
    engines = {name: EngineSteps(runner, rows, clip_s) for name, runner in runners.items()}
    linear = LinearLayers(transcriber, rows)
    context = round(clip_s * FRAME_HZ / transcriber.model.connector.stack_size)
    read = linear.bytes + rows * (context + steps // 2) * token_bytes(transcriber)
    for number in range(rounds + 1):
        round_times = times if number else defaultdict(Times)  # the first warms up
        for name, engine in engines.items():
            round_times[name].add(lambda engine=engine: engine.run(steps), steps)  # type: ignore[misc]  # mypy cannot infer a lambda with defaults
        time_generate(round_times[GENERATE], generating, rows, context, steps)
        round_times[LINEAR].add(lambda: linear.run(steps), steps)
        seconds = read / measure_bandwidth(transcriber.device)
        round_times[BYTES].wall_s.append(seconds)
        round_times[BYTES].cpu_s.append(seconds * torch.get_num_threads())
    for engine in engines.values():
        engine.end()
    return dict(times)


def tabulate(measured: dict[int, dict[str, Times]]) -> str:
    """One row a batch size and way."""
    rows = []
    for batch, times in measured.items():
        for name in WAYS:
            over = times[name].cpu_ms / times[LINEAR].cpu_ms
            wall, cpu = f"{times[name].wall_ms:.2f}", f"{times[name].cpu_ms:.2f}"
            rows.append([f"{batch} · {name}", wall, cpu, f"{over:.2f}"])
    return markdown_table(["rows · way", "wall ms", "CPU ms", "x linear layers (CPU)"], rows)


def plot(measured: dict[int, dict[str, Times]], title: str) -> Figure:
    """Wall time of a step over the batch size, one line a way."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in WAYS:
        axes.plot(
            list(measured), [times[name].wall_ms for times in measured.values()], "o-", label=name
        )
    axes.set(xscale="log", yscale="log", xlabel="rows", ylabel="ms a step", title=title)
    axes.set_xticks(list(measured), [str(batch) for batch in measured])
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def main(
    shape: Annotated[Shape, typer.Option(help="Model; see benchmarks/shapes.py.")] = "small",
    rows: Annotated[str, typer.Option(help="Batch sizes.")] = "1,8,32",
    steps: Annotated[int, typer.Option(min=1, help="In one measurement.")] = 20,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    clip_s: Annotated[float, typer.Option(min=0.5, max=20, help="Context, seconds of audio.")] = 8,
    device: Annotated[str, typer.Option()] = "auto",
    dtype: Annotated[str, typer.Option()] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="0: all cores.")] = 0,
    output: Annotated[Path, typer.Option(help="Without suffix.")] = Path(
        "benchmarks/results/decode-step"
    ),
) -> None:
    """Time decode steps."""
    use_cpu_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        path = make_checkpoint(shape, Path(folder), tokens_per_audio_s=8)
        transcriber, generating = (
            Transcriber.from_pretrained(path, device=device, dtype=dtype) for _ in range(2)
        )
    counts = {"steps": steps, "rounds": rounds}
    measured = {
        batch: measure(transcriber, batch, generating=generating, clip_s=clip_s, **counts)
        for batch in map(int, rows.split(","))
    }
    title = f"Decode step, {shape}, {transcriber.device.type}, {transcriber.model.dtype}"
    table = tabulate(measured)
    print(table)  # noqa: T201 - the command's answer
    figures = {
        str(batch): {
            name: {"wall_ms": each.wall_ms, "cpu_ms": each.cpu_ms, "wall_s": each.wall_s}
            for name, each in times.items()
        }
        for batch, times in measured.items()
    }
    options = {"shape": shape, "dtype": str(transcriber.model.dtype), "clip_s": clip_s}
    write_report(
        output,
        {**options, "steps": steps, "rounds": rounds, "rows": figures},
        f"## {title}, clips of {clip_s:g} s\n\n{table}",
        plot(measured, title),
    )


if __name__ == "__main__":
    typer.run(main)
