"""Checkpoints between two others."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from model.checkpoint import load_model, load_processor, save_model
from tests.conftest import make_tiny_checkpoint


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(folder, dtype=torch.float32).named_parameters())


def average(scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["average.py", *options])
    scripts["average"].main()


def test_weights_lie_between_those_of_two_checkpoints(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tiny_checkpoint(tmp_path / "a")
    other = load_model(tmp_path / "a", dtype=torch.float32)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter))
    save_model(other, tmp_path / "b", processor=load_processor(tmp_path / "a"))
    options = ["--model", f"{tmp_path}/a", "--towards", f"{tmp_path}/b", "--share", "0.25"]
    average(scripts, monkeypatch, *options, "--output", f"{tmp_path}/c")
    first, second, between = (parameters(tmp_path / name) for name in "abc")
    assert not any(torch.equal(tensor, second[name]) for name, tensor in first.items())
    for name, tensor in between.items():
        torch.testing.assert_close(tensor, first[name].lerp(second[name], 0.25), atol=1e-3, rtol=0)


def test_an_encoder_is_moved_towards_a_whisper_and_the_rest_stays(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tiny_checkpoint(tmp_path / "a")
    config: WhisperConfig = load_model(tmp_path / "a").config.encoder_config
    config.decoder_attention_heads = config.encoder_attention_heads
    whisper = WhisperForConditionalGeneration(config)
    whisper.save_pretrained(tmp_path / "whisper")
    options = ["--model", f"{tmp_path}/a", "--towards", f"{tmp_path}/whisper"]
    average(scripts, monkeypatch, *options, "--output", f"{tmp_path}/c")
    first, moved = (parameters(tmp_path / name) for name in "ac")
    published = dict(whisper.model.encoder.named_parameters())
    for name, tensor in moved.items():
        part, _, rest = name.partition(".")
        wanted = first[name].lerp(published[rest], 0.5) if part == "encoder" else first[name]
        torch.testing.assert_close(tensor, wanted, atol=1e-3, rtol=0)


def test_checkpoints_of_other_shapes_have_nothing_between_them(
    scripts: dict[str, ModuleType],
) -> None:
    with pytest.raises(ValueError, match="other parameters"):
        scripts["average"].average(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2), 0.5)
