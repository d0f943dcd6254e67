"""Load and save a checkpoint folder.

    config.json               SpeechLLMConfig
    generation_config.json
    connector.safetensors     connector.* and ctc_head.*
    lexicon.txt               a word a line, where config.json has a lexicon_penalty
    tokenizer and processor files
    encoder/                  a Hugging Face Whisper encoder folder, or a path or hub id in config
    llm/                      a Hugging Face causal LM folder, or a path or hub id in config
    lora/                     optional peft adapter

Only safetensors are read, no code from a checkpoint is run, and every tensor must be there, be
wanted and fit.
"""

from __future__ import annotations

import json
import math
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import logging as hf_logging

from model.configuration import SpeechLLMConfig
from model.lexicon import Lexicon, check_words
from model.modeling import SpeechLLMForConditionalGeneration
from model.processing import SpeechLLMProcessor
from model.token_bytes import TokenBytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

CONNECTOR_FILE = "connector.safetensors"
_GENERATION_FILE = "generation_config.json"
_LEXICON_FILE = "lexicon.txt"
_READ = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
_OWN_PARTS = ("encoder", "llm", "lora")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the fault."""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bars and load reports off stderr; our errors say it all."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # peft asks transformers under a name that is going away.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def resolve(source: str | Path, base: Path | None = None, revision: str | None = None) -> Path:
    """Find a folder: relative to `base`, a path of its own, or a hub id that is downloaded.

    The names of a checkpoint's own parts are looked for in `base` alone. `revision` is a hub
    repository's branch, tag or commit.

    Raises:
        CheckpointError: there is no such folder and no such hub repository at hand.
    """
    source = str(source)
    if base is not None and (base / source).is_dir():
        return base / source
    if base is not None and source in _OWN_PARTS:
        raise CheckpointError(f"{base / source}: there is no such folder")
    if Path(source).expanduser().is_dir():
        return Path(source).expanduser()
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
        try:
            names = dict.fromkeys(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: not an index of shards ({error!r})") from error
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


def read_tensors(
    files: Iterable[Path],
    prefixes: tuple[str, ...] = ("",),
    *,
    ignored: tuple[str, ...] = (),
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Read the tensors whose name starts with the first of `prefixes` that occurs, stripped of it.

    Each has memory of its own. A mapped file would stay in memory, all that was ever read of it,
    until the last of its tensors is let go.

    Args:
        files: safetensors.
        prefixes: of the names that are read.
        ignored: how names, stripped, begin that are not.
        dtype: of all that is floating point; None keeps what is stored.

    Raises:
        CheckpointError: a file is no safetensors file, or is cut short.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt", backend="pread") as reader:
                for name in reader.keys():  # noqa: SIM118 - not a dict
                    prefix = next((p for p in prefixes if name.startswith(p)), None)
                    if prefix is None or (own := name.removeprefix(prefix)).startswith(ignored):
                        continue
                    tensor = reader.get_tensor(name)
                    converts = dtype is not None and tensor.is_floating_point()
                    tensors[own] = tensor.to(dtype) if converts else tensor
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
    _refuse(faults, origin)


def _refuse(faults: list[str], origin: str) -> None:
    if faults:
        more = f" and {len(faults) - 5} more faults" if len(faults) > 5 else ""  # noqa: PLR2004 - as many as a line holds
        raise CheckpointError(f"{origin}: {'; '.join(faults[:5])}{more}")


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing, no JSON, or no object.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file; is this a checkpoint folder?")
    try:
        fields = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return fields


def load_config(folder: Path) -> SpeechLLMConfig:
    """Read `config.json`.

    Raises:
        CheckpointError: it is missing, no JSON, of another model type, or has a value out of range.
    """
    path = folder / "config.json"
    fields = read_config_file(path)
    if fields.get("model_type") != SpeechLLMConfig.model_type:
        raise CheckpointError(
            f"{path}: model_type is {fields.get('model_type')!r}, wanted "
            f"{SpeechLLMConfig.model_type!r}"
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
    tensors = read_tensors(
        tensor_files(folder),
        ("model.encoder.", "encoder.", ""),
        ignored=("model.", "decoder.", "proj_"),  # the rest of a whole Whisper folder
        dtype=dtype,
    )
    check_tensors(tensors, encoder.state_dict(), f"{folder}")
    encoder.load_state_dict(tensors, assign=True)
    return encoder.eval()


def load_llm(
    folder: Path, config: SpeechLLMConfig, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Load any causal LM of transformers, whole or sharded."""
    try:
        with torch.device("meta"):
            made = AutoModelForCausalLM.from_config(config.llm_config, trust_remote_code=False)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return cast("PreTrainedModel", load_whole(type(made), folder, dtype, made.config))


