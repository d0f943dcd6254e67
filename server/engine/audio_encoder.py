"""Clips to encoder frames on the device.

On a CUDA device log-mel and encoder are recorded together, for batches that are launched more
slowly than they are computed. What rows hold that a recording adds does not matter, and frames that
it adds are masked, as those of a batch's shorter clips are.

Axis legend: B clips, N samples, T mel frames (10 ms), F encoder frames (20 ms), D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from model.encoder import encode_trimmed, encoder_frame_lens
from model.log_mel import (
    HOP_SAMPLES,
    WINDOW_FRAMES,
    log_mel_frames,
    mel_frame_lens,
    zero_past_ends,
)
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
# Of a recording, too. Beyond, computing takes longer than Python, and what is padded costs.
_MOST_FLOPS = 1e12


class AudioEncoder:
    """Encodes each batch anew."""

    def __init__(
        self, model: SpeechLLMForConditionalGeneration, processor: SpeechLLMProcessor
    ) -> None:
        """Take the encoder of a model, on its device."""
        self._model, self._processor = model, processor
        self._device = next(model.encoder.parameters()).device

    def __call__(self, waveforms: Sequence[NDArray[np.float32]]) -> tuple[Tensor, Tensor]:
        """Encode clips, each (N_i,) float32, 16 kHz, at most 30 s.

        Returns:
            Encoder frames (B, F, D), right-padded, which hold until the next call, and their
            lengths (B,).
        """
        features, feature_lens = self._processor.features(waveforms, self._device)
        return self._model.encode(features, feature_lens)

    def warm_up(self) -> None:
        """Prepare what can be."""


class RecordedAudioEncoder(AudioEncoder):
    """Encodes small batches from recordings."""

    def __init__(
        self,
        model: SpeechLLMForConditionalGeneration,
        processor: SpeechLLMProcessor,
        record: Callable[[Run], Run],
    ) -> None:
        """Begin without a recording.

        Args:
            model: whose encoder is recorded.
            processor: its.
            record: runs a function as often as it likes, and returns one that does the same.
        """
        super().__init__(model, processor)
        self._recordings = Recordings(record, "the encoder")
        parameters = sum(each.numel() for each in model.encoder.parameters())
        affordable = int(_MOST_FLOPS / (2 * parameters) * 2)  # an encoder frame is two of mel
        self._most_frames = min(_MOST_FRAMES, affordable)
        self._most_rows = max(1, self._most_frames // _MIN_FRAMES)
        samples = torch.zeros(self._most_frames * HOP_SAMPLES)
        sample_lens = torch.full((self._most_rows,), HOP_SAMPLES)
        self._samples, self._sample_lens = samples.to(self._device), sample_lens.to(self._device)
        is_cuda = self._device.type == "cuda"
        self._host_samples = samples.pin_memory() if is_cuda else samples.clone()
        self._host_lens = sample_lens.pin_memory() if is_cuda else sample_lens.clone()

    def __call__(self, waveforms: Sequence[NDArray[np.float32]]) -> tuple[Tensor, Tensor]:
        """Do as `AudioEncoder` does, from a recording if the clips are not too many."""
        count = len(waveforms)
        longest = -(-max(waveform.size for waveform in waveforms) // HOP_SAMPLES)
        shape = self._shape(count, longest)
        if shape is None or not self._recordings.is_able:
            return super().__call__(waveforms)
        rows, n_frames = shape
        # The batch before was waited for: nothing reads these any more.
        host_lens = self._host_lens[:count]
        host = self._host_samples[: rows * n_frames * HOP_SAMPLES].view(rows, -1)
        for row, waveform in zip(host.numpy(), waveforms, strict=False):
            row[: waveform.size] = waveform
            row[waveform.size :] = 0
        host_lens[:] = torch.tensor([waveform.size for waveform in waveforms])
        self._samples[: count * n_frames * HOP_SAMPLES].copy_(
            host[:count].view(-1), non_blocking=True
        )
        self._sample_lens[:count].copy_(host_lens, non_blocking=True)
        frames: Tensor | None = self._replay(rows, n_frames)
        if frames is None:
            return super().__call__(waveforms)
        frame_lens = encoder_frame_lens(mel_frame_lens(self._sample_lens[:count]))
        return frames[:count, : (min(longest, WINDOW_FRAMES) + 1) // 2], frame_lens

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

    def _shape(self, count: int, longest: int) -> tuple[int, int] | None:
        """Rows and mel frames of the recording for so many clips; None where there is none."""
        n_frames = bucket(longest, _MIN_FRAMES, WINDOW_FRAMES)
        if self._model.config.encoder_mode == "padded":
            n_frames = WINDOW_FRAMES
        rows = bucket(count, 1, self._most_rows)
        fits = rows >= count and n_frames >= longest and rows * n_frames <= self._most_frames
        return (rows, n_frames) if fits else None

    def _replay(self, rows: int, n_frames: int) -> Tensor | None:
        samples = self._samples[: rows * n_frames * HOP_SAMPLES].view(rows, -1)
        compute = _Computation(self._model, samples, self._sample_lens[:rows], n_frames)
        frames: Tensor | None = self._recordings.replay((rows, n_frames), compute)
        return frames


class _Computation:
    """What is launched; a recording holds it, and none of what holds the recording."""

    def __init__(
        self,
        model: SpeechLLMForConditionalGeneration,
        samples: Tensor,
        sample_lens: Tensor,
        n_frames: int,
    ) -> None:
        self._encoder, self._mode = model.encoder, model.config.encoder_mode
        self._samples, self._sample_lens, self._n_frames = samples, sample_lens, n_frames

    def __call__(self) -> Tensor:
        weight = self._encoder.conv1.weight
        features = log_mel_frames(self._samples, weight.shape[1], self._n_frames)
        if self._mode == "padded":
            frames: Tensor = self._encoder(features.to(weight.dtype)).last_hidden_state
            return frames
        feature_lens = mel_frame_lens(self._sample_lens)
        features = zero_past_ends(features, feature_lens).to(weight.dtype)
        return encode_trimmed(self._encoder, features, feature_lens, looks_for_padding=False)
