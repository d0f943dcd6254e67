"""Memory of the host from which a CUDA device fetches clips by itself, where they lie.

Without it, the thread that owns the device copies every sample into pinned memory first.
"""

from __future__ import annotations

import contextlib
import logging
from functools import cache
from typing import TYPE_CHECKING

import torch

from server.engine.shared_samples import CHUNK_SAMPLES, SAMPLE_BYTES
from server.log import structured

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

_log = logging.getLogger(__name__)

_CHUNK_BYTES = CHUNK_SAMPLES * SAMPLE_BYTES
_PORTABLE = 1  # pinned for every CUDA context of the process
_SUCCESS = 0  # of cudaError_t


class DirectMemory:
    """Pins what is shared, chunk by chunk and not before a clip lies there: pinning takes memory.

    Owned by the device's thread. What was shared stays mapped until it is forgotten.
    """

    def __init__(
        self, pin: Callable[[int, int], bool], unpin: Callable[[Sequence[int]], None]
    ) -> None:
        """Begin without any.

        Args:
            pin: called with an address and a number of bytes; whether they are pinned now.
            unpin: called with addresses that were pinned.
        """
        self._pin = pin
        self._unpin = unpin
        self._shared: dict[int, int] = {}  # bytes, by address
        # By address of a chunk; what cannot be pinned is not tried again.
        self._is_pinned: dict[int, bool] = {}

    def share(self, samples: NDArray[np.float32]) -> None:
        """Let clips lie in samples (N,); twice is as good as once."""
        self._shared[_address(samples)] = samples.nbytes

    def forget(self, samples: NDArray[np.float32]) -> None:
        """Fetch no more clips from samples (N,), which may be unmapped then."""
        begin = _address(samples)
        end = begin + self._shared.pop(begin, 0)
        chunks = [chunk for chunk in self._is_pinned if begin <= chunk < end]
        self._unpin([chunk for chunk in chunks if self._is_pinned.pop(chunk)])

    def holds(self, waveform: NDArray[np.float32]) -> bool:
        """Whether the device can fetch a clip (N,) from where it lies, which is pinned if need be.

        What spans several chunks it cannot.
        """
        address = _address(waveform)
        for begin, size in self._shared.items():
            if begin <= address < begin + size:
                break
        else:
            return False
        chunk = begin + (address - begin) // _CHUNK_BYTES * _CHUNK_BYTES
        end = min(chunk + _CHUNK_BYTES, begin + size)
        if not waveform.flags.c_contiguous or address + waveform.nbytes > end:
            return False
        if chunk not in self._is_pinned:
            self._is_pinned[chunk] = self._pin(chunk, end - chunk)
        return self._is_pinned[chunk]


@cache
def cuda_memory(device: torch.device) -> DirectMemory:
    """What pins memory for a CUDA device; of the process, as what is pinned is, not of a runner."""

    def pin(address: int, size: int) -> bool:
        status = int(torch.cuda.cudart().cudaHostRegister(address, size, _PORTABLE))
        if status == _SUCCESS:
            return True
        _drop_error(device)
        _log.warning(
            "shared memory cannot be pinned, and its clips are copied",
            extra=structured(cuda_error=status, bytes=size),
        )
        return False

    def unpin(addresses: Sequence[int]) -> None:
        if addresses:
            torch.cuda.synchronize(device)  # a clip may still be fetched for one who has left
        for address in addresses:
            if int(torch.cuda.cudart().cudaHostUnregister(address)) != _SUCCESS:
                _drop_error(device)

    return DirectMemory(pin, unpin)


def _drop_error(device: torch.device) -> None:
    """Have the runtime forget a failure, or the next kernel would be blamed for it."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device)


def _address(samples: NDArray[np.float32]) -> int:
    address: int = samples.__array_interface__["data"][0]
    return address
