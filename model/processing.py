"""From audio and text to the LLM's token sequence: the one place that builds it.

The sequence is `[chat prefix, context | audio | prompt, chat suffix | target | EOS]`. Its parts
are tokenised separately, so that no merge crosses a boundary, and text from outside (context,
prompt, target) never yields special tokens.

Axis legend: B clips, L sequence positions, N audio embeddings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoProcessor, BatchFeature, ProcessorMixin

from model.configuration import DEFAULT_PROMPT, SpeechLLMConfig
from model.connectors import output_lens
from model.encoder import encoder_frame_lens
from model.log_mel import (
    SAMPLE_RATE_HZ,
    fetch_waveforms,
    log_mel_spectrogram,
    pad_waveforms,
    to_device,
)
from model.modeling import IGNORED_LABEL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase, WhisperFeatureExtractor

# Private-use characters: no tokenizer's template writes them, so they cut it cleanly.
_CONTEXT_MARK = "\ue000"
_AUDIO_MARK = "\ue001"
_PROMPT_MARK = "\ue002"
_USER_TURN = f"{_CONTEXT_MARK}{_AUDIO_MARK}{_PROMPT_MARK}"
_PLAIN_TEMPLATE = f"{_USER_TURN}\n"

ADDITIONS = ("previous_text", "hotwords")
"""What a context may hold, in this order: what was said just before, and words to expect."""

ADDITION_PLACE = "{}"
"""Where the text stands in a template of `context_templates`."""

MAX_PREVIOUS_BYTES = 160
"""Of what was said before, UTF-8; some 30 words of English."""


@dataclass(frozen=True, slots=True)
class PromptIds:
    """Token ids around the audio."""

    prefix: list[int]
    suffix: list[int]


class SpeechLLMProcessor(ProcessorMixin):
    """Turn audio (and, for training, transcripts) into a speech LLM's inputs."""

    def __init__(  # noqa: PLR0913, PLR0917 - what processor_config.json stores
        self,
        feature_extractor: WhisperFeatureExtractor,
        tokenizer: PreTrainedTokenizerBase,
        connector: dict[str, Any] | None = None,
        encoder_mode: str = "padded",
        prompt: str = DEFAULT_PROMPT,
        audio_token: str = "<|audio|>",  # noqa: S107 - a vocabulary entry
        context_templates: dict[str, str] | None = None,
        chat_template: str | None = None,
    ) -> None:
        """Check that the tokenizer fits.

        Args:
            feature_extractor: names the encoder's mel bins.
            tokenizer: the LLM's.
            connector: the model's `config.connector`; it says how many positions a clip takes.
            encoder_mode: the model's `config.encoder_mode`.
            prompt: what the user turn asks after the audio.
            audio_token: vocabulary entry that marks audio positions.
            context_templates: what the model was trained to read before the audio: by name
                (`hotwords`, `previous_text`), a template with `{}` in it for the text.
            chat_template: unused; the tokenizer's own is applied.

        Raises:
            ValueError: the tokenizer has no EOS, no pad token that differs from EOS, or no
                `audio_token`; an addition of an unknown name, or without one place for its text.
        """
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)
        self.connector = SpeechLLMConfig(connector=connector).connector
        self.encoder_mode = encoder_mode
        self.prompt = prompt
        self.audio_token = audio_token
        self.context_templates = dict(context_templates or {})
        for name, template in self.context_templates.items():
            check_addition(name, template)
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token")
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
            raise ValueError(
                f"the tokenizer's pad token ({tokenizer.pad_token!r}) must exist and differ from "
                f"its EOS token ({tokenizer.eos_token!r}), else EOS is never learnt"
            )
        if audio_token not in tokenizer.get_vocab():
            raise ValueError(
                f"the tokenizer has no entry {audio_token!r} for audio positions; add it, or "
                "name a special token that no text uses as audio_token"
            )

    @property
    def audio_token_id(self) -> int:
        """Id that marks audio positions in `input_ids`."""
        return int(self.tokenizer.convert_tokens_to_ids(self.audio_token))

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a text from outside: what looks like a special token is plain text."""
        encoding = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return list(encoding.input_ids)

    def context(self, **additions: str) -> str:
        """What stands before the audio: texts in their templates, in the order of `ADDITIONS`.

        Before it, so that the audio is as far from its answer whatever is added: an LLM that reads
        by that distance (`audio_positions` of the configuration) would be led astray.

        Args:
            **additions: texts by name; empty ones add nothing.

        Raises:
            ValueError: the model was not trained to read such an addition.
        """
        unknown = additions.keys() - self.context_templates.keys()
        if unknown:
            raise ValueError(f"this checkpoint takes no {', '.join(sorted(unknown))}")
        return "".join(
            self.context_templates[name].replace(ADDITION_PLACE, additions[name])
            for name in ADDITIONS
            if additions.get(name)
        )

    def prompt_ids(self, prompt: str | None = None, context: str = "") -> PromptIds:
        """Tokenise what stands before and after the audio.

        Args:
            prompt: after the audio; defaults to the model's own.
            context: before the audio.
        """
        template = _PLAIN_TEMPLATE
        if self.tokenizer.chat_template is not None:
            turn = {"role": "user", "content": _USER_TURN}
            template = self.tokenizer.apply_chat_template(
                [turn], tokenize=False, add_generation_prompt=True
            )
        before, mark, after = template.partition(_USER_TURN)
        if not mark:
            raise ValueError("the tokenizer's chat template drops or reorders the user's turn")
        question = self.text_ids(self.prompt if prompt is None else prompt)
        return PromptIds(
            prefix=self._template_ids(before) + self.text_ids(context),
            suffix=question + self._template_ids(after),
        )

    def _template_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids) if text else []

    def audio_lens(self, feature_lens: Tensor) -> Tensor:
        """Audio positions for clips of `feature_lens` mel frames (B,)."""
        return self.audio_lens_of_frames(encoder_frame_lens(feature_lens))

    def audio_lens_of_frames(self, frame_lens: Tensor) -> Tensor:
        """Audio positions for clips of `frame_lens` encoder frames (B,)."""
        return output_lens(self.connector, frame_lens)

    def features(
        self,
        waveforms: Sequence[np.ndarray],
        device: torch.device | str = "cpu",
        *,
        fetches: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Compute log-mel features on `device`.

        Args:
            waveforms: mono float32 clips, 16 kHz, each (N_i,), at most 30 s.
            device: where to compute.
            fetches: whether it copies each clip from where it lies, pinned, while the host goes on.

        Returns:
            (B, M, T) float32 and valid mel frames (B,).

        Raises:
            ValueError: an empty, multi-channel or too long clip.
        """
        # Pinned, and the lengths looked at before they go: so the host waits for nothing.
        if fetches:
            batch, sample_lens = fetch_waveforms(waveforms, device)
        else:
            is_cuda = torch.device(device).type == "cuda"
            batch, sample_lens = pad_waveforms(waveforms, pin_memory=is_cuda)
        features, frame_lens = log_mel_spectrogram(
            batch.to(device, non_blocking=True),
            sample_lens,
            self.feature_extractor.feature_size,
            full_window=self.encoder_mode == "padded",
        )
        return features, to_device(frame_lens, device)

    def sequence(self, around: PromptIds, audio_len: int) -> list[int]:
        """Token ids of one clip's prompt, with `audio_len` audio positions in it."""
        return [*around.prefix, *[self.audio_token_id] * audio_len, *around.suffix]

    def sequences(
        self,
        audio_lens: Sequence[int],
        targets: Sequence[Sequence[int]] | None = None,
        prompts: Sequence[str | None] | None = None,
        contexts: Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """Build `[prefix | audio | suffix | target | EOS]` for a batch.

        Args:
            audio_lens: audio positions of each clip.
            targets: token ids of each transcript, for training; None to generate.
            prompts: a prompt for each clip in place of the model's own.
            contexts: what stands before the audio of each clip; see `context`.

        Returns:
            `input_ids` and `attention_mask` (B, L); padded on the left to generate and on the
            right to train; with targets also `labels` (B, L), -100 outside target and EOS.
        """
        rows, labels = [], []
        count = len(audio_lens)
        texts = list(zip(prompts or [None] * count, contexts or [""] * count, strict=True))
        around = {each: self.prompt_ids(*each) for each in set(texts)}
        for index, length in enumerate(audio_lens):
            row = self.sequence(around[texts[index]], int(length))
            answer: list[int] = []
            if targets is not None:
                answer = [*targets[index], int(self.tokenizer.eos_token_id)]
            rows.append(row + answer)
            labels.append([IGNORED_LABEL] * len(row) + answer)
        on_left = targets is None
        batch = {
            "input_ids": _pad(rows, int(self.tokenizer.pad_token_id), on_left=on_left),
            "attention_mask": _pad([[1] * len(row) for row in rows], 0, on_left=on_left),
        }
        if targets is not None:
            batch["labels"] = _pad(labels, IGNORED_LABEL, on_left=on_left)
        return batch

    def __call__(  # noqa: PLR0913 - what a sequence is made of
        self,
        audio: np.ndarray | Sequence[np.ndarray],
        text: str | Sequence[str] | None = None,
        prompt: str | Sequence[str | None] | None = None,
        sampling_rate: int = SAMPLE_RATE_HZ,
        device: torch.device | str = "cpu",
        *,
        context: str = "",
    ) -> BatchFeature:
        """Prepare clips for `generate`, or with transcripts for training.

        Args:
            audio: one or more mono float32 clips at 16 kHz.
            text: transcripts, one a clip.
            prompt: replaces the model's prompt, for all clips or one each.
            sampling_rate: of `audio`, Hz; other rates are refused, not resampled.
            device: where the features are computed and the batch is placed.
            context: stands before the audio of all clips; see `context`.

        Returns:
            `input_features`, `feature_lens`, `input_ids`, `attention_mask` and, with `text`,
            `labels`.

        Raises:
            ValueError: another sampling rate, or numbers of clips and texts that differ.
        """
        if sampling_rate != SAMPLE_RATE_HZ:
            raise ValueError(f"audio must be sampled at {SAMPLE_RATE_HZ} Hz, got {sampling_rate}")
        clips = [audio] if isinstance(audio, np.ndarray) else list(audio)
        texts = [text] if isinstance(text, str) else text
        prompts = [prompt] * len(clips) if isinstance(prompt, str) or prompt is None else prompt
        if (texts is not None and len(texts) != len(clips)) or len(prompts) != len(clips):
            raise ValueError(f"{len(clips)} clips need as many texts and prompts")
        input_features, feature_lens = self.features(clips, device)
        targets = [self.text_ids(item) for item in texts] if texts is not None else None
        audio_lens = self.audio_lens(feature_lens).tolist()
        batch = self.sequences(audio_lens, targets, prompts, [context] * len(clips))
        return BatchFeature(
            {
                "input_features": input_features,
                "feature_lens": feature_lens,
                **{name: tensor.to(device) for name, tensor in batch.items()},
            }
        )

    def decode_transcript(self, token_ids: Sequence[int]) -> str:
        """Text of generated ids: special tokens dropped, surrounding space stripped."""
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return str(text).strip()


def previous_text_tail(text: str) -> str:
    """The end of what was said before, whole words, as much as a context holds of it."""
    text = " ".join(text.split())
    encoded = text.encode()
    if len(encoded) <= MAX_PREVIOUS_BYTES:
        return text
    # With the byte before, a space where a whole word is the first.
    _, space, words = encoded[-MAX_PREVIOUS_BYTES - 1 :].decode(errors="ignore").partition(" ")
    return words if space else encoded[-MAX_PREVIOUS_BYTES:].decode(errors="ignore")


def check_addition(name: str, template: str) -> None:
    """Raise ValueError for what is no template of a known addition to the prompt."""
    if name not in ADDITIONS:
        raise ValueError(f"context_templates are {', '.join(ADDITIONS)}, not {name!r}")
    if not isinstance(template, str) or template.count(ADDITION_PLACE) != 1:
        raise ValueError(
            f"the template of {name} needs {ADDITION_PLACE} once, where its text stands: "
            f"{template!r}"
        )


def token_budget(config: SpeechLLMConfig, duration_s: float) -> int:
    """Most tokens that a clip of `duration_s` seconds may generate."""
    return config.min_token_budget + math.ceil(config.max_tokens_per_audio_s * duration_s)


def _pad(rows: list[list[int]], value: int, *, on_left: bool) -> Tensor:
    size = max(len(row) for row in rows)
    padded = [
        [value] * (size - len(row)) + row if on_left else row + [value] * (size - len(row))
        for row in rows
    ]
    return torch.tensor(padded)


AutoProcessor.register(SpeechLLMConfig, SpeechLLMProcessor, exist_ok=True)
