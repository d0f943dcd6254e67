"""Silero VAD: how likely it is that somebody speaks, for every 32 ms. No torch.

Of the silero-vad package only its ONNX model is used, by onnxruntime; its code imports torch. The
model is the one that takes many frames a call and runs its LSTM over them.

Source: https://github.com/snakers4/silero-vad, version 6 (`sequence_vad.py`); MIT.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

# Otherwise its Linux wheels (from 1.29 on) note what models are run and send it to their makers.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime  # reads the variable as it is loaded

if TYPE_CHECKING:
    from numpy.typing import NDArray

FRAME_SAMPLES = 512  # 32 ms at 16 kHz
_CONTEXT_SAMPLES = 64  # of the frame before, in front of each
_STATE_SHAPE = (1, 1, 128)  # of the LSTM's hidden state, and of its cell
_BLOCK_FRAMES = 256  # frames a call; bounds its memory
_LEAD_FRAMES = 8  # 0.26 s


class SpeechDetector:
    """Reads one recording, block by block."""

    def __init__(self) -> None:
        """Begin before the first sample, as if it came out of silence.

        Heard from nothing on, words that begin at once are missed: of single digits cut close, a
        third.

        Raises:
            FileNotFoundError: the silero-vad package is not installed.
        """
        self._session = _load()
        self._hidden = np.zeros(_STATE_SHAPE, np.float32)
        self._cell = np.zeros(_STATE_SHAPE, np.float32)
        self._context = np.zeros((1, _CONTEXT_SAMPLES), np.float32)
        self._run(np.zeros((_LEAD_FRAMES, FRAME_SAMPLES), np.float32))

    def push(self, frames: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the probability of speech (n,) in the next frames (n, FRAME_SAMPLES)."""
        found = [
            self._run(frames[start : start + _BLOCK_FRAMES])
            for start in range(0, len(frames), _BLOCK_FRAMES)
        ]
        return np.concatenate(found) if found else np.zeros(0, np.float32)

    def _run(self, frames: NDArray[np.float32]) -> NDArray[np.float32]:
        ends = frames[:, -_CONTEXT_SAMPLES:]
        contexts = np.concatenate([self._context, ends[:-1]])
        self._context = ends[-1:].copy()
        inputs = {
            "input": np.concatenate([contexts, frames], axis=1),
            "h": self._hidden,
            "c": self._cell,
        }
        outputs = self._session.run(["speech_probs", "hn", "cn"], inputs)
        self._hidden, self._cell = outputs[1], outputs[2]
        return np.asarray(outputs[0], np.float32).reshape(-1)


@functools.cache
def _load() -> onnxruntime.InferenceSession:
    spec = importlib.util.find_spec("silero_vad")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the package silero-vad is not installed")
    folder = Path(spec.submodule_search_locations[0])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(
        folder / "data" / "silero_vad_16k_sequence.onnx",
        options,
        providers=["CPUExecutionProvider"],
    )
