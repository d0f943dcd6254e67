"""Load and save a checkpoint folder.

    config.json               SpeechLLMConfig
    generation_config.json
    connector.safetensors     connector.* and ctc_head.*
    tokenizer and processor files
    encoder/                  a Hugging Face Whisper encoder folder, or a path or hub id in config
    llm/                      a Hugging Face causal LM folder, or a path or hub id in config
    lora/                     optional peft adapter

Only safetensors are read, no code from a checkpoint is run, and every tensor must be there, be
wanted and fit.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import logging as hf_logging

from model.configuration import SpeechLLMConfig
from model.modeling import SpeechLLMForConditionalGeneration
from model.processing import SpeechLLMProcessor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor
    from transformers import PreTrainedModel

CONNECTOR_FILE = "connector.safetensors"
_READ = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the fault."""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bars and load reports off stderr; our errors say it all."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def resolve(source: str | Path, base: Path | None = None, revision: str | None = None) -> Path:
    """Find a folder: relative to `base`, a path of its own, or a hub id that is downloaded.

    `revision` is a hub repository's branch, tag or commit.

    Raises:
        CheckpointError: there is no such folder and no such hub repository at hand.
    """
    source = str(source)
    for candidate in ([base / source] if base is not None else []) + [Path(source).expanduser()]:
        if candidate.is_dir():
            return candidate
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=_READ))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{source}: no such folder, and not to be had from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder, shards in the index's order.

    Raises:
        CheckpointError: there is none, a shard is missing, or the weights are pickled.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = dict.fromkeys(json.loads(index.read_text())["weight_map"].values())
        files = [folder / name for name in names]
        for file in files:
            if not file.exists():
                raise CheckpointError(f"{index}: names {file.name}, which is not there")
        return files
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    refuse_pickles(folder)
    raise CheckpointError(f"{folder}: holds no model.safetensors")


def refuse_pickles(folder: Path) -> None:
    """Raise CheckpointError if `folder` holds pickled weights, which can run code when read."""
    for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt"):
        for file in sorted(folder.glob(pattern)):
            raise CheckpointError(
                f"{file}: a pickle file; only safetensors are read. Convert it, or remove it"
            )


def read_tensors(files: Iterable[Path], prefixes: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """Read the tensors whose name starts with the first of `prefixes` that occurs, stripped of it.

    Raises:
        CheckpointError: a file is no safetensors file, or is cut short.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as reader:
                for name in reader.keys():  # noqa: SIM118 - not a dict
                    prefix = next((p for p in prefixes if name.startswith(p)), None)
                    if prefix is not None:
                        tensors[name.removeprefix(prefix)] = reader.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: not a whole safetensors file ({error})") from error
    return tensors


def check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], origin: str) -> None:
    """Compare names and shapes.

    Raises:
        CheckpointError: names the tensors that are missing, not wanted, or of another shape.
    """
    faults = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    faults += [f"{name} is not part of this model" for name in sorted(found.keys() - wanted.keys())]
    faults += [
        f"{name} has shape {tuple(found[name].shape)}, the configuration wants "
        f"{tuple(wanted[name].shape)}"
        for name in sorted(wanted.keys() & found.keys())
        if found[name].shape != wanted[name].shape
    ]
    if faults:
        more = f" and {len(faults) - 5} more faults" if len(faults) > 5 else ""  # noqa: PLR2004
        raise CheckpointError(f"{origin}: {'; '.join(faults[:5])}{more}")


def load_config(folder: Path) -> SpeechLLMConfig:
    """Read `config.json`.

    Raises:
        CheckpointError: it is missing, no JSON, of another model type, or has a value out of range.
    """
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file; is this a checkpoint folder?")
    try:
        fields = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(fields, dict) or fields.get("model_type") != SpeechLLMConfig.model_type:
        kind = fields.get("model_type") if isinstance(fields, dict) else None
        raise CheckpointError(
            f"{path}: model_type is {kind!r}, wanted {SpeechLLMConfig.model_type!r}"
        )
    try:
        config: SpeechLLMConfig = SpeechLLMConfig.from_dict(fields)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return config


def load_encoder(
    folder: Path, config: SpeechLLMConfig, dtype: torch.dtype | None = None
) -> WhisperEncoder:
    """Load a Whisper encoder from an encoder folder or a whole Whisper folder."""
    with torch.device("meta"):
        encoder = WhisperEncoder(config.encoder_config)
    tensors = read_tensors(tensor_files(folder), ("model.encoder.", "encoder.", ""))
    wanted = encoder.state_dict()
    # A whole Whisper folder holds its decoder too, which the encoder's prefix leaves out.
    tensors = {
        k: v for k, v in tensors.items() if not k.startswith(("model.", "decoder.", "proj_"))
    }
    check_tensors(tensors, wanted, f"{folder}")
    encoder.load_state_dict(
        {name: tensor.to(dtype) if dtype else tensor for name, tensor in tensors.items()},
        assign=True,
    )
    return encoder.eval()


def load_llm(
    folder: Path, config: SpeechLLMConfig, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Load any causal LM of transformers, whole or sharded."""
    tensor_files(folder)  # refuses pickles and missing shards before transformers looks
    with quiet_transformers():
        llm, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config.llm_config,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    faults = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    faults += [f"{name} is not part of this model" for name in sorted(info["unexpected_keys"])]
    faults += [
        f"{name} has shape {tuple(found)}, the configuration wants {tuple(wanted)}"
        for name, found, wanted in sorted(info["mismatched_keys"])
    ]
    if faults:
        raise CheckpointError(f"{folder}: {'; '.join(faults[:5])}")
    return llm.eval()


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    merge_lora: bool = True,
    revision: str | None = None,
) -> SpeechLLMForConditionalGeneration:
    """Load a checkpoint.

    Args:
        source: checkpoint folder or hub id.
        dtype: of all weights; None keeps what is stored.
        device: where the model is placed.
        merge_lora: fold an adapter into the LLM's weights; False keeps it trainable.
        revision: branch, tag or commit where `source` is a hub id.

    Raises:
        CheckpointError: anything is missing, extra, of a wrong shape, pickled or does not fit.
    """
    folder = resolve(source, revision=revision)
    refuse_pickles(folder)
    config = load_config(folder)
    encoder = load_encoder(resolve(config.encoder, folder), config, dtype)
    llm = load_llm(resolve(config.llm, folder), config, dtype)
    if config.lora is not None:
        llm = _load_lora(llm, resolve(config.lora, folder), merge=merge_lora)
    with torch.device("meta"):
        model = SpeechLLMForConditionalGeneration(config, encoder=encoder, llm=llm)
    own = {n: p for n, p in model.state_dict().items() if n.startswith(("connector.", "ctc_head."))}
    path = folder / CONNECTOR_FILE
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file")
    tensors = read_tensors([path])
    check_tensors(tensors, own, str(path))
    target = dtype or next(encoder.parameters()).dtype
    model.load_state_dict(
        {name: tensor.to(target) for name, tensor in tensors.items()}, strict=False, assign=True
    )
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.to(device).eval()
    return model


