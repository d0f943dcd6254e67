"""Put an encoder, a connector and an LLM together into a new speech LLM."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, GenerationConfig, WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from model.checkpoint import (
    CheckpointError,
    check_tensors,
    load_encoder,
    load_llm,
    load_tokenizer,
    read_config_file,
    read_tensors,
    resolve,
)
from model.configuration import DEFAULT_PROMPT, SpeechLLMConfig
from model.ctc import CTCHead
from model.modeling import SpeechLLMForConditionalGeneration
from model.processing import SpeechLLMProcessor
from model.whisper_baseline import CTC_HEAD_FILE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

AUDIO_TOKEN = "<|audio|>"  # noqa: S105 - a vocabulary entry


@dataclass(frozen=True, slots=True)
class Parts:
    """What a new speech LLM is made of.

    Attributes:
        encoder: folder or hub id of a Whisper encoder or a whole Whisper.
        llm: folder or hub id of a causal LM with its tokenizer.
        connector: `{"type": name, …}`.
        ctc: `none`, `auxiliary` or `fused`, see `SpeechLLMConfig`.
        audio_positions: `sequence` or `ctc`, see `SpeechLLMConfig`.
        encoder_mode: `padded` or `trimmed`; None takes what the encoder was fine-tuned for.
        prompt: what the user turn asks.
        languages: ISO 639-1 codes.
        random_encoder: start from random encoder weights (an ablation).
        seed: of the weights that are made anew.
    """

    encoder: str
    llm: str
    connector: dict[str, Any] = field(default_factory=dict)
    ctc: str = "none"
    audio_positions: str = "sequence"
    encoder_mode: str | None = None
    prompt: str = DEFAULT_PROMPT
    languages: tuple[str, ...] = ()
    random_encoder: bool = False
    seed: int = 0


def prepare_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load an LLM's tokenizer and give it what a speech LLM needs.

    An `<|audio|>` entry marks audio positions; a pad token that differs from EOS leaves EOS
    trainable. Both take spare ids, so that a published LLM's embeddings keep their size.
    """
    tokenizer = load_tokenizer(source)
    vocabulary = tokenizer.get_vocab()
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        if "<|im_end|>" in vocabulary and tokenizer.eos_token != "<|im_end|>":  # noqa: S105 - a token, not a password
            tokenizer.eos_token = "<|im_end|>"  # noqa: S105 - Qwen's base models end with pad
        else:
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    if AUDIO_TOKEN not in vocabulary:
        tokenizer.add_tokens([AUDIO_TOKEN], special_tokens=True)
    return tokenizer


def transcript_tokens(processor: SpeechLLMProcessor, transcripts: Iterable[str]) -> set[int]:
    """Token ids of transcripts, each as it is and as it stands behind another in a joined clip."""
    texts = {" "}
    for text in transcripts:
        texts |= {text, " " + text}
    rows = processor.tokenizer(
        sorted(texts), add_special_tokens=False, split_special_tokens=True
    ).input_ids
    return {token for row in rows for token in row}


