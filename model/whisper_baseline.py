"""A plain Whisper encoder-decoder: what a speech LLM has to beat.

Axis legend: B clips, F encoder frames, P prefix tokens.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import WhisperForConditionalGeneration as Whisper

from model.checkpoint import (
    check_tensors,
    load_tokenizer,
    load_whole,
    read_config_file,
    read_tensors,
    resolve,
)
from model.ctc import ctc_greedy
from model.encoder import EncoderMode, encode, length_mask
from model.log_mel import SAMPLE_RATE_HZ, WINDOW_S, log_mel_spectrogram, pad_waveforms
from model.transcription import Transcript, TranscriptBatch, pick_device, pick_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import numpy as np
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

CTC_HEAD_FILE = "ctc_head.safetensors"
# As for a speech LLM: text cannot be spoken faster.
_TOKENS_PER_S = 12
_MIN_TOKENS = 16


def decoder_prefix(
    tokenizer: PreTrainedTokenizerBase, start_id: int, language: str | None
) -> list[int]:
    """Tokens the decoder is given before the transcript.

    Whisper's own multilingual tokenizers want a language and a task; others only a start token.
    """
    vocabulary = tokenizer.get_vocab()
    wanted = ["<|startoftranscript|>"]
    if language is not None and f"<|{language}|>" in vocabulary:
        wanted += [f"<|{language}|>", "<|transcribe|>"]
    wanted.append("<|notimestamps|>")
    if not all(token in vocabulary for token in wanted):
        return [start_id]
    return [vocabulary[token] for token in wanted]


@contextmanager
def masked_cross_attention(whisper: Whisper, frame_mask: Tensor) -> Iterator[None]:
    """Hide padded encoder frames (mask (B, F) bool) from the decoder.

    transformers' Whisper always attends a full 30 s window, so that its decoder takes no mask.
    """
    mask = frame_mask[:, None, None, :]
    if whisper.config._attn_implementation == "eager":
        # Eager attention adds its mask to the scores.
        lowest = torch.finfo(whisper.dtype).min
        mask = torch.zeros(mask.shape, dtype=whisper.dtype, device=mask.device).masked_fill(
            ~mask, lowest
        )

    def add_mask(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401 - torch's signature of a hook
        return args, {**kwargs, "attention_mask": mask}

    handles = [
        layer.encoder_attn.register_forward_pre_hook(add_mask, with_kwargs=True)
        for layer in whisper.model.decoder.layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class WhisperTranscriber:
    """Greedy transcription by Whisper's own decoder, with `Transcriber`'s interface."""

    sample_rate_hz = SAMPLE_RATE_HZ
    max_audio_s = float(WINDOW_S)

    def __init__(
        self,
        whisper: Whisper,
        tokenizer: PreTrainedTokenizerBase,
        ctc_head: dict[str, Tensor] | None = None,
    ) -> None:
        self.whisper = whisper
        self.tokenizer = tokenizer
        self._ctc_head = ctc_head
        config = whisper.config
        self.encoder_mode: EncoderMode = getattr(config, "encoder_mode", "padded")
        self.prefix_ids: list[int] = getattr(config, "decoder_prefix_ids", None) or decoder_prefix(
            tokenizer, int(config.decoder_start_token_id), None
        )

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: str = "auto", dtype: str = "auto"
    ) -> WhisperTranscriber:
        """Load a Hugging Face Whisper folder or hub id.

        Raises:
            CheckpointError: there is none, or its tensors do not fit.
            ValueError: unknown or absent device or dtype.
        """
        chosen = pick_device(device)
        folder = resolve(path)
        read_config_file(folder / "config.json")  # transformers would take its defaults
        whisper = load_whole(Whisper, folder, pick_dtype(dtype, chosen))
        ctc_head = None
        if (folder / CTC_HEAD_FILE).exists():
            ctc_head = read_tensors([folder / CTC_HEAD_FILE])
            shape = (whisper.config.vocab_size, whisper.config.d_model)
            wanted = {"weight": torch.empty(shape), "bias": torch.empty(shape[0])}
            check_tensors(ctc_head, wanted, str(folder / CTC_HEAD_FILE))
            ctc_head = {name: tensor.to(chosen) for name, tensor in ctc_head.items()}
        return cls(whisper.to(chosen), load_tokenizer(folder), ctc_head)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        device: torch.device = self.whisper.device
        return device

    @property
    def num_beams(self) -> int:
        """It is decoded greedily."""
        return 1

    @torch.inference_mode()
    def transcribe(
        self, waveforms: Sequence[np.ndarray], *, with_ctc: bool = False, num_beams: int = 1
    ) -> TranscriptBatch:
        """Transcribe mono float32 16 kHz clips of at most 30 s greedily, in one batch.

        Raises:
            ValueError: an empty or too long clip, or beams.
        """
        if num_beams != 1:
            raise ValueError("a plain Whisper model is decoded greedily; beams are for speech LLMs")
        if not waveforms:
            return TranscriptBatch([], 0.0, 0.0)
        started = time.perf_counter()
        batch, sample_lens = pad_waveforms(waveforms)
        features, feature_lens = log_mel_spectrogram(
            batch.to(self.device),
            sample_lens.to(self.device),
            self.whisper.config.num_mel_bins,
            full_window=self.encoder_mode == "padded",
        )
        encoder = self.whisper.model.encoder
        frames, frame_lens = encode(
            encoder, features.to(self.whisper.dtype), feature_lens, self.encoder_mode
        )
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        encoded = time.perf_counter()
        budgets = [
            _MIN_TOKENS + int(_TOKENS_PER_S * waveform.size / SAMPLE_RATE_HZ)
            for waveform in waveforms
        ]
        rows = self._decode(frames, frame_lens, budgets)
        ctc_texts = self._read_ctc(frames, frame_lens) if with_ctc else [None] * len(rows)
        transcripts = [
            self._transcript(row, budget, ctc_text)
            for row, budget, ctc_text in zip(rows, budgets, ctc_texts, strict=True)
        ]
        return TranscriptBatch(transcripts, encoded - started, time.perf_counter() - encoded)

    def _decode(self, frames: Tensor, frame_lens: Tensor, budgets: list[int]) -> list[list[int]]:
        """Greedy search, every row until its EOS (B lists)."""
        config = self.whisper.config
        most = min(max(budgets), config.max_target_positions - len(self.prefix_ids))
        tokens = torch.tensor([self.prefix_ids] * len(budgets), device=frames.device)
        generated: list[Tensor] = []
        finished = torch.zeros(len(budgets), dtype=torch.bool, device=frames.device)
        cache = None
        with masked_cross_attention(self.whisper, length_mask(frame_lens, frames.shape[1])):
            for _ in range(most):
                output = self.whisper.model.decoder(
                    input_ids=tokens,
                    encoder_hidden_states=frames,
                    past_key_values=cache,
                    use_cache=True,
                )
                cache = output.past_key_values
                tokens = self.whisper.proj_out(output.last_hidden_state[:, -1:]).argmax(-1)
                generated.append(tokens)
                finished |= tokens[:, 0] == config.eos_token_id
                if bool(finished.all()):
                    break
        return [list(row) for row in torch.cat(generated, dim=1).tolist()]

    def _read_ctc(self, frames: Tensor, frame_lens: Tensor) -> list[str | None]:
        if self._ctc_head is None:
            return [None] * len(frames)
        logits = torch.nn.functional.linear(
            frames.float(), self._ctc_head["weight"].float(), self._ctc_head["bias"].float()
        )
        paths = ctc_greedy(logits, frame_lens, int(self.whisper.config.pad_token_id))
        return [self._text(path) for path in paths]

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _transcript(self, ids: list[int], budget: int, ctc_text: str | None) -> Transcript:
        eos_id = self.whisper.config.eos_token_id
        ids = ids[:budget]
        stopped = eos_id in ids
        ids = ids[: ids.index(eos_id)] if stopped else ids
        return Transcript(self._text(ids), ids, "stop" if stopped else "length", None, ctc_text)
