"""Whisper's log-mel spectrogram in torch, on the model's device, batched over clips.

Axis legend: B clips, N samples, M mel bins, T mel frames (one per 10 ms).

Training and serving share this one implementation. It equals
`transformers.WhisperFeatureExtractor` within 1e-4 on the frames a clip covers.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers.audio_utils import mel_filter_bank

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

SAMPLE_RATE_HZ = 16_000
N_FFT = 400  # samples, 25 ms
HOP_SAMPLES = 160  # 10 ms
WINDOW_S = 30  # what Whisper was trained on
WINDOW_SAMPLES = WINDOW_S * SAMPLE_RATE_HZ
WINDOW_FRAMES = WINDOW_SAMPLES // HOP_SAMPLES
DYNAMIC_RANGE = 8.0  # log10 units kept below a clip's maximum


@lru_cache(maxsize=8)
def _mel_filters(n_mels: int, device: torch.device) -> Tensor:
    filters = mel_filter_bank(
        num_frequency_bins=1 + N_FFT // 2,
        num_mel_filters=n_mels,
        min_frequency=0.0,
        max_frequency=SAMPLE_RATE_HZ / 2,
        sampling_rate=SAMPLE_RATE_HZ,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(filters.T.astype(np.float32)).to(device)  # (M, N_FFT/2+1)


@lru_cache(maxsize=8)
def _window(device: torch.device) -> Tensor:
    return torch.hann_window(N_FFT, device=device)


def pad_waveforms(
    waveforms: Sequence[np.ndarray], *, pin_memory: bool = False
) -> tuple[Tensor, Tensor]:
    """Stack clips of different length, zero-padded on the right.

    Args:
        waveforms: mono float32 clips at 16 kHz, each (N_i,).
        pin_memory: where they are stacked.

    Returns:
        (B, max N_i) float32 and the lengths (B,) int64, in samples.

    Raises:
        ValueError: no clip, an empty clip, or one that is not one-dimensional.
    """
    sample_lens = _sample_lens(waveforms)
    batch = torch.empty(len(waveforms), int(sample_lens.max()), pin_memory=pin_memory)
    for row, waveform in zip(batch.numpy(), waveforms, strict=True):
        row[: waveform.size] = waveform
        row[waveform.size :] = 0
    return batch, sample_lens


def fetch_waveforms(
    waveforms: Sequence[np.ndarray], device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Stack clips on a device as `pad_waveforms` does, each copied from where it lies.

    Args:
        waveforms: mono float32 clips at 16 kHz, each (N_i,), in pinned memory, where they stay
            until the device has copied them: the host does not wait.
        device: a CUDA device, or any.

    Returns:
        (B, max N_i) float32 on the device and the lengths (B,) int64 on the host, in samples.

    Raises:
        ValueError: as `pad_waveforms`.
    """
    sample_lens = _sample_lens(waveforms)
    batch = torch.zeros(len(waveforms), int(sample_lens.max()), device=device)
    for row, waveform in zip(batch, waveforms, strict=True):
        row[: waveform.size].copy_(torch.from_numpy(waveform), non_blocking=True)
    return batch, sample_lens


def _sample_lens(waveforms: Sequence[np.ndarray]) -> Tensor:
    if not waveforms:
        raise ValueError("no waveform given")
    for index, waveform in enumerate(waveforms):
        if waveform.ndim != 1 or waveform.size == 0:
            raise ValueError(
                f"waveform {index} must be mono with at least one sample, "
                f"got shape {waveform.shape}"
            )
    return torch.tensor([waveform.size for waveform in waveforms])


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy to a device, from pinned memory if it is a CUDA device: the host does not wait."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def mel_frame_lens(sample_lens: Tensor) -> Tensor:
    """Mel frames that clips of `sample_lens` samples cover, at most one window (B,)."""
    return ((sample_lens + HOP_SAMPLES - 1) // HOP_SAMPLES).clamp(max=WINDOW_FRAMES)


def log_mel_spectrogram(
    waveforms: Tensor, sample_lens: Tensor, n_mels: int = 80, *, full_window: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute Whisper's normalised log-mel spectrogram.

    Args:
        waveforms: (B, N) float32, 16 kHz, zero-padded on the right, at most 30 s.
        sample_lens: (B,) int64, valid samples in each row; on the CPU, nobody waits for a device.
        n_mels: mel bins of the encoder, 80 or 128.
        full_window: pad to Whisper's 30 s window instead of the longest clip. Frames past a clip
            then hold the floor that Whisper saw in training; otherwise they are zero.

    Returns:
        (B, M, T) float32 and the frames each clip covers (B,) int64.

    Raises:
        ValueError: a clip is longer than 30 s.

    Source: openai/whisper, audio.py; transformers' WhisperFeatureExtractor.
    """
    longest = int(sample_lens.max())
    if longest > WINDOW_SAMPLES:
        raise ValueError(
            f"a clip of {longest / SAMPLE_RATE_HZ:.2f} s is longer than the encoder's "
            f"{WINDOW_S} s window"
        )
    frame_lens = mel_frame_lens(sample_lens)
    # Half a window of silence past the longest clip gives its last frames the zeros that
    # Whisper's own padding to 30 s would; a clip that fills the window is reflected, as there.
    n_frames = WINDOW_FRAMES if full_window else int(frame_lens.max())
    total = min(WINDOW_SAMPLES, n_frames * HOP_SAMPLES + N_FFT)
    waveforms = waveforms[:, :total]
    waveforms = torch.nn.functional.pad(waveforms, (0, total - waveforms.shape[1]))
    spectrum = torch.stft(
        waveforms, N_FFT, HOP_SAMPLES, window=_window(waveforms.device), return_complex=True
    )
    power = spectrum[..., :-1].abs().square()
    log_mel = (_mel_filters(n_mels, waveforms.device) @ power).clamp(min=1e-10).log10()
    floor = log_mel.amax(dim=(1, 2), keepdim=True) - DYNAMIC_RANGE
    log_mel = (torch.maximum(log_mel, floor) + 4.0) / 4.0
    log_mel = log_mel[..., :n_frames]
    if not full_window:
        frames = torch.arange(n_frames, device=log_mel.device)
        log_mel = log_mel * (frames < to_device(frame_lens, log_mel.device)[:, None])[:, None]
    return log_mel, frame_lens
