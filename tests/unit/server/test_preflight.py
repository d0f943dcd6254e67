import json

import pytest
import torch

from model.configuration import SpeechLLMConfig
from server.preflight import MODEL_TYPE, check_model_settings
from server.settings import SettingError, Settings


def test_the_type_looked_for_is_the_models():
    assert SpeechLLMConfig.model_type == MODEL_TYPE


def test_a_checkpoint_and_a_hub_id_are_let_pass(tiny_checkpoint, monkeypatch):
    check_model_settings(Settings(model=str(tiny_checkpoint), device="cpu"))
    monkeypatch.setenv("HOME", str(tiny_checkpoint.parent))
    check_model_settings(Settings(model=f"~/{tiny_checkpoint.name}", device="cpu"))
    for name in ("someone/speech-llm_1.0", "speech-llm"):
        check_model_settings(Settings(model=name, device="cpu"))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("{tmp}/nothing", "there is no folder {tmp}/nothing"),
        ("./nothing", "there is no folder ./nothing"),
        ("~nobody-of-this-name/x", "home directory"),
        ("/" + 300 * "x", "File name too long"),
    ],
)
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(tmp_path, model, reason):
    settings = Settings(model=model.format(tmp=tmp_path), device="cpu")
    with pytest.raises(SettingError) as raised:
        check_model_settings(settings)
    assert str(raised.value).startswith("--model / SPEECHLLM_MODEL: ")
    assert reason.format(tmp=tmp_path) in str(raised.value)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (None, "not a checkpoint folder"),
        ("{", "config.json is not JSON"),
        ("[1]", "has model_type None"),
        (json.dumps({"model_type": "whisper"}), "has model_type 'whisper'"),
    ],
)
def test_a_folder_that_holds_another_thing_is_refused(tmp_path, config, reason):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(SettingError, match=r"--model / SPEECHLLM_MODEL: ") as raised:
        check_model_settings(Settings(model=str(tmp_path), device="cpu"))
    assert reason in str(raised.value)


def test_a_cuda_device_that_is_not_there_is_refused(tiny_checkpoint):
    absent = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(SettingError, match=rf"--device / SPEECHLLM_DEVICE: {absent} is not there"):
        check_model_settings(Settings(model=str(tiny_checkpoint), device=absent))
