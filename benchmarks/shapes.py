"""What the benchmarks run: the default checkpoint, or published shapes with random weights.

Random weights say nothing sensible, but take as long as trained ones, and always as many tokens as
they are asked for: their end token cannot be the likeliest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from model.checkpoint import save_model
from model.configuration import SpeechLLMConfig
from model.modeling import SpeechLLMForConditionalGeneration
from model.processing import SpeechLLMProcessor
from model.training.tokenizer import AUDIO_TOKEN

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_CHECKPOINT = ROOT / "weights" / "default"

Shape = Literal["default", "small", "0.5b", "thin"]
"""`default`: `weights/default`, trained; `small`: its shape, random; `0.5b`: the encoder of
whisper-tiny and Qwen2.5-0.5B's shape, random; `thin`: next to nothing, random, for what is left."""


def make_checkpoint(
    shape: Shape,
    folder: Path,
    tokens_per_audio_s: float,
    *,
    dtype: torch.dtype | None = None,
) -> Path:
    """Return the folder of a checkpoint of this shape, written to `folder` if it is random.

    Args:
        shape: which.
        folder: where to write.
        tokens_per_audio_s: that a random checkpoint says of each second; the default says what it
            was trained to.
        dtype: that a random checkpoint is stored in; None for fp32.
    """
    if shape == "default":
        return DEFAULT_CHECKPOINT
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_CHECKPOINT)
    eos = int(tokenizer.eos_token_id)
    encoder, llm, hidden_size = _RANDOM[shape]
    config = SpeechLLMConfig(
        encoder_config=encoder,
        llm_config=llm,
        connector={"type": "stack", "stack_size": 4, "hidden_size": hidden_size},
        encoder_mode="trimmed",
        prompt="",
        audio_token_id=tokenizer.convert_tokens_to_ids(AUDIO_TOKEN),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=eos,
        max_tokens_per_audio_s=tokens_per_audio_s,
        min_token_budget=1,
    )
    torch.manual_seed(0)
    model = SpeechLLMForConditionalGeneration(config).eval()
    with torch.no_grad():
        # Tied to the output layer: the end token's logit is 0, and that of a likely one above.
        model.get_input_embeddings().weight[eos] = 0
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = eos
    processor = SpeechLLMProcessor(
        WhisperFeatureExtractor(feature_size=encoder.num_mel_bins),
        tokenizer,
        connector=config.connector,
        encoder_mode=config.encoder_mode,
        prompt=config.prompt,
    )
    save_model(model, folder, processor=processor, dtype=dtype)
    return folder


def make_whisper(folder: Path) -> None:
    """Write a complete Whisper of whisper-tiny's shape with random weights.

    Its vocabulary is as large as the published one and has the same special tokens in the same
    places; what its other tokens stand for says nothing.
    """
    vocabulary = sorted(ByteLevel.alphabet())
    vocabulary += [f"filler {number}" for number in range(len(vocabulary), _WHISPER_TEXT_TOKENS)]
    tokenizer = Tokenizer(BPE({token: number for number, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(), ByteLevelDecoder()
    languages = ["en", *(f"language {number}" for number in range(1, 99))]
    tasks = ["translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps"]
    times = [f"{0.02 * number:.2f}" for number in range(1501)]
    names = ["endoftext", "startoftranscript", *languages, *tasks, *times]
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", special=True) for name in names])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")  # noqa: S106 - a vocabulary entry
    torch.manual_seed(0)
    whisper = WhisperForConditionalGeneration(_WHISPER_TINY).eval()
    with torch.no_grad():
        whisper.get_input_embeddings().weight[fast.eos_token_id] = 0
    generation = whisper.generation_config
    generation.lang_to_id = {"<|en|>": fast.convert_tokens_to_ids("<|en|>")}
    generation.no_timestamps_token_id = fast.convert_tokens_to_ids("<|notimestamps|>")
    generation.alignment_heads = [[0, 0]]
    for part in (whisper, fast, WhisperFeatureExtractor(_WHISPER_TINY.num_mel_bins)):
        part.save_pretrained(folder)


_WHISPER_TEXT_TOKENS = 50_257
_WHISPER_TINY = WhisperConfig(
    d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536,
    decoder_layers=4, decoder_attention_heads=6, decoder_ffn_dim=1536, num_mel_bins=80,
)  # fmt: skip
_SMALL_LLM = Qwen2Config(
    vocab_size=1024, hidden_size=384, intermediate_size=960, num_hidden_layers=6,
    num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=2048,
    tie_word_embeddings=True, bos_token_id=None, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
# Source: config.json of Qwen/Qwen2.5-0.5B.
_QWEN25_05B = Qwen2Config(
    vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
    num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=32768,
    rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0}, rms_norm_eps=1e-6,
    tie_word_embeddings=True, bos_token_id=None, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
_THIN_ENCODER = WhisperConfig(
    d_model=4, encoder_layers=1, encoder_attention_heads=1, encoder_ffn_dim=4,
    decoder_layers=1, decoder_attention_heads=1, decoder_ffn_dim=4, num_mel_bins=80,
)  # fmt: skip
_THIN_LLM = Qwen2Config(
    vocab_size=1024, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=2048,
    tie_word_embeddings=True, bos_token_id=None, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
_RANDOM = {  # encoder, LLM, and the connector's hidden width
    "small": (_WHISPER_TINY, _SMALL_LLM, 2048),
    "0.5b": (_WHISPER_TINY, _QWEN25_05B, 2048),
    "thin": (_THIN_ENCODER, _THIN_LLM, 4),
}
