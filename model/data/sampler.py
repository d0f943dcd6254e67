"""Batches of clips of about the same duration under a budget of padded audio."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

# Durations are perturbed by up to this share before they are sorted, so that an epoch's batches
# differ from the last one's, at the cost of about as much padding.
_JITTER = 0.05


class DurationBucketSampler:
    """A batch sampler for `torch.utils.data.DataLoader`: yields lists of indices.

    Every index comes exactly once an epoch. A batch's longest clip times its size stays within
    the budget; a clip that is longer than the whole budget is a batch by itself. The order is a
    function of (seed, epoch) alone, so that every rank computes the same batches and takes its
    share, and a run that stopped after batch k resumes with `set_epoch(epoch, start_batch=k)`.

    All ranks get the same number of batches: where the number does not divide, large batches
    are split in two; only if nothing is left to split (every batch one clip) do the first
    batches come a second time.
    """

    def __init__(  # noqa: PLR0913 - a batch sampler's whole input
        self,
        durations_s: Sequence[float] | NDArray[np.floating],
        max_batch_audio_s: float,
        seed: int,
        *,
        shuffle: bool = True,
        world_size: int = 1,
        rank: int = 0,
    ) -> None:
        """Prepare epoch 0.

        Args:
            durations_s: (N,) seconds of each clip.
            max_batch_audio_s: most seconds of audio in a batch, padding included.
            seed: with the epoch, decides the order.
            shuffle: False gives the same batches in every epoch, short clips first.
            world_size: number of ranks that share the batches.
            rank: this one's place among them.

        Raises:
            ValueError: no durations, a duration or budget that is not above 0, or a rank
                outside the world.
        """
        self._durations_s = np.asarray(durations_s, dtype=np.float64)
        if self._durations_s.ndim != 1 or len(self._durations_s) == 0:
            raise ValueError("there are no durations to make batches of")
        if not (np.isfinite(self._durations_s).all() and (self._durations_s > 0).all()):
            raise ValueError("every duration must be above 0 s and finite")
        if not max_batch_audio_s > 0:
            raise ValueError(f"max_batch_audio_s must be above 0, not {max_batch_audio_s}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size}")
        self._max_batch_audio_s = max_batch_audio_s
        self._seed = seed
        self._shuffle = shuffle
        self._world_size = world_size
        self._rank = rank
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch, and the batch of this rank that iteration starts from.

        Raises:
            ValueError: the epoch has no batch of that number.
        """
        batches = self._plan(epoch)[self._rank :: self._world_size]
        if not 0 <= start_batch <= len(batches):
            raise ValueError(f"epoch {epoch} has {len(batches)} batches; none is {start_batch}")
        self._batches = batches[start_batch:]

    def __len__(self) -> int:
        """Batches that iteration yields on this rank."""
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of the chosen epoch from its start batch on."""
        return iter(self._batches)

    def _plan(self, epoch: int) -> list[list[int]]:
        """All ranks' batches; rank r takes every world_size-th from r on."""
        rng = np.random.default_rng((self._seed, epoch))
        keys = self._durations_s
        if self._shuffle:
            keys = keys * rng.uniform(1 - _JITTER, 1 + _JITTER, len(keys))
        batches = self._fill(np.argsort(keys, kind="stable"))
        self._make_divisible(batches)
        if self._shuffle:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        repeated = -len(batches) % self._world_size
        return batches + [batches[i % len(batches)] for i in range(repeated)]

    def _fill(self, order: NDArray[np.intp]) -> list[list[int]]:
        """Close a batch when the next clip would burst the budget."""
        batches: list[list[int]] = []
        batch: list[int] = []
        longest_s = 0.0
        for index, duration_s in zip(order.tolist(), self._durations_s[order], strict=True):
            longest_s = max(longest_s, duration_s)
            if batch and longest_s * (len(batch) + 1) > self._max_batch_audio_s:
                batches.append(batch)
                batch, longest_s = [], duration_s
            batch.append(index)
        batches.append(batch)
        return batches

    def _make_divisible(self, batches: list[list[int]]) -> None:
        """Split the largest batches, in place, until every rank can have as many."""
        for _ in range(-len(batches) % self._world_size):
            largest = max(range(len(batches)), key=lambda i: len(batches[i]))
            batch = batches[largest]
            if len(batch) == 1:
                return
            half = len(batch) // 2
            batches[largest : largest + 1] = [batch[:half], batch[half:]]
