"""The convolution module sees a clip's own frames, and starts as the identity."""

import pytest
import torch

from model.connectors import connector_config
from model.connectors.convolution import ConvolutionModule


def module() -> ConvolutionModule:
    torch.manual_seed(0)
    made = ConvolutionModule(16, 5).eval()
    torch.nn.init.normal_(made.out.weight)
    return made


def test_it_starts_as_the_identity() -> None:
    frames = torch.randn(2, 7, 16)
    fresh = ConvolutionModule(16, 5)
    torch.testing.assert_close(fresh(frames, torch.tensor([7, 3])), frames)


@torch.inference_mode()
def test_a_clip_in_a_batch_becomes_what_it_becomes_alone() -> None:
    frames, lens = 10 * torch.randn(2, 9, 16), torch.tensor([9, 4])
    together = module()(frames, lens)
    alone = module()(frames[1:, :4], lens[1:])
    torch.testing.assert_close(together[1, :4], alone[0])


@torch.inference_mode()
def test_a_frame_sees_half_a_kernel_to_each_side() -> None:
    frames = torch.randn(1, 9, 16)
    other = frames.clone()
    other[0, 4] += 1.0
    changed = (module()(frames, torch.tensor([9])) != module()(other, torch.tensor([9]))).any(-1)
    assert changed[0].tolist() == [False, False, True, True, True, True, True, False, False]


def test_an_even_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="kernel_size must be odd, got 4"):
        connector_config({"kernel_size": 4})
