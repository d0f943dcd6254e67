"""Frame stacking with a two-layer perceptron.

Axis legend: B clips, F encoder frames (20 ms), S frames in a stack, N = ceil(F/S).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import nn
from torch.nn import functional

from model.connectors.connector import Connector
from model.connectors.convolution import ConvolutionModule
from model.encoder import length_mask

if TYPE_CHECKING:
    from torch import Tensor


class StackConnectorConfig(BaseModel):
    """Sizes of a `StackConnector`; the widths at its ends come from encoder and LLM."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["stack"] = "stack"
    stack_size: int = Field(5, ge=1, le=50, description="encoder frames in one audio embedding")
    hidden_size: int = Field(2048, ge=1)
    convolutions: int = Field(0, ge=0, le=16, description="convolution modules before stacking")
    kernel_size: int = Field(15, ge=1, le=127, description="frames that each of them sees; odd")

    @field_validator("kernel_size")
    @classmethod
    def _is_odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {value}")
        return value


def stack_frames(encoder_frames: Tensor, frame_lens: Tensor, stack_size: int) -> Tensor:
    """Join every `stack_size` frames: (B, F, D) -> (B, N, S*D), zeros past each row's length."""
    batch, n_frames, width = encoder_frames.shape
    valid = length_mask(frame_lens, n_frames)
    frames = encoder_frames * valid[..., None].to(encoder_frames.dtype)
    frames = functional.pad(frames, (0, 0, 0, -n_frames % stack_size))
    return frames.reshape(batch, -1, stack_size * width)


class StackConnector(Connector):
    """Convolution modules, if any; then stack S frames, Linear, ReLU, Linear."""

    def __init__(self, config: StackConnectorConfig, d_encoder: int, d_llm: int) -> None:
        super().__init__()
        self.stack_size = config.stack_size
        self.convolutions = nn.ModuleList(
            ConvolutionModule(d_encoder, config.kernel_size) for _ in range(config.convolutions)
        )
        self.linear_in = nn.Linear(config.stack_size * d_encoder, config.hidden_size)
        self.linear_out = nn.Linear(config.hidden_size, d_llm)

    @staticmethod
    def output_lens(config: StackConnectorConfig, frame_lens: Tensor) -> Tensor:
        """Embeddings for clips of `frame_lens` frames (B,); an incomplete stack counts."""
        return (frame_lens + config.stack_size - 1) // config.stack_size

    def silence(self) -> None:
        """Zero the last layer; its input's gradient starts with the first step."""
        nn.init.zeros_(self.linear_out.weight)
        nn.init.zeros_(self.linear_out.bias)

    def adapt(self, encoder_frames: Tensor, frame_lens: Tensor) -> Tensor:
        """Let frames (B, F, D_enc) see their neighbours, within lengths (B,)."""
        for module in self.convolutions:
            encoder_frames = module(encoder_frames, frame_lens)
        return encoder_frames

    def forward(self, encoder_frames: Tensor, frame_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Stack adapted encoder frames and map them into the LLM's embedding space.

        Args:
            encoder_frames: (B, F, D_enc), right-padded, one frame per 20 ms.
            frame_lens: (B,) int64, valid frames in each row.

        Returns:
            Audio embeddings (B, N, D_llm), one per 20*S ms, and their lengths (B,).

        Source: SLAM-ASR, arXiv 2402.08846; its code drops the remainder, this pads it.
        """
        stacked = stack_frames(encoder_frames, frame_lens, self.stack_size)
        hidden = functional.relu(self.linear_in(stacked))
        lens = (frame_lens + self.stack_size - 1) // self.stack_size
        return self.linear_out(hidden), lens