def assemble(
    parts: Parts, transcripts: Iterable[str] | None = None
) -> tuple[SpeechLLMForConditionalGeneration, SpeechLLMProcessor]:
    """Make a speech LLM with a new connector, in fp32.

    Of a CTC head that lies beside the encoder (`ctc_head.safetensors`), what it knows of the LLM's
    tokens is taken over.

    Args:
        parts: what it is made of.
        transcripts: what the model will be trained on. The CTC head covers their tokens if they
            are less than half of the LLM's vocabulary, else, and with None, all of it.

    Raises:
        CheckpointError: a part cannot be used, or the tokenizer needs more ids than the LLM has.
        ValueError: a configuration value out of range.
    """
    encoder_folder, llm_folder = resolve(parts.encoder), resolve(parts.llm)
    tokenizer = prepare_tokenizer(parts.llm)
    encoder_fields = read_config_file(encoder_folder / "config.json")
    read_config_file(llm_folder / "config.json")
    llm_config = AutoConfig.from_pretrained(llm_folder)
    if max(tokenizer.get_vocab().values()) >= llm_config.vocab_size:
        raise CheckpointError(
            f"{parts.llm}: its {llm_config.vocab_size} embeddings leave no spare id for "
            f"{AUDIO_TOKEN} or a pad token; resize its embeddings first"
        )
    config = SpeechLLMConfig(
        encoder_config=WhisperConfig.from_pretrained(encoder_folder),
        llm_config=llm_config,
        # Random weights are nowhere to be had again.
        encoder=parts.encoder
        if not parts.random_encoder and not Path(parts.encoder).exists()
        else "encoder",
        llm="llm" if Path(parts.llm).exists() else parts.llm,
        connector=parts.connector,
        ctc=parts.ctc,
        audio_positions=parts.audio_positions,
        encoder_mode=parts.encoder_mode or encoder_fields.get("encoder_mode", "padded"),
        prompt=parts.prompt,
        audio_token_id=tokenizer.get_vocab()[AUDIO_TOKEN],
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        languages=list(parts.languages),
    )
    processor = SpeechLLMProcessor(
        WhisperFeatureExtractor(feature_size=config.encoder_config.num_mel_bins),
        tokenizer,
        connector=config.connector,
        encoder_mode=config.encoder_mode,
        prompt=config.prompt,
    )
    tokens: set[int] = set()
    if transcripts is not None and config.ctc != "none":
        tokens = transcript_tokens(processor, transcripts)
        if 2 * len(tokens) < llm_config.vocab_size:
            config.ctc_tokens = 1 + len(tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(parts.seed)
        encoder = (
            WhisperEncoder(config.encoder_config)
            if parts.random_encoder
            else load_encoder(encoder_folder, config, torch.float32)
        )
        llm = load_llm(llm_folder, config, torch.float32)
        model = SpeechLLMForConditionalGeneration(config, encoder=encoder, llm=llm)
    if config.ctc == "fused":
        # A random connector drowns the token embeddings that the CTC posteriors select.
        model.connector.silence()
    if model.ctc_head is not None:
        if config.ctc_tokens is not None:
            model.ctc_head.choose(tokens)
        _take_over_ctc_head(model.ctc_head, encoder_folder, config, tokenizer)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model, processor


def _take_over_ctc_head(
    head: CTCHead,
    encoder_folder: Path,
    config: SpeechLLMConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    file = encoder_folder / CTC_HEAD_FILE
    if not file.exists():
        return
    own = load_tokenizer(encoder_folder).get_vocab()
    if not own.items() <= tokenizer.get_vocab().items():
        _log.warning(
            "%s: its tokens are not the LLM's, so the new CTC head does not begin with it", file
        )
        return
    tensors = read_tensors([file])
    width, n_tokens = config.encoder_config.d_model, config.encoder_config.vocab_size
    wanted = {"weight": torch.empty(n_tokens, width), "bias": torch.empty(n_tokens)}
    check_tensors(tensors, wanted, str(file))
    head.take_over(tensors["weight"], tensors["bias"], range(n_tokens))


def cover_transcripts(
    model: SpeechLLMForConditionalGeneration,
    processor: SpeechLLMProcessor,
    transcripts: Iterable[str],
    seed: int,
) -> None:
    """Let the CTC head of a model that is trained further cover the new transcripts' tokens too.

    Args:
        model: its head, if it has one that does not cover all of them, is replaced by a larger one
            that knows what it knew.
        processor: the model's.
        transcripts: what the model will be trained on.
        seed: of the new outputs' weights.
    """
    head = model.ctc_head
    if head is None or head.token_ids is None:
        return
    known = head.token_ids.tolist()
    added = transcript_tokens(processor, transcripts) - {*known}
    if not added:
        return
    model.config.ctc_tokens = len(known) + len(added)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.ctc_head = CTCHead(
            head.in_features, head.vocab_size, known[0], model.config.ctc_tokens
        )
    model.ctc_head.choose({*known[1:], *added})
    model.ctc_head.take_over(head.weight, head.bias, known)
