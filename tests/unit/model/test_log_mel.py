"""The log-mel is Whisper's own, whatever else is in the batch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor

from model.log_mel import (
    WINDOW_SAMPLES,
    fetch_waveforms,
    log_mel_spectrogram,
    mel_frame_lens,
    pad_waveforms,
)

LENGTHS = [48_000, 16_000 * 7 + 77, 1_000, 161, 1]


def noise(n_samples: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal(n_samples)).astype(np.float32)


def whisper_features(waveforms: list[np.ndarray], n_mels: int) -> torch.Tensor:
    extractor = WhisperFeatureExtractor(feature_size=n_mels)
    return extractor(waveforms, sampling_rate=16_000, return_tensors="pt").input_features


@pytest.mark.parametrize("n_mels", [80, 128])
def test_full_window_equals_whisper_feature_extractor(n_mels: int) -> None:
    waveforms = [noise(n, seed) for seed, n in enumerate([*LENGTHS, WINDOW_SAMPLES])]
    features, lens = log_mel_spectrogram(*pad_waveforms(waveforms), n_mels, full_window=True)
    torch.testing.assert_close(features, whisper_features(waveforms, n_mels), atol=1e-4, rtol=0)
    assert lens.tolist() == [-(-waveform.size // 160) for waveform in waveforms]


@pytest.mark.parametrize("n_mels", [80, 128])
def test_trimmed_equals_whisper_on_the_frames_a_clip_covers(n_mels: int) -> None:
    waveforms = [noise(n, seed) for seed, n in enumerate(LENGTHS)]
    features, lens = log_mel_spectrogram(*pad_waveforms(waveforms), n_mels)
    expected = whisper_features(waveforms, n_mels)
    for row, reference, length in zip(features, expected, lens, strict=True):
        torch.testing.assert_close(row[:, :length], reference[:, :length], atol=1e-4, rtol=0)
        assert torch.all(row[:, length:] == 0)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 20_000), min_size=1, max_size=4))
def test_a_clip_s_features_do_not_depend_on_its_batch(lengths: list[int]) -> None:
    waveforms = [noise(n, seed) for seed, n in enumerate(lengths)]
    features, lens = log_mel_spectrogram(*pad_waveforms(waveforms))
    for row, waveform, length in zip(features, waveforms, lens, strict=True):
        alone, _ = log_mel_spectrogram(*pad_waveforms([waveform]))
        torch.testing.assert_close(row[:, :length], alone[0], atol=1e-5, rtol=0)


def test_silence_is_finite() -> None:
    features, _ = log_mel_spectrogram(*pad_waveforms([np.zeros(8_000, np.float32)]))
    assert torch.isfinite(features).all()


def test_a_clip_longer_than_the_window_is_refused() -> None:
    with pytest.raises(ValueError, match=r"30\.00 s is longer than the encoder's 30 s"):
        log_mel_spectrogram(*pad_waveforms([noise(WINDOW_SAMPLES + 1)]))


@pytest.mark.parametrize("waveform", [np.zeros(0, np.float32), np.zeros((2, 100), np.float32)])
def test_empty_and_multi_channel_clips_are_refused(waveform: np.ndarray) -> None:
    with pytest.raises(ValueError, match="waveform 1 must be mono"):
        pad_waveforms([noise(100), waveform])


def test_clips_that_a_device_fetches_are_stacked_as_those_that_are_copied() -> None:
    waveforms = [noise(n, seed) for seed, n in enumerate(LENGTHS)]
    fetched, lens = fetch_waveforms(waveforms, "cpu")
    expected, expected_lens = pad_waveforms(waveforms)
    assert torch.equal(fetched, expected)
    assert torch.equal(lens, expected_lens)
    with pytest.raises(ValueError, match="waveform 1 must be mono"):
        fetch_waveforms([noise(100), np.zeros(0, np.float32)], "cpu")


def test_no_clip_is_refused() -> None:
    with pytest.raises(ValueError, match="no waveform"):
        pad_waveforms([])


def test_frame_lens_count_started_hops_up_to_the_window() -> None:
    lens = mel_frame_lens(torch.tensor([1, 160, 161, 480_000, 500_000]))
    assert lens.tolist() == [1, 1, 2, 3000, 3000]
