"""Batched transcription with a loaded checkpoint: what the evaluation and the server call.

Axis legend: B clips, L sequence positions.
"""

from __future__ import annotations

import time
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from model.checkpoint import load_model, load_processor
from model.ctc import ctc_greedy
from model.log_mel import SAMPLE_RATE_HZ
from model.processing import token_budget

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from torch import Tensor

    from model.configuration import SpeechLLMConfig
    from model.modeling import SpeechLLMForConditionalGeneration
    from model.processing import SpeechLLMProcessor

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Transcript:
    """What one clip said.

    Attributes:
        text: the transcript; empty when nothing was said.
        token_ids: what the LLM generated, without EOS.
        finish_reason: `stop` at EOS, `length` at the token cap.
        language: ISO 639-1 code where the checkpoint's languages leave no doubt, else None.
        ctc_text: the CTC head's greedy reading, if it was asked for and there is one.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    language: str | None
    ctc_text: str | None = None


@dataclass(frozen=True, slots=True)
class TranscriptBatch:
    """Transcripts of one batch and the seconds its two halves took."""

    transcripts: list[Transcript]
    encode_s: float
    generate_s: float


def pick_device(device: str) -> torch.device:
    """`auto` is CUDA where there is any, else the CPU.

    Raises:
        ValueError: CUDA is asked for and absent, or the name is unknown.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:N") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch finds no CUDA device")
    return chosen


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 on CUDA and fp32 on the CPU.

    Raises:
        ValueError: the name is unknown.
    """
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in names:
        raise ValueError(f"unknown dtype {dtype!r}; use auto, {', '.join(names)}")
    return names[dtype]


class Transcriber:
    """A speech LLM and its processor on one device. Not safe for concurrent calls."""

    sample_rate_hz = SAMPLE_RATE_HZ

    def __init__(
        self, model: SpeechLLMForConditionalGeneration, processor: SpeechLLMProcessor
    ) -> None:
        self.model = model
        self.processor = processor

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: str = "auto", dtype: str = "auto"
    ) -> Transcriber:
        """Load a checkpoint folder or hub id.

        Raises:
            CheckpointError: the checkpoint cannot be used.
            ValueError: unknown or absent device or dtype.
        """
        chosen = pick_device(device)
        model = load_model(path, dtype=pick_dtype(dtype, chosen), device=chosen)
        return cls(model, load_processor(path))

    @property
    def config(self) -> SpeechLLMConfig:
        """The checkpoint's configuration."""
        config: SpeechLLMConfig = self.model.config
        return config

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        device: torch.device = self.model.device
        return device

    @property
    def max_audio_s(self) -> float:
        """Longest clip, in seconds."""
        return float(self.config.max_audio_s)

    @property
    def num_beams(self) -> int:
        """Of the search that the checkpoint's `generation_config.json` asks for; 1 for none."""
        return int(self.model.generation_config.num_beams or 1)

    @torch.inference_mode()
    def transcribe(  # noqa: PLR0913 - what a batch is decoded with
        self,
        waveforms: Sequence[np.ndarray],
        prompt: str | None = None,
        max_new_tokens: int | None = None,
        *,
        context: str = "",
        with_ctc: bool = False,
        num_beams: int = 1,
    ) -> TranscriptBatch:
        """Transcribe clips in one batch.

        Args:
            waveforms: mono float32, 16 kHz, each (N_i,), at most `max_audio_s` long.
            prompt: replaces the checkpoint's own.
            max_new_tokens: cap for every clip; each clip's own cap by duration holds besides.
            context: stands before the audio; see `SpeechLLMProcessor.context`.
            with_ctc: also read the CTC head.
            num_beams: of beam search; 1 for greedy search. With beams, an answer that is cut at its
                clip's cap may differ from that of the clip alone: those that go on compete with it.

        Raises:
            ValueError: an empty or too long clip, or a cap or number of beams below 1.
        """
        if num_beams < 1:
            raise ValueError(f"num_beams must be at least 1, got {num_beams}")
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if not waveforms:
            return TranscriptBatch([], 0.0, 0.0)
        durations_s = [waveform.size / SAMPLE_RATE_HZ for waveform in waveforms]
        if max(durations_s) > self.max_audio_s:
            raise ValueError(
                f"a clip of {max(durations_s):.2f} s is longer than the {self.max_audio_s:g} s "
                "this checkpoint takes"
            )
        started = time.perf_counter()
        features, feature_lens = self.processor.features(waveforms, self.device)
        frames, frame_lens = self.model.encode(features, feature_lens)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        encoded = time.perf_counter()
        budgets = [token_budget(self.config, duration) for duration in durations_s]
        if max_new_tokens is not None:
            budgets = [min(budget, max_new_tokens) for budget in budgets]
        sequences = self._sequences(frame_lens, prompt, context)
        generated = self._generate(sequences, frames, frame_lens, max(budgets), num_beams)
        ctc_texts = self._read_ctc(frames, frame_lens) if with_ctc else [None] * len(budgets)
        transcripts = [
            self._transcript(ids, budget, ctc_text)
            for ids, budget, ctc_text in zip(generated, budgets, ctc_texts, strict=True)
        ]
        return TranscriptBatch(transcripts, encoded - started, time.perf_counter() - encoded)

    def _sequences(self, frame_lens: Tensor, prompt: str | None, context: str) -> dict[str, Tensor]:
        audio_lens = self.processor.audio_lens_of_frames(frame_lens).tolist()
        count = len(audio_lens)
        batch = self.processor.sequences(
            audio_lens, prompts=[prompt] * count, contexts=[context] * count
        )
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _generate(
        self,
        sequences: dict[str, Tensor],
        frames: Tensor,
        frame_lens: Tensor,
        max_new_tokens: int,
        num_beams: int,
    ) -> list[list[int]]:
        output = self.model.generate(
            **sequences,
            encoder_frames=frames,
            frame_lens=frame_lens,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=num_beams,
        )
        return [list(row) for row in output[:, sequences["input_ids"].shape[1] :].tolist()]

    def _read_ctc(self, frames: Tensor, frame_lens: Tensor) -> list[str | None]:
        head, logits = self.model.ctc_head, self.model.embed_audio(frames, frame_lens).ctc_logits
        if head is None or logits is None:
            return [None] * len(frames)
        paths = ctc_greedy(logits, frame_lens, head.blank)
        return [self.processor.decode_transcript(head.to_token_ids(path)) for path in paths]

    def _transcript(self, ids: list[int], budget: int, ctc_text: str | None) -> Transcript:
        eos_id = int(self.processor.tokenizer.eos_token_id)
        ids = ids[:budget]
        stopped = eos_id in ids
        if stopped:
            ids = ids[: ids.index(eos_id)]
        text = self.processor.decode_transcript(ids)
        language = identify_language(text, self.config.languages or [])
        return Transcript(text, ids, "stop" if stopped else "length", language, ctc_text)


_CYRILLIC = {"mn", "ru", "kk", "ky", "tt", "ba", "uk", "bg", "sr", "mk", "be", "tg"}


def identify_language(text: str, languages: Sequence[str]) -> str | None:
    """Language of a transcript among those a checkpoint speaks, told by its script.

    Returns:
        The only candidate whose script is that of most letters; None where several or none are.
    """
    if len(languages) == 1:
        return languages[0]
    letters = [character for character in text if character.isalpha()]
    if not letters:
        return None
    cyrillic = sum("CYRILLIC" in unicodedata.name(letter, "") for letter in letters)
    is_cyrillic = 2 * cyrillic > len(letters)
    candidates = [language for language in languages if (language in _CYRILLIC) == is_cyrillic]
    return candidates[0] if len(candidates) == 1 else None
