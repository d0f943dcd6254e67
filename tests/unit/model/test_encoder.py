"""The encoder's answer for a clip does not depend on its batch."""

import pytest
import torch
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from model.encoder import encode, encoder_frame_lens, length_mask


@pytest.fixture(scope="module")
def encoder() -> WhisperEncoder:
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64
    )
    encoder = WhisperEncoder(config).eval()
    # Zero biases, as at initialisation, would hide a convolution that sees padding.
    torch.nn.init.normal_(encoder.conv1.bias)
    torch.nn.init.normal_(encoder.conv2.bias)
    return encoder


@pytest.mark.parametrize("lens", [[7, 20, 33], [1, 2, 50], [40, 40, 40]])
@torch.inference_mode()
def test_trimmed_batch_equals_each_clip_alone(encoder: WhisperEncoder, lens: list[int]) -> None:
    features = torch.randn(len(lens), 80, max(lens) + 5)  # what lies past a clip is garbage
    frames, frame_lens = encode(encoder, features, torch.tensor(lens), "trimmed")
    assert frame_lens.tolist() == [-(-n // 2) for n in lens]
    for row, clip, n_mel, length in zip(frames, features, lens, frame_lens, strict=True):
        alone, _ = encode(encoder, clip[None, :, :n_mel], torch.tensor([n_mel]), "trimmed")
        torch.testing.assert_close(row[:length], alone[0], atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_padded_is_whisper_s_own_output_trimmed(encoder: WhisperEncoder) -> None:
    features = torch.randn(2, 80, 3000)
    frames, lens = encode(encoder, features, torch.tensor([101, 300]), "padded")
    expected = encoder(features).last_hidden_state
    assert lens.tolist() == [51, 150]
    torch.testing.assert_close(frames, expected[:, :150])


@torch.inference_mode()
def test_a_full_window_is_the_same_in_both_modes(encoder: WhisperEncoder) -> None:
    features, lens = torch.randn(1, 80, 3000), torch.tensor([3000])
    padded, _ = encode(encoder, features, lens, "padded")
    trimmed, _ = encode(encoder, features, lens, "trimmed")
    torch.testing.assert_close(trimmed, padded, atol=1e-4, rtol=1e-3)


def test_frame_lens_round_up() -> None:
    assert encoder_frame_lens(torch.tensor([1, 2, 3, 3000])).tolist() == [1, 1, 2, 1500]


def test_length_mask_marks_valid_positions() -> None:
    mask = length_mask(torch.tensor([0, 2, 3]), 3)
    assert mask.tolist() == [[False] * 3, [True, True, False], [True] * 3]
