"""What can be found wrong with the model's settings before it is loaded.

Loading takes seconds to minutes, in which the server answers already. What shows without waiting
for torch is better told before.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from server.settings import SettingError, Settings

MODEL_TYPE = "speech_llm"
"""In a checkpoint's `config.json`; the model's own constant would bring torch along."""

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # whether there is one shows while it loads


def check_model_settings(settings: Settings) -> None:
    """Look for the checkpoint and for the device.

    Raises:
        SettingError: the folder holds no checkpoint, or there is neither such a folder nor can a
            hub repository have this name, or the device is absent.
    """
    _check_model(settings.model)
    if settings.device.startswith("cuda"):
        _check_cuda(settings.device)


def _check_model(model: str) -> None:
    try:
        folder = Path(model).expanduser()
        is_folder = folder.is_dir()
    except (OSError, RuntimeError) as error:  # no right to look there, no such user's home
        raise SettingError("model", f"{model}: {error}") from error
    if is_folder:
        _check_checkpoint(folder / "config.json")
    elif model == Settings.model_fields["model"].default:
        raise SettingError(
            "model", f"there is no folder {model} here: name one, or run this where the project is"
        )
    elif folder.exists():
        raise SettingError("model", f"{model} is no folder")
    elif not _HUB_ID.fullmatch(model):
        raise SettingError("model", f"there is no folder {model}")


def _check_checkpoint(config: Path) -> None:
    try:
        fields = json.loads(config.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingError(
            "model", f"not a checkpoint folder: {config}: {error.strerror}"
        ) from error
    except ValueError as error:
        raise SettingError("model", f"{config} is not JSON: {error}") from error
    model_type = fields.get("model_type") if isinstance(fields, dict) else None
    if model_type != MODEL_TYPE:
        raise SettingError(
            "model", f"not a checkpoint of a speech LLM: {config} has model_type {model_type!r}"
        )


def _check_cuda(device: str) -> None:
    # Imported for who asks for CUDA by name only: meanwhile not even health checks are answered.
    import torch  # noqa: PLC0415 - takes seconds, and is needed for CUDA alone

    count, index = torch.cuda.device_count(), int(device.partition(":")[2] or 0)
    if index >= count:
        raise SettingError("device", f"{device} is not there: torch finds {count} CUDA devices")
