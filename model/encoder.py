"""Run a Whisper encoder so that a clip's answer does not depend on its batch.

Axis legend: B clips, M mel bins, T mel frames (10 ms), F encoder frames (20 ms), D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch.nn import functional
from transformers.masking_utils import create_bidirectional_mask

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

EncoderMode = Literal["padded", "trimmed"]


def encoder_frame_lens(feature_lens: Tensor) -> Tensor:
    """Encoder frames for `feature_lens` mel frames: the second convolution has stride 2 (B,)."""
    return (feature_lens + 1) // 2


def length_mask(lens: Tensor, size: int) -> Tensor:
    """(B, size) bool, true on the first `lens[b]` positions of row b."""
    return torch.arange(size, device=lens.device) < lens[:, None]


def encode(
    encoder: WhisperEncoder, input_features: Tensor, feature_lens: Tensor, mode: EncoderMode
) -> tuple[Tensor, Tensor]:
    """Encode log-mel features.

    Args:
        encoder: transformers' Whisper encoder of any size.
        input_features: (B, M, T); T is 3000 in mode `padded`.
        feature_lens: (B,) int64, valid mel frames.
        mode: `padded` runs the 30 s window Whisper was trained on and trims its output;
            `trimmed` shows the encoder only the clip's own frames, padding masked in both
            convolutions and in attention: 3-10x cheaper, for encoders fine-tuned so.

    Returns:
        Encoder frames (B, F, D), right-padded, and their lengths (B,). What lies past a row's
        length is undefined.
    """
    frame_lens = encoder_frame_lens(feature_lens)
    if mode == "padded":
        frames = encoder(input_features).last_hidden_state
        return frames[:, : int(frame_lens.max())], frame_lens
    return encode_trimmed(encoder, input_features, feature_lens), frame_lens


def encode_trimmed(
    encoder: WhisperEncoder,
    input_features: Tensor,
    feature_lens: Tensor,
    *,
    looks_for_padding: bool = True,
) -> Tensor:
    """Encode log-mel features as mode `trimmed` does.

    Args:
        encoder: transformers' Whisper encoder of any size.
        input_features: (B, M, T).
        feature_lens: (B,) int64, valid mel frames, on the same device.
        looks_for_padding: attend without a mask where there is no padding, which is faster, but
            to know it takes a look at the device.

    Returns:
        Encoder frames (B, F, D).
    """
    # Zeroes past a clip's end are what the convolutions' own padding gives a clip alone.
    feature_mask = length_mask(feature_lens, input_features.shape[-1])
    hidden = functional.gelu(encoder.conv1(input_features * feature_mask[:, None]))
    hidden = functional.gelu(encoder.conv2(hidden * feature_mask[:, None]))
    hidden = hidden.transpose(1, 2)  # (B, D, F) -> (B, F, D)
    hidden = hidden + encoder.embed_positions.weight[: hidden.shape[1]].to(hidden.dtype)
    hidden = functional.dropout(hidden, p=encoder.dropout, training=encoder.training)
    attention_mask = create_bidirectional_mask(
        config=encoder.config,
        inputs_embeds=hidden,
        attention_mask=length_mask(encoder_frame_lens(feature_lens), hidden.shape[1]),
        allow_is_bidirectional_skip=looks_for_padding,
    )
    for layer in encoder.layers:
        hidden = layer(hidden, attention_mask)
    normalised: Tensor = encoder.layer_norm(hidden)
    return normalised
