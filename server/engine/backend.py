"""The model package's transcriber as an engine's backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from transformers.utils.logging import disable_progress_bar

from model.transcription import Transcriber
from server.engine.interface import BackendBatch, BackendTranscript

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_WARM_UP_S = (1.0, 3.0)  # clips of different length, so that padding is exercised too


class TranscriberBackend:
    """Implements `Backend` on a `Transcriber`."""

    def __init__(self, transcriber: Transcriber) -> None:
        """Wrap a loaded transcriber."""
        self._transcriber = transcriber

    @classmethod
    def load(cls, model: str, device: str, dtype: str) -> TranscriberBackend:
        """Load a checkpoint.

        Raises:
            ValueError: the checkpoint, device or dtype cannot be used; the message says why.
        """
        disable_progress_bar()  # a server's stderr is a log
        return cls(Transcriber.from_pretrained(model, device, dtype))

    @property
    def max_audio_s(self) -> float:
        """Longest clip, seconds."""
        return self._transcriber.max_audio_s

    def warm_up(self) -> None:
        """Transcribe a little noise."""
        rng = np.random.default_rng(0)
        rate_hz = self._transcriber.sample_rate_hz
        longest_s = self.max_audio_s
        self.transcribe(
            [
                rng.normal(0, 0.01, int(min(length_s, longest_s) * rate_hz)).astype(np.float32)
                for length_s in _WARM_UP_S
            ],
            None,
        )

    def transcribe(
        self, waveforms: Sequence[NDArray[np.float32]], prompt: str | None
    ) -> BackendBatch:
        """Transcribe a batch."""
        batch = self._transcriber.transcribe(waveforms, prompt=prompt)
        transcripts = [
            BackendTranscript(each.text, each.language, each.finish_reason, len(each.token_ids))
            for each in batch.transcripts
        ]
        return BackendBatch(transcripts, batch.encode_s, batch.generate_s)
