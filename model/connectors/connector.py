"""What every connector is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from torch import Tensor


class Connector(nn.Module, ABC):
    """Map encoder frames into the LLM's embedding space.

    Attributes:
        stack_size: encoder frames that one audio embedding stands for, rounded up at a clip's end.
    """

    stack_size: int

    def adapt(self, encoder_frames: Tensor, frame_lens: Tensor) -> Tensor:
        """Frames (B, F, D_enc) that `forward` and the CTC head read, of the encoder's ones."""
        return encoder_frames

    @abstractmethod
    def forward(self, encoder_frames: Tensor, frame_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Map adapted frames (B, F, D_enc), lengths (B,) to embeddings (B, N, D_llm), theirs."""

    @abstractmethod
    def silence(self) -> None:
        """Zero the last layer, so that what is added to this connector's output stands alone."""
