"""Waveforms in memory that a front end and the engine's process share.

The front end puts a clip's samples there and says where; the engine reads them in place. So the
engine's process, which every clip passes through, neither copies nor receives them.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

SAMPLE_BYTES = np.dtype(np.float32).itemsize
CHUNK_SAMPLES = 1 << 24  # 64 MiB; no waveform lies in two chunks, which may be pinned one by one
_ALIGNMENT = 1024  # samples; a page


@dataclass(frozen=True)  # no slots: with them, Python's own code pickles it, field by field
class Place:
    """Where a waveform lies: its first sample, and how many there are."""

    first: int
    size: int


class SharedSamples:
    """A file in memory of float32 samples. Only one process, the front end, hands out places.

    Memory is taken when it is first written to, and the lowest free place is taken first, so what
    is used is near what was in use at most.
    """

    def __init__(self, file: int) -> None:
        """Map a file that `create` made, in this process or in that which started it."""
        self.file = file
        self._samples = np.frombuffer(mmap.mmap(file, 0), np.float32)
        size = self._samples.size
        # From, to; sorted, and none beside another of its chunk.
        self._free = [
            (begin, min(begin + CHUNK_SAMPLES, size)) for begin in range(0, size, CHUNK_SAMPLES)
        ]

    @property
    def memory(self) -> NDArray[np.float32]:
        """All samples (N,), in use or not."""
        return self._samples

    @classmethod
    def create(cls, samples: int) -> SharedSamples:
        """Make room for at least so many samples, none of which takes memory yet."""
        file = os.memfd_create("speechllm-samples")
        try:
            os.ftruncate(file, _whole_pages(samples) * SAMPLE_BYTES)
            return cls(file)
        except BaseException:
            os.close(file)
            raise

    def put(self, waveform: NDArray[np.float32]) -> Place | None:
        """Copy a waveform (N,), at most a chunk, to a free place; None where there is none."""
        wanted = _whole_pages(waveform.size)
        for index, (begin, end) in enumerate(self._free):
            if end - begin >= wanted:
                rest = [(begin + wanted, end)] if end - begin > wanted else []
                self._free[index : index + 1] = rest
                self._samples[begin : begin + waveform.size] = waveform
                return Place(begin, waveform.size)
        return None

    def view(self, place: Place) -> NDArray[np.float32]:
        """The waveform (N,) at a place; what is put there later, too, once it is given back."""
        return self._samples[place.first : place.first + place.size]

    def give_back(self, place: Place) -> None:
        """Let others have a place that `put` gave; once."""
        begin, end = place.first, place.first + _whole_pages(place.size)
        index = bisect_left(self._free, (begin, end))
        if end % CHUNK_SAMPLES and index < len(self._free) and self._free[index][0] == end:
            end = self._free.pop(index)[1]
        if begin % CHUNK_SAMPLES and index and self._free[index - 1][1] == begin:
            index -= 1
            begin = self._free.pop(index)[0]
        self._free.insert(index, (begin, end))


def _whole_pages(samples: int) -> int:
    return max(1, -(-samples // _ALIGNMENT)) * _ALIGNMENT
