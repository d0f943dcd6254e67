"""What the engine costs its host beside the model's own work: CPU time a clip.

    python -m benchmarks.host

On a GPU the device's thread does nothing else, and shares the interpreter with the event loop. The
model here is so thin that it computes next to nothing, and runs as on a GPU: padded batches, shapes
as if recorded, a step launched ahead. Encoding and prefill are left out, since log-mel is real work
of the CPU here; a step still holds what torch takes for each of its operations.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.report import describe_machine, markdown_table
from benchmarks.shapes import make_checkpoint
from model.log_mel import SAMPLE_RATE_HZ
from model.transcription import Transcriber
from server.engine.core import EngineCore
from server.engine.interface import EngineRequest
from server.engine.runner import SpeechRunner
from server.engine.scheduler import ScheduleLimits

if TYPE_CHECKING:
    from collections.abc import Callable

CLIP_S = 8.0
TOKENS_PER_AUDIO_S = 2.5  # 20 tokens: the loop guard looks, and has nothing to find
LEFT_OUT = "encode and prefill"
PARTS = {
    "plan": "plan",
    "start": LEFT_OUT,
    "begin_step": "launch steps",
    "finish_step": "await tokens",
    "release": "free rows",
    "text": "tokens to text",
}
REST = "schedule, answers, guards"


class TimedRunner:
    """Hands everything on to a runner, and counts the thread's CPU time of each part."""

    def __init__(self, runner: SpeechRunner) -> None:
        """Begin at nothing."""
        self._runner = runner
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the runner has
        found = getattr(self._runner, name)
        return self._timed(name, found) if name in PARTS else found

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: object, **options: object) -> Any:  # noqa: ANN401 - likewise
            began_s = time.thread_time()
            try:
                return call(*args, **options)
            finally:
                self.seconds[PARTS[name]] += time.thread_time() - began_s

        return run


def transcribe(runner: SpeechRunner, clips: int) -> dict[str, float]:
    """Give the engine as many clips at once; CPU ms a clip of each part, and of the rest."""
    rng = np.random.default_rng(0)
    waveform = rng.normal(0, 0.1, round(CLIP_S * SAMPLE_RATE_HZ)).astype(np.float32)
    timed = TimedRunner(runner)
    core = EngineCore(timed, ScheduleLimits(runner.n_slots))
    began_s, now_s = time.thread_time(), time.monotonic()
    for key in range(clips):
        request = EngineRequest(str(key), waveform, CLIP_S, deadline_s=now_s + 1000)
        core.submit(key, request, now_s)
    while core.idle_s() is not None:
        core.iterate()
    total_s = time.thread_time() - began_s
    total_s -= timed.seconds.pop(LEFT_OUT)
    seconds = {**timed.seconds, REST: total_s - sum(timed.seconds.values()), "all": total_s}
    return {part: 1000 * spent_s / clips for part, spent_s in seconds.items()}


def main(
    clips: Annotated[int, typer.Option(min=1)] = 1024,
    slots: Annotated[int, typer.Option(min=1)] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="The fastest counts.")] = 5,
) -> None:
    """Print CPU ms a clip."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint("thin", Path(folder) / "thin", TOKENS_PER_AUDIO_S)
        transcriber = Transcriber.from_pretrained(str(checkpoint), device="cpu", dtype="fp32")
        runner = SpeechRunner(
            transcriber,
            max_slots=slots,
            pads_batches=True,
            record=lambda run: run,
            runs_ahead=True,
        )
        transcribe(runner, slots)
        measured = [transcribe(runner, clips) for _ in range(rounds)]
    best = min(measured, key=lambda each: each["all"])
    rows = [[part, f"{best[part]:.3f}"] for part in best]
    typer.echo(describe_machine())
    typer.echo(markdown_table([f"{clips} clips, {slots} slots", "CPU ms a clip"], rows))


if __name__ == "__main__":
    typer.run(main)
