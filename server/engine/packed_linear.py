"""Linear layers whose weights lie as the processor multiplies them.

oneDNN multiplies bf16 by weights in blocks of its own, and rearranges a plain matrix into them at
every call: for the few rows of a decode step, that is most of the call. Here it is done once, with
the same result.

fp32 is multiplied as it lies. But MKL multiplies 4 to 32 rows by a small matrix up to seven times
as fast where each row of it holds the weights of one input, not those of one output as torch has
it; by a large matrix it does not. (Measured on an Intel server CPU; see benchmarks/NOTES.md.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor


# Of a weight that is turned: beyond, two or three rows are slower than by the plain one.
_MOST_TURNED_BYTES = 4 << 20
_WIDEST_TURNED = 640  # the shorter side


class PackedLinear(nn.Module):
    """A linear layer for inference on a CPU in bf16."""

    def __init__(self, linear: nn.Linear) -> None:
        """Take over a layer's weight, as a copy, and its bias."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        # No buffer: nothing that copies or moves a model's tensors can handle this layout.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        output: Tensor = torch.ops.mkldnn._linear_pointwise(
            inputs, self._weight, self.bias, "none", [], ""
        )
        return output


def gains_from_packing(weight: Tensor) -> bool:
    """Whether this processor multiplies by such a weight faster once it is packed."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return False
    return torch.backends.mkldnn.is_available() and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def laid_out(weight: Tensor) -> Tensor:
    """The same weight (out, in) as it is multiplied fastest: turned in memory, or as it is."""
    is_fp32 = weight.device.type == "cpu" and weight.dtype == torch.float32
    if not (is_fp32 and torch.backends.mkl.is_available()):
        return weight
    if weight.nbytes > _MOST_TURNED_BYTES or min(weight.shape) > _WIDEST_TURNED:
        return weight
    return weight.t().contiguous().t()


@torch.no_grad()
def pack_linear_layers(module: nn.Module) -> None:
    """Replace the linear layers of a module by packed ones, or turn their weights, if it pays.

    Plain weights are let go one after another, but for those that others share, as an output layer
    may with the embeddings: it then has a copy of its own.
    """
    # No list of the linear layers themselves: it would keep their weights to the end.
    parents = [each for each in module.modules() if type(each) is not nn.Linear]
    for parent in parents:
        for name in [name for name, _ in parent.named_children()]:
            child = getattr(parent, name)
            if type(child) is not nn.Linear:
                continue
            if gains_from_packing(child.weight):
                setattr(parent, name, PackedLinear(child))
            elif (turned := laid_out(child.weight)) is not child.weight:
                child.weight = nn.Parameter(turned, requires_grad=False)