def _load_lora(llm: PreTrainedModel, folder: Path, *, merge: bool) -> PreTrainedModel:
    from peft import PeftModel  # noqa: PLC0415 - only checkpoints with an adapter need it

    refuse_pickles(folder)
    adapted = PeftModel.from_pretrained(llm, str(folder), is_trainable=not merge)
    return adapted.merge_and_unload() if merge else adapted


def load_processor(source: str | Path) -> SpeechLLMProcessor:
    """Load a checkpoint's processor and check that its tokenizer fits the LLM.

    Raises:
        CheckpointError: files are missing, or the tokenizer and the model disagree.
    """
    folder = resolve(source)
    config = load_config(folder)
    try:
        processor: SpeechLLMProcessor = SpeechLLMProcessor.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder}: cannot read the processor: {error}") from error
    check_processor(processor, config, str(folder))
    return processor


def check_processor(processor: SpeechLLMProcessor, config: SpeechLLMConfig, origin: str) -> None:
    """Raise CheckpointError where tokenizer or features do not fit the model."""
    tokenizer = processor.tokenizer
    pairs = {
        "pad_token_id": (tokenizer.pad_token_id, config.pad_token_id),
        "eos_token_id": (tokenizer.eos_token_id, config.eos_token_id),
        "audio_token_id": (processor.audio_token_id, config.audio_token_id),
        "mel bins": (processor.feature_extractor.feature_size, config.encoder_config.num_mel_bins),
        "encoder_mode": (processor.encoder_mode, config.encoder_mode),
        "connector": (processor.connector, config.connector),
    }
    for name, (have, want) in pairs.items():
        if have != want:
            raise CheckpointError(f"{origin}: {name} is {have} in the processor, {want} in config")
    rows = config.get_text_config().vocab_size
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise CheckpointError(
            f"{origin}: the tokenizer has ids up to {largest}, the LLM only {rows} embeddings"
        )


def save_model(
    model: SpeechLLMForConditionalGeneration,
    folder: str | Path,
    *,
    processor: SpeechLLMProcessor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a checkpoint folder.

    Parts whose source in the configuration is a hub id or a path elsewhere are not written again:
    a projector can be published alone.

    Args:
        model: what to save.
        folder: where to.
        processor: written beside the model when given.
        dtype: of the stored weights; None keeps theirs.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    llm = model.llm
    if config.lora is not None and hasattr(llm, "peft_config"):
        llm.save_pretrained(str(folder / config.lora))
        llm = llm.get_base_model()
    for source, part in ((config.encoder, model.encoder), (config.llm, llm)):
        if source in {"encoder", "llm"}:
            _save_part(part, folder / source, dtype)
    state = model.state_dict()
    own = {n: t for n, t in state.items() if n.startswith(("connector.", "ctc_head."))}
    save_file({n: _stored(t, dtype) for n, t in own.items()}, folder / CONNECTOR_FILE)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)


def _save_part(part: PreTrainedModel, folder: Path, dtype: torch.dtype | None) -> None:
    state = {
        name.replace(".base_layer.", "."): _stored(tensor, dtype)
        for name, tensor in part.state_dict().items()
        if ".lora_" not in name  # an adapter that wraps these layers is stored on its own
    }
    with quiet_transformers():
        part.save_pretrained(folder, state_dict=state)


def _stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach().cpu()
    return (tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor).contiguous()


def load_tokenizer(source: str | Path) -> Any:  # noqa: ANN401 - transformers' own union
    """Load a tokenizer from a folder or hub id, without running code from it."""
    return AutoTokenizer.from_pretrained(resolve(source), trust_remote_code=False)
