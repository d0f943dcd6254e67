"""The convolution module of a Conformer, made independent of what else is in the batch.

Axis legend: B clips, F encoder frames (20 ms), D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.nn import functional

from model.encoder import length_mask

if TYPE_CHECKING:
    from torch import Tensor


class ConvolutionModule(nn.Module):
    """Let each frame see its neighbours: gated pointwise, depthwise, pointwise; residual.

    The paper's batch normalisation after the depthwise convolution is a layer normalisation here:
    a clip's answer must not depend on its batch.

    Source: Gulati et al. 2020, arXiv 2005.08100, figure 2.
    """

    def __init__(self, width: int, kernel_size: int) -> None:
        """Start as the identity: the last layer is zero.

        Args:
            width: D.
            kernel_size: frames that a frame sees, its own included; odd.
        """
        super().__init__()
        self.norm_in = nn.LayerNorm(width)
        self.gated = nn.Linear(width, 2 * width)
        self.depthwise = nn.Conv1d(
            width, width, kernel_size, padding=kernel_size // 2, groups=width
        )
        self.norm_mid = nn.LayerNorm(width)
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, frames: Tensor, frame_lens: Tensor) -> Tensor:
        """Map frames (B, F, D) of lengths (B,) to frames (B, F, D)."""
        hidden = functional.glu(self.gated(self.norm_in(frames)))
        # Zeroes past a clip's end are what the convolution's own padding gives a clip alone.
        hidden = hidden * length_mask(frame_lens, frames.shape[1])[..., None]
        hidden = self.depthwise(hidden.transpose(1, 2)).transpose(1, 2)
        change: Tensor = self.out(functional.silu(self.norm_mid(hidden)))
        return frames + change
