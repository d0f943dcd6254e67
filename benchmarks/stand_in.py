"""A stand-in for a GPU: it computes nothing, and is busy for as long as one was measured to be.

What the engine does on its host, and whether a GPU would wait for it, can be seen without one.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from model.transcription import Transcriber
from server.engine.decode_step import _Stage
from server.engine.decoder_pass import LlamaPass
from server.engine.direct_memory import DirectMemory
from server.engine.runner import SpeechRunner

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from server.engine.kv_slots import KVSlots
    from server.engine.packed_prompts import PackedPrompts
    from server.engine.recordings import Recordings

MEL_FRAMES_A_SECOND = 100
_SPOKEN_IDS = (300, 1000)  # of tokens that stand for text


class StandInGPU:
    """One after another, it works off what is launched; its times are those of one H100, in bf16.

    Of Qwen2.5-0.5B's shape behind whisper-tiny's encoder: `results/gpu-h100.json` and what NOTES
    tells of recorded prefills.
    """

    def __init__(self) -> None:
        """Begin idle."""
        self.free_s = 0.0

    def launch(self, busy_ms: float) -> None:
        """Be busy for so long, behind what was launched before."""
        self.free_s = max(self.free_s, time.perf_counter()) + busy_ms / 1000

    def run(self, shape: Sequence[Any]) -> None:
        """Be busy for as long as a recording of that shape."""
        if shape[0] == "step":
            self.launch(0.57 + 0.004 * shape[1])  # rows
        elif shape[0] == "prefill":
            self.launch(0.45 + 0.0015 * shape[1])  # tokens
        else:
            self.launch(0.4 + 0.000055 * shape[0] * shape[1])  # clips and mel frames of each


class _Event:
    """What torch.cuda.Event is to a GPU, as far as a step needs it."""

    def __init__(self, gpu: StandInGPU) -> None:
        self._gpu = gpu
        self._reached_s = 0.0

    def record(self) -> None:
        self._reached_s = self._gpu.free_s

    def synchronize(self) -> None:
        time.sleep(max(0.0, self._reached_s - time.perf_counter()))


class _Replays:
    """Has the stand-in run recordings, and words come out of steps."""

    def __init__(self, recordings: Recordings, gpu: StandInGPU) -> None:
        self._recordings = recordings
        self._gpu = gpu
        ids = np.random.default_rng(0).integers(*_SPOKEN_IDS, 1 << 18).astype(np.float64)
        self._said = torch.from_numpy(ids)
        self._next = 0
        self.is_able = True

    def replay(self, shape: tuple[Any, ...], run: Callable[[], Any]) -> Any:  # noqa: ANN401 - what `run` gives
        output = self._recordings.replay(shape, run)
        self._gpu.run(shape)
        if shape[0] == "step":
            _, best = output
            count = best.shape[1]
            if self._next + count > len(self._said):
                self._next = 0
            best[0], best[1] = 1.0, self._said[self._next : self._next + count]
            self._next += count
        return output


class _NoPass(LlamaPass):
    """Packs prompts, as the pass of a GPU does, and reads none of them."""

    reads_own_lengths = True

    def prefill_packed(self, prompts: PackedPrompts, slots: KVSlots) -> None:
        """Nothing that would take time."""


def make_runner(checkpoint: Path, *, slots: int, clip_s: float) -> SpeechRunner:
    """Make a runner of a `thin` checkpoint for clips that are all equally long.

    Log-mel, which a CPU would take long for, is left out. Clips that do not lie in shared memory
    are copied once, as they would be into pinned memory.
    """
    transcriber = Transcriber.from_pretrained(str(checkpoint), device="cpu", dtype="fp32")
    gpu = StandInGPU()

    def record(run: Callable[[], Any]) -> Callable[[], Any]:
        output = run()
        return lambda: output

    runner = SpeechRunner(
        transcriber,
        max_slots=slots,
        pads_batches=True,
        make_pass=_NoPass,
        record=record,
        runs_ahead=True,
        direct_memory=DirectMemory(lambda _address, _size: True, lambda _addresses: None),
    )
    _leave_out_log_mel(transcriber, clip_s, most_clips=slots)
    step: Any = runner._decode
    encode: Any = runner._encode
    event: Any = _Event
    step._stages = [_Stage(each.numbers, each.best, event(gpu)) for each in step._stages]
    step._recordings = _Replays(step._recordings, gpu)
    encode._recordings = _Replays(encode._recordings, gpu)
    kv_slots: Any = runner._slots
    kv_slots._move = lambda _moves: None
    return runner


def _leave_out_log_mel(transcriber: Transcriber, clip_s: float, *, most_clips: int) -> None:
    processor: Any = transcriber.processor
    n_mels = processor.feature_extractor.feature_size
    n_frames = round(clip_s * MEL_FRAMES_A_SECOND)
    pinned = torch.empty(most_clips, n_frames * 160)
    empty = torch.zeros(1, n_mels, n_frames)

    def features(
        waveforms: Sequence[NDArray[np.float32]], _device: object, *, fetches: bool
    ) -> tuple[Tensor, Tensor]:
        if not fetches:
            for row, waveform in zip(pinned.numpy(), waveforms, strict=False):
                row[: waveform.size] = waveform
        count = len(waveforms)
        return empty.expand(count, -1, -1), torch.full((count,), n_frames)

    processor.features = features
