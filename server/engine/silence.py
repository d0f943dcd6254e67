"""Whether a clip holds any sound at all. A speech LLM tends to invent text where there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FRAME_SAMPLES = 480  # 30 ms at 16 kHz
_MAX_SILENT_POWER = 10 ** (-60 / 10)  # quiet rooms record at -50 to -60 dBFS, whispers above -50


def is_silent(waveform: NDArray[np.float32]) -> bool:
    """Whether no 30 ms of a clip are louder than -60 dBFS, root mean square.

    Args:
        waveform: (N,), mono, 16 kHz, full scale at 1; NaN is not silent.
    """
    for start in range(0, waveform.size, _FRAME_SAMPLES):
        frame = waveform[start : start + _FRAME_SAMPLES]
        if not float(np.dot(frame, frame)) <= _MAX_SILENT_POWER * frame.size:
            return False  # most clips are loud from the first frames on
    return True
