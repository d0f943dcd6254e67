"""The frame-stacking connector, and the registry it stands in."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.connectors import connector_config, make_connector, output_lens


@given(st.integers(1, 1500), st.integers(1, 20))
def test_output_length_is_frames_over_stack_size_rounded_up(frames: int, stack: int) -> None:
    config = connector_config({"stack_size": stack})
    assert output_lens(config, torch.tensor([frames])).tolist() == [-(-frames // stack)]


@torch.inference_mode()
def test_padding_and_batch_change_nothing() -> None:
    torch.manual_seed(0)
    connector = make_connector(connector_config({"hidden_size": 24}), 8, 16)
    frames, lens = torch.randn(3, 17, 8), torch.tensor([3, 12, 17])
    embeds, embed_lens = connector(frames, lens)
    assert embed_lens.tolist() == [1, 3, 4]
    assert embeds.shape == (3, 4, 16)
    for row, clip, length, n_frames in zip(embeds, frames, embed_lens, lens, strict=True):
        alone, _ = connector(clip[None, :n_frames], n_frames[None])
        torch.testing.assert_close(row[:length], alone[0])


def test_defaults_are_five_frames_and_2048() -> None:
    config = connector_config({})
    assert (config["type"], config["stack_size"], config["hidden_size"]) == ("stack", 5, 2048)
    assert config["convolutions"] == 0


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"type": "telepathy"}, "unknown connector 'telepathy'; there are: stack"),
        ({"stack_size": 0}, "stack_size"),
        ({"width": 3}, "width"),
    ],
)
def test_bad_configuration_is_refused(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        connector_config(fields)


def test_a_silenced_connector_adds_nothing_and_can_still_learn() -> None:
    connector = make_connector(connector_config({"hidden_size": 24}), 8, 16)
    connector.silence()
    embeds, _ = connector(torch.randn(2, 10, 8), torch.tensor([10, 4]))
    assert torch.all(embeds == 0)
    embeds.sum().backward()
    assert connector.linear_out.weight.grad.abs().sum() > 0
