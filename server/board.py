"""Numbers that the processes of one server share, in memory that all of them see.

Each process writes counts of its own and reads the sum of all, so that no lock is needed, and what
a process that died had counted is taken away by clearing its row. Between looking at a sum and
adding to it another process may add, too: a limit can be passed by one for each other process.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

Count = Literal["requests", "audio_s", "long_recordings", "sessions", "uploads"]
_COUNTS = get_args(Count)


class Tally:
    """A count of one process among those of the others."""

    def __init__(self, column: NDArray[np.float64] | None = None, place: int = 0) -> None:
        """Count alone, or in row `place` of a column (processes,)."""
        self._column = np.zeros(1) if column is None else column
        self._place = place

    @property
    def own(self) -> float:
        """What this process has counted."""
        return float(self._column[self._place])

    @property
    def total(self) -> float:
        """What all processes have."""
        return float(self._column.sum())

    def add(self, amount: float) -> None:
        """Change this process's count."""
        self._column[self._place] += amount


class Bucket:
    """Seconds of audio that a key may still have transcribed, and when that was so; shared."""

    def __init__(self, cells: NDArray[np.float64] | None = None, file: int | None = None) -> None:
        """Of this process alone, or of all that see `cells` (3,) and lock `file`."""
        self._cells = np.zeros(3) if cells is None else cells
        self._file = file

    @contextlib.contextmanager
    def opened(self) -> Iterator[NDArray[np.float64]]:
        """Level, time, both seconds, and whether they were ever set, while no other process writes.

        A process that dies lets go of the lock.
        """
        if self._file is None:
            yield self._cells
            return
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            yield self._cells
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)


class Board:
    """All shared numbers of one server.

    Attributes:
        file: descriptor of the memory.
        processes: that count.
        keys: whose use is counted.
        engine: (ENGINE_CELLS,), which the engine's process writes and the others read.
    """

    def __init__(self, file: int, processes: int, keys: int) -> None:
        """Map a file of `size` bytes.

        Args:
            file: its descriptor, from `create` in this process or in that which started it.
            processes: that count.
            keys: API keys, or 1 where there are none.
        """
        self.file, self.processes, self.keys = file, processes, keys
        memory = mmap.mmap(file, self.size(processes, keys))
        numbers = np.frombuffer(memory, np.float64)
        ends = np.cumsum([processes * (len(_COUNTS) + keys), 3 * keys])
        counts, buckets, self.engine = np.split(numbers, ends)
        self._counts = counts.reshape(processes, len(_COUNTS) + keys)
        self._buckets = buckets.reshape(keys, 3)

    ENGINE_CELLS = 8

    @classmethod
    def size(cls, processes: int, keys: int) -> int:
        """Bytes of a board."""
        return 8 * (processes * (len(_COUNTS) + keys) + 3 * keys + cls.ENGINE_CELLS)

    @classmethod
    def create(cls, processes: int, keys: int) -> Board:
        """Make a board, all zero, that processes started with its file see, too."""
        file = os.memfd_create("speechllm-board")
        os.ftruncate(file, cls.size(processes, keys))
        return cls(file, processes, keys)

    def tally(self, count: Count, place: int) -> Tally:
        """The count of process `place`."""
        return Tally(self._counts[:, _COUNTS.index(count)], place)

    def key_tally(self, key: int, place: int) -> Tally:
        """What a key has running in process `place`."""
        return Tally(self._counts[:, len(_COUNTS) + key], place)

    def bucket(self, key: int) -> Bucket:
        """What a key may still use."""
        return Bucket(self._buckets[key], self.file)

    def clear(self, place: int) -> None:
        """Forget what process `place` had counted."""
        self._counts[place] = 0.0


class Seat:
    """Where one process counts: on a board, or, where it serves alone, for itself."""

    def __init__(self, board: Board | None = None, place: int = 0) -> None:
        """Take row `place` of a board."""
        self._board = board
        self._place = place

    def tally(self, count: Count) -> Tally:
        """Of this process."""
        return Tally() if self._board is None else self._board.tally(count, self._place)

    def key_use(self, owner: str, owners: Sequence[str]) -> tuple[Tally, Bucket]:
        """What the key of one of the board's owners has running, and may still use."""
        if self._board is None:
            return Tally(), Bucket()
        key = owners.index(owner)
        return self._board.key_tally(key, self._place), self._board.bucket(key)