def load_whole(
    model_class: type[PreTrainedModel],
    folder: Path,
    dtype: torch.dtype | None = None,
    config: PreTrainedConfig | None = None,
) -> Any:  # noqa: ANN401 - of the class that is given
    """Load a transformers model, whole or sharded.

    Args:
        model_class: of the model, no Auto class.
        folder: of the model.
        dtype: of all weights; None keeps what is stored.
        config: None reads the folder's.

    Raises:
        CheckpointError: a tensor is missing, extra or of another shape, a file is cut short or
            pickled, or transformers cannot build the model.
    """
    # Given the folder, transformers would map its files.
    tensors = read_tensors(tensor_files(folder), dtype=dtype)
    stored = next((each.dtype for each in tensors.values() if each.is_floating_point()), None)
    try:
        with quiet_transformers():
            model, info = model_class.from_pretrained(
                None,
                config=config or model_class.config_class.from_pretrained(folder),
                state_dict=tensors,
                dtype=dtype or stored,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
            if (folder / _GENERATION_FILE).exists():
                model.generation_config = GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    faults = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    faults += [f"{name} is not part of this model" for name in sorted(info["unexpected_keys"])]
    faults += [
        f"{name} has shape {tuple(found)}, the configuration wants {tuple(wanted)}"
        for name, found, wanted in sorted(info["mismatched_keys"])
    ]
    _refuse(faults, str(folder))
    return model.eval()


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
        merge_lora: fold an adapter into the LLM's weights, which are then the checkpoint's own;
            False keeps it trainable.
        revision: branch, tag or commit where `source` is a hub id.

    Raises:
        CheckpointError: anything is missing, extra, of a wrong shape, pickled or does not fit.
    """
    folder = resolve(source, revision=revision)
    for part in ("", *_OWN_PARTS):
        refuse_pickles(folder / part)
    config = load_config(folder)
    encoder = load_encoder(_find_part(config, "encoder", folder), config, dtype)
    llm = load_llm(_find_part(config, "llm", folder), config, dtype)
    if config.lora is not None:
        llm = _load_lora(llm, resolve(config.lora, folder), merge=merge_lora)
        if merge_lora:
            config.llm, config.lora = "llm", None
    with torch.device("meta"):
        model = SpeechLLMForConditionalGeneration(config, encoder=encoder, llm=llm)
    own = {n: p for n, p in model.state_dict().items() if n.startswith(("connector.", "ctc_head."))}
    path = folder / CONNECTOR_FILE
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file")
    tensors = read_tensors([path], dtype=dtype)
    check_tensors(tensors, own, str(path))
    model.load_state_dict(tensors, strict=False, assign=True)
    if model.ctc_head is not None:
        try:
            model.ctc_head.check()
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
    if (folder / _GENERATION_FILE).exists():
        model.generation_config = _load_generation_config(folder)
    if config.lexicon_penalty:
        model.lexicon = _load_lexicon(folder, config)
    model.to(device).eval()
    return model


def _load_generation_config(folder: Path) -> GenerationConfig:
    path = folder / _GENERATION_FILE
    try:
        settings = GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    beams = settings.num_beams
    if beams is not None and not (isinstance(beams, int) and beams >= 1):
        raise CheckpointError(f"{path}: num_beams is {beams!r}, not a number from 1 on")
    return settings


def _load_lexicon(folder: Path, config: SpeechLLMConfig) -> Lexicon:
    token_bytes = TokenBytes(load_tokenizer(folder))
    tokens = [token_bytes(index) for index in range(config.get_text_config().vocab_size)]
    path = folder / _LEXICON_FILE
    try:
        words = path.read_text(encoding="utf-8").split()
        return Lexicon(words, config.lexicon_penalty, tokens)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def write_lexicon(folder: Path, words: Iterable[str], penalty: float) -> None:
    """Give a checkpoint a lexicon, in place of the one that it may have.

    Args:
        folder: of the checkpoint; its configuration notes the penalty.
        words: at least one; see `model.lexicon.words_of`.
        penalty: in nats; above 0.

    Raises:
        CheckpointError: the folder is no checkpoint, or it does not decode jointly.
        ValueError: the penalty is out of range, or what is no word is among the words.
    """
    if not 0 < penalty < math.inf:
        raise ValueError(f"the penalty must be above 0 and finite, not {penalty}")
    checked = check_words(words)
    fields = load_config(folder).to_dict()
    try:
        config = SpeechLLMConfig.from_dict(fields | {"lexicon_penalty": penalty})
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    _write_words(folder, checked)
    config.save_pretrained(folder)


def _write_words(folder: Path, words: frozenset[str]) -> None:
    lines = "".join(f"{word}\n" for word in sorted(words))
    (folder / _LEXICON_FILE).write_text(lines, encoding="utf-8")


def _find_part(config: SpeechLLMConfig, part: Literal["encoder", "llm"], folder: Path) -> Path:
    """Resolve a part of the checkpoint in `folder`, and have `config` say where it lies.

    A path from this folder would lead nowhere from that in which the model may be saved.
    """
    source: str = getattr(config, part)
    found = resolve(source, folder)
    if source not in _OWN_PARTS and (folder / source).is_dir():
        setattr(config, part, str(found.resolve()))
    return found


def _load_lora(llm: PreTrainedModel, folder: Path, *, merge: bool) -> PreTrainedModel:
    # Imported here: only checkpoints with an adapter need it.
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict  # noqa: PLC0415 - see above
    from peft.utils import get_peft_model_state_dict  # noqa: PLC0415 - see above

    refuse_pickles(folder)
    file = folder / "adapter_model.safetensors"
    tensors = read_tensors([file])
    try:
        adapter = PeftConfig.from_pretrained(str(folder))
        adapter.inference_mode = merge
        adapter.base_model_name_or_path = None  # peft would compare it with our path
        with quiet_transformers():
            adapted = get_peft_model(llm, adapter)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder}: cannot read the adapter: {error}") from error
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    check_tensors(tensors, wanted, str(file))
    set_peft_model_state_dict(adapted, tensors)
    return cast("PreTrainedModel", adapted.merge_and_unload() if merge else adapted)


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
        for adapter in llm.peft_config.values():
            adapter.base_model_name_or_path = config.llm  # not the path it was loaded from
        llm.save_pretrained(str(folder / config.lora), save_embedding_layers=False)
        llm = llm.get_base_model()
    for source, part in ((config.encoder, model.encoder), (config.llm, llm)):
        if source in {"encoder", "llm"}:
            _save_part(part, folder / source, dtype)
    state = model.state_dict()
    own = {n: t for n, t in state.items() if n.startswith(("connector.", "ctc_head."))}
    save_file({n: _stored(t, dtype) for n, t in own.items()}, folder / CONNECTOR_FILE)
    config.architectures = [type(model).__name__]
    config.lexicon_penalty = model.lexicon.penalty if model.lexicon is not None else 0.0
    for nested in (config.encoder_config, config.llm_config):
        nested.name_or_path = ""  # else a path of the machine that trained it is published
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    if model.lexicon is not None:
        _write_words(folder, model.lexicon.words)
    if processor is not None:
        processor.save_pretrained(folder)
    _share_as(folder / "config.json", folder)


def _share_as(example: Path, folder: Path) -> None:
    """Make weights as readable as other files: safetensors leaves them to their owner alone."""
    parts = [folder, *(folder / part for part in _OWN_PARTS)]
    for file in (file for part in parts for file in part.glob("*.safetensors")):
        file.chmod(example.stat().st_mode)


def _save_part(part: PreTrainedModel, folder: Path, dtype: torch.dtype | None) -> None:
    # Tied tensors stay one object through the conversion, so that they are stored once.
    stored: dict[tuple[int, torch.Size], Tensor] = {}
    state = {}
    for name, tensor in part.state_dict().items():
        if ".lora_" in name:  # an adapter that wraps these layers is stored on its own
            continue
        place = (tensor.data_ptr(), tensor.shape)
        state[name.replace(".base_layer.", ".")] = stored.setdefault(place, _stored(tensor, dtype))
    with quiet_transformers():
        part.save_pretrained(folder, state_dict=state)


def _stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach().cpu()
    return (tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor).contiguous()


def load_tokenizer(source: str | Path) -> Any:  # noqa: ANN401 - transformers' own union
    """Load a tokenizer from a folder or hub id, without running code from it.

    Raises:
        CheckpointError: there is none.
    """
    tokenizer = AutoTokenizer.from_pretrained(resolve(source), trust_remote_code=False)
    # Where its files are missing, transformers makes one that knows no text, and says nothing.
    if not tokenizer("a", add_special_tokens=False).input_ids:
        raise CheckpointError(f"{source}: holds no tokenizer (tokenizer.json is missing)")
    return tokenizer
