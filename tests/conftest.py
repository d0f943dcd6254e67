"""Fixtures shared by all tests: a real, small checkpoint, and the shared recordings."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch is loaded: with models as small as the tests', threads take longer to wait for each
# other than to compute, the more so on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("SPEECHLLM_CPU_THREADS", "1")
# Before Triton is: without a CUDA device, its kernels are interpreted.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# An example's wall time says more of the machine's load than of the code.
settings.register_profile("speechllm", deadline=None)
settings.load_profile("speechllm")

REPOSITORY = Path(__file__).resolve().parent.parent

SENTENCES = [
    "They were three hundred yards apart.",
    "Where did you find that apple?",
    "Move these files into the pictures folder.",
    "Нягтлан бодох хүн ирэв.",
    "Өнөөдөр хүйтэн байна, ёстой!",
    "zero one two three four five six seven eight nine",
]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Recordings and assets outside the project; a test that uses them skips without them."""
    folder = Path(os.environ.get("SPEECHLLM_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "manifests").is_dir():
        pytest.skip(f"no shared recordings at {folder}; set SPEECHLLM_SHARED_DATA")
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder in the project's format with small random weights."""
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    make_tiny_checkpoint(folder)
    return folder


def make_tiny_checkpoint(folder: Path, **overrides: object) -> None:
    """Write a small checkpoint; `overrides` replace fields of its SpeechLLMConfig."""
    import torch
    from transformers import Qwen2Config, WhisperConfig, WhisperFeatureExtractor

    from model.checkpoint import save_model
    from model.configuration import SpeechLLMConfig
    from model.modeling import SpeechLLMForConditionalGeneration
    from model.processing import SpeechLLMProcessor
    from model.training.tokenizer import AUDIO_TOKEN, train_tokenizer

    tokenizer = train_tokenizer(SENTENCES * 4, vocab_size=320)
    fields: dict[str, object] = {
        "encoder_config": WhisperConfig(
            d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64,
            decoder_layers=1, vocab_size=len(tokenizer),
            pad_token_id=0, bos_token_id=2, eos_token_id=2, decoder_start_token_id=1,
            # Wide enough that answers depend on the audio.
            init_std=0.2,
        ),
        "llm_config": Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
            tie_word_embeddings=True, initializer_range=0.2,
            bos_token_id=None, eos_token_id=2, pad_token_id=0,
        ),
        "connector": {"type": "stack", "stack_size": 4, "hidden_size": 64},
        "ctc": "fused",
        "encoder_mode": "trimmed",
        "audio_token_id": tokenizer.convert_tokens_to_ids(AUDIO_TOKEN),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "languages": ["en", "mn"],
        "max_tokens_per_audio_s": 4.0,
        "min_token_budget": 4,
    }  # fmt: skip
    config = SpeechLLMConfig(**{**fields, **overrides})
    torch.manual_seed(0)
    model = SpeechLLMForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = config.pad_token_id
    model.generation_config.eos_token_id = config.eos_token_id
    processor = SpeechLLMProcessor(
        WhisperFeatureExtractor(feature_size=config.encoder_config.num_mel_bins),
        tokenizer,
        connector=config.connector,
        encoder_mode=config.encoder_mode,
        prompt=config.prompt,
    )
    save_model(model, folder, processor=processor)
