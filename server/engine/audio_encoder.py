"""Clips to encoder frames on the device.

On a CUDA device the encoder is recorded, for batches that are launched more slowly than they are
computed. What rows hold that a recording adds does not matter, and frames that it adds are masked,
as those of a batch's shorter clips are. Log-mel is not recorded: cuFFT's plans are let go of when
there are too many, and a recording would still use them.

Axis legend: B clips, R rows of a recording, M mel bins, T mel frames (10 ms), F encoder frames
(20 ms), D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from model.encoder import encode_trimmed, encoder_frame_lens
from model.log_mel import WINDOW_FRAMES
from server.engine.recordings import Recordings, bucket, buckets

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from model.modeling import SpeechLLMForConditionalGeneration
    from model.processing import SpeechLLMProcessor
    from server.engine.recordings import Run

_MIN_FRAMES = 200
_MOST_FRAMES = 25_600  # of a recording, padding included: 32 clips of 8 s
# Of a recording, too. Beyond, computing takes longer than launching, and what is padded costs.
_MOST_FLOPS = 3e11


class AudioEncoder:
    """Encodes each batch anew."""

    def __init__(
        self, model: SpeechLLMForConditionalGeneration, processor: SpeechLLMProcessor
    ) -> None:
        """Take the encoder of a model, on its device."""
        self._model, self._processor = model, processor
        self._device = next(model.encoder.parameters()).device

    def __call__(
        self, waveforms: Sequence[NDArray[np.float32]], *, fetches: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Encode clips.

        Args:
            waveforms: each (N_i,) float32, 16 kHz, at most 30 s.
            fetches: whether the device can fetch them from where they lie, and they stay there.

        Returns:
            Encoder frames (B, F, D), right-padded, which hold until the next call, and their
            lengths (B,).
        """
        return self._encode(*self._processor.features(waveforms, self._device, fetches=fetches))

    def warm_up(self) -> None:
        """Prepare what can be."""

    def _encode(self, features: Tensor, feature_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Encode log-mel (B, M, T) of which the first `feature_lens` (B,) frames are valid."""
        return self._model.encode(features, feature_lens)


class RecordedAudioEncoder(AudioEncoder):
    """Encodes small batches from recordings."""

    def __init__(
        self,
        model: SpeechLLMForConditionalGeneration,
        processor: SpeechLLMProcessor,
        record: Callable[[Run], Run],
        *,
        most_clips: int,
    ) -> None:
        """Begin without a recording.

        Args:
            model: whose encoder is recorded.
            processor: its.
            record: runs a function as often as it likes, and returns one that does the same.
            most_clips: that are encoded together.
        """
        super().__init__(model, processor)
        self._recordings = Recordings(record, "the encoder")
        parameters = sum(each.numel() for each in model.encoder.parameters())
        affordable = int(_MOST_FLOPS / (2 * parameters) * 2)  # an encoder frame is two of mel
        self._most_frames = min(_MOST_FRAMES, affordable)
        self._most_rows = max(1, min(most_clips, self._most_frames // _MIN_FRAMES))
        weight = model.encoder.conv1.weight
        self._features = weight.new_zeros(weight.shape[1] * self._most_frames)
        self._feature_lens = torch.ones(self._most_rows, dtype=torch.int64, device=self._device)

    def warm_up(self) -> None:
        """Record every shape before the first request, the largest first, whose memory all use."""
        longest = min(WINDOW_FRAMES, int(self._model.config.max_audio_s * 100))
        shapes = [
            self._shape(rows, n_frames)
            for n_frames in buckets(_MIN_FRAMES, longest)
            for rows in buckets(1, self._most_rows)
        ]
        known = {shape for shape in shapes if shape is not None}
        for rows, n_frames in sorted(known, key=lambda shape: -shape[0] * shape[1]):
            self._replay(rows, n_frames)

    def _encode(self, features: Tensor, feature_lens: Tensor) -> tuple[Tensor, Tensor]:
        count, _, n_frames = features.shape
        shape = self._shape(count, n_frames)
        if shape is None or not self._recordings.is_able:
            return super()._encode(features, feature_lens)
        parts = self._parts(*shape)[0][:count]
        parts[..., :n_frames] = features
        parts[..., n_frames:] = 0  # a NaN of before would outlast the mask
        self._feature_lens[:count] = feature_lens
        frames = self._replay(*shape)
        if frames is None:
            return super()._encode(features, feature_lens)
        frame_lens = encoder_frame_lens(feature_lens)
        longest = int(frame_lens.max()) if self._is_padded else (n_frames + 1) // 2
        return frames[:count, :longest], frame_lens

    @property
    def _is_padded(self) -> bool:
        return bool(self._model.config.encoder_mode == "padded")

    def _shape(self, count: int, n_frames: int) -> tuple[int, int] | None:
        """Rows and mel frames of the recording for so many clips; None where there is none."""
        length = WINDOW_FRAMES if self._is_padded else bucket(n_frames, _MIN_FRAMES, WINDOW_FRAMES)
        rows = bucket(count, 1, self._most_rows)
        return (rows, length) if rows >= count and rows * length <= self._most_frames else None

    def _parts(self, rows: int, n_frames: int) -> tuple[Tensor, Tensor]:
        """Where a recording reads: features (R, M, T), and how many frames are valid (R,)."""
        n_mels = self._model.encoder.conv1.weight.shape[1]
        features = self._features[: rows * n_mels * n_frames].view(rows, n_mels, n_frames)
        return features, self._feature_lens[:rows]

    def _replay(self, rows: int, n_frames: int) -> Tensor | None:
        features, feature_lens = self._parts(rows, n_frames)
        encoder, is_padded = self._model.encoder, self._is_padded

        def run() -> Tensor:  # holds nothing that holds the recording
            if is_padded:
                frames: Tensor = encoder(features).last_hidden_state
                return frames
            return encode_trimmed(encoder, features, feature_lens, looks_for_padding=False)

        frames: Tensor | None = self._recordings.replay((rows, n_frames), run)
        return frames
