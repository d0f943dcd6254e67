"""Whether a clip holds any sound at all. A speech LLM tends to invent text where there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FRAME_SAMPLES = 480  # 30 ms at 16 kHz
_SCANNED_SAMPLES = 8 * _FRAME_SAMPLES  # at once: most clips are loud from the first on
_MAX_SILENT_DBFS = -60.0  # quiet rooms record at -50 to -60, whispers above -50


def is_silent(waveform: NDArray[np.float32]) -> bool:
    """Whether no 30 ms of a clip are louder than -60 dBFS, root mean square.

    Args:
        waveform: (N,), mono, 16 kHz, full scale at 1; NaN is not silent.
    """
    parts = range(0, waveform.size, _SCANNED_SAMPLES)
    return all(_is_part_silent(waveform[start : start + _SCANNED_SAMPLES]) for start in parts)


def _is_part_silent(part: NDArray[np.float32]) -> bool:
    starts = np.arange(0, part.size, _FRAME_SAMPLES)
    energies = np.add.reduceat(np.square(part, dtype=np.float64), starts)
    sizes = np.diff(starts, append=part.size)
    return bool((energies / sizes <= 10 ** (_MAX_SILENT_DBFS / 10)).all())
