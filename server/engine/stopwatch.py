"""How long a device works on what is launched on it, without waiting for it meanwhile."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch


class Stopwatch:
    """Counts the seconds between marks: of the device where it works by itself, else of the host.

    On a CUDA device, that of the current stream.
    """

    def __init__(self, device: torch.device) -> None:
        """Begin the first lap."""
        self._is_cuda = device.type == "cuda"
        self._laps: list[str] = []
        self._marks: list[Any] = []  # events, or seconds
        self._mark()

    def lap(self, name: str) -> None:
        """End the lap, which counts as `name`, and begin the next."""
        self._laps.append(name)
        self._mark()

    def seconds(self) -> dict[str, float]:
        """Wait for the end of the last lap; what all laps of each name took."""
        if self._is_cuda:
            self._marks[-1].synchronize()
        taken_s: defaultdict[str, float] = defaultdict(float)
        for name, began, ended in zip(self._laps, self._marks, self._marks[1:], strict=False):
            taken_s[name] += began.elapsed_time(ended) / 1000 if self._is_cuda else ended - began
        return dict(taken_s)

    def _mark(self) -> None:
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())
