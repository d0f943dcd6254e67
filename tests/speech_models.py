"""Small random speech LLMs of several families, and what `generate` says for one clip alone."""

import itertools
from pathlib import Path

import numpy as np
import torch
from transformers import (
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    LogitsProcessorList,
    MistralConfig,
    Qwen2Config,
    RepetitionPenaltyLogitsProcessor,
)

from model.checkpoint import write_lexicon
from model.ctc import CTCHead
from model.lexicon import words_of
from model.log_mel import SAMPLE_RATE_HZ
from model.processing import token_budget
from model.transcription import Transcriber
from tests.conftest import SENTENCES, make_tiny_checkpoint

_SIZES = {
    "vocab_size": 320, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 1024, "initializer_range": 0.2,
    "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "qwen2": Qwen2Config(**_SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2, one layer of a sliding window": Qwen2Config(
        **_SIZES, num_key_value_heads=2,
        use_sliding_window=True, sliding_window=12, max_window_layers=1,
    ),
    "llama": LlamaConfig(**_SIZES, num_key_value_heads=2),
    # Its positions are learnt.
    "gpt2": GPT2Config(
        vocab_size=320, n_embd=48, n_layer=2, n_head=4, n_positions=1024, initializer_range=0.2,
        bos_token_id=2, eos_token_id=2, pad_token_id=0,
    ),
    # Its decoder scales the embeddings it is given.
    "gemma": GemmaConfig(**_SIZES, num_key_value_heads=1, head_dim=12),
    # Its logits are capped, and its layers alternate between full and sliding attention.
    "gemma2": Gemma2Config(
        **_SIZES, num_key_value_heads=2, head_dim=12, sliding_window=12,
        attn_implementation="eager",
    ),
    "mistral": MistralConfig(**_SIZES, num_key_value_heads=2, sliding_window=12),
}  # fmt: skip


BESIDE_TEXT = "qwen2, audio beside the text"
JOINTLY = "qwen2, jointly with a CTC head that covers every other token, and a lexicon"


def make_speech_model(folder: Path, family: str) -> Transcriber:
    """Write and load a checkpoint whose LLM is of this family."""
    if family == BESIDE_TEXT:
        make_tiny_checkpoint(folder, audio_positions="ctc")
    elif family == JOINTLY:
        make_tiny_checkpoint(folder, ctc_decoding_weight=0.5)
        write_lexicon(folder, words_of(" ".join(SENTENCES)), 2.0)
    else:
        make_tiny_checkpoint(folder, llm_config=FAMILIES[family])
    transcriber = Transcriber.from_pretrained(folder, device="cpu")
    if family == JOINTLY:
        cover_only(transcriber.model, range(4, transcriber.model.ctc_head.vocab_size, 2))
    return transcriber


def cover_only(model, tokens):
    """Give a model, over the whole vocabulary so far, a CTC head that covers these tokens."""
    whole = model.ctc_head
    head = CTCHead(whole.in_features, whole.vocab_size, whole.blank, 1 + len(tokens))
    head.choose(tokens)
    head.take_over(whole.weight, whole.bias, range(whole.vocab_size))
    model.ctc_head, model.config.ctc_tokens = head, head.out_features
    return model


def noise(seconds, seed=0):
    """(N,) float32, loud enough that answers differ."""
    samples = np.random.default_rng(seed).normal(0, 0.2, round(seconds * SAMPLE_RATE_HZ))
    return samples.astype(np.float32)


def generate_alone(transcriber, waveform, **request):
    """Greedy token ids of transformers' `generate` for one clip in a batch of its own."""
    return _generate(transcriber, waveform, {"num_beams": 1}, **request)[0][0]


def search_alone(transcriber, waveform, num_beams, **request):
    """Token ids and score of each answer of `generate`'s beam search, the best first."""
    options = {"num_beams": num_beams, "num_return_sequences": num_beams}
    options |= {"length_penalty": 1.0, "early_stopping": False}
    return _generate(transcriber, waveform, options, **request)


@torch.inference_mode()
def _generate(  # noqa: PLR0913 - generate's options
    transcriber, waveform, options, *, prompt=None, context="", max_tokens=None, penalty=1.0
):
    processor, model = transcriber.processor, transcriber.model
    budget = token_budget(transcriber.config, waveform.size / SAMPLE_RATE_HZ)
    inputs = processor(waveform, prompt=prompt, context=context, device=transcriber.device)
    length = inputs["input_ids"].shape[1]
    processors = LogitsProcessorList()
    if penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=length))
    output = model.generate(
        **inputs,
        max_new_tokens=min(budget, max_tokens or budget),
        do_sample=False,
        logits_processor=processors,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    scores = output.sequences_scores.tolist() if "sequences_scores" in output else [0.0]
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    rows = [row[length:] for row in output.sequences.tolist()]
    ids = [list(itertools.takewhile(lambda token: token not in ends, row)) for row in rows]
    return list(zip(ids, scores, strict=True))
