"""Stage 3: train the connector, and if wanted the encoder, the LLM or a LoRA adapter on it.

Axis legend: B clips, F encoder frames, D encoder width, L sequence positions.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Literal, Self

import jiwer
import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from model.checkpoint import quiet_transformers, save_model
from model.ctc import ctc_greedy, ctc_loss
from model.data.augmentation import (
    FeatureAugmentConfig,
    SpecAugmentConfig,
    feature_augment,
    plan_concatenation,
    spec_augment,
)
from model.data.sampler import DurationBucketSampler
from model.log_mel import log_mel_spectrogram
from model.modeling import IGNORED_LABEL
from model.processing import check_addition
from model.training.acceleration import compile_layers, use_fast_attention
from model.training.contexts import ContextBatches
from model.training.distillation import WhisperTeacher
from model.training.language_model import TextReader, text_loss
from model.training.speech_data import SpeechData, SpeechDataConfig, pad_targets
from model.training.text_injection import Misreadings, TextBeside
from model.transcription import Transcriber

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from model.ctc import CTCHead
    from model.data.manifest import Utterance
    from model.modeling import SpeechLLMForConditionalGeneration
    from model.processing import SpeechLLMProcessor
    from model.training.feature_cache import CachedClip, FeatureCache
    from model.training.loop import EpochBatches

FRAMES_PER_S = 50
_TEXT_READING = 0.5  # share of text without audio that is read from a misread copy
_TEXT_SILENCE = (0.2, 1.0)  # audio positions behind a token: less than in speech, and cheaper
_MAX_TEXT_ERRORS = 0.5  # of the copy's tokens: what a CTC head gets wrong of unseen voices
# Batches from which misreadings are learnt. That is before the loop has taken the device, where a
# large Whisper would be long about audio that is still to be encoded.
_MISREAD_BATCHES_CACHED, _MISREAD_BATCHES = 400, 10


class LoraSettings(BaseModel):
    """A peft adapter on the LLM. Defaults: SLAM-ASR's (r 8, alpha 32, on q and v)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    r: int = Field(8, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.05, ge=0, lt=1)
    target_modules: tuple[str, ...] | Literal["all-linear"] = ("q_proj", "v_proj")


class ConnectorStageConfig(BaseModel):
    """What is trained, on which losses."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train_encoder: bool = False
    train_llm: bool = False
    lora: LoraSettings | None = None
    encoder_lr_scale: float = Field(0.2, gt=0)
    llm_lr_scale: float = Field(0.5, gt=0)
    ctc_weight: float = Field(0.2, ge=0, description="weight of the auxiliary CTC loss")
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    teacher: str | None = Field(
        None, description="folder of a fine-tuned Whisper with the LLM's tokens, to distil from"
    )
    teacher_weight: float = Field(0.5, ge=0, le=1, description="share of the teacher's loss")
    hotwords_share: float = Field(
        0.0, ge=0, le=1, description="share of the clips with a list of hotwords before them"
    )
    hotwords_template: str = Field("Hotwords: {}.\n", description="what then precedes the audio")
    previous_text_share: float = Field(
        0.0, ge=0, le=1, description="share of the clips with the text of another before them"
    )
    previous_text_template: str = Field("Before: {}\n", description="what then precedes the audio")
    ctc_decoding_weight: float | None = Field(
        None, ge=0, lt=1, description="of the checkpoint from now on; None leaves it as it is"
    )
    text_weight: float = Field(0.5, ge=0, description="weight of the loss on text without audio")
    text_batch_tokens: int = Field(
        600, ge=64, description="padded target tokens of text beside a batch of speech"
    )
    feature_augment: bool = True
    spec_augment: bool = True
    stored_dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    compile_layers: bool = Field(False, description="compile the LLM's layers with torch.compile")
    data: SpeechDataConfig = SpeechDataConfig()


class CachedBatches:
    """One epoch of cached encoder frames; see `model.training.loop.EpochBatches`."""

    def __init__(
        self,
        clips: Sequence[tuple[FeatureCache, CachedClip]],
        groups: Sequence[list[int]],
        batches: list[list[int]],
        joiner: list[int],
    ) -> None:
        self._clips = clips
        self._groups = groups
        self._batches = batches
        self._joiner = joiner

    def __len__(self) -> int:
        return len(self._batches)

    def iterate(self, start: int) -> Iterator[dict[str, Any]]:
        """Yield batches from index `start` on."""
        for batch in self._batches[start:]:
            items = [self._join(self._groups[index]) for index in batch]
            frames = [item[0].float() for item in items]
            frame_lens = torch.tensor([len(item) for item in frames])
            yield {
                "encoder_frames": pad_sequence(frames, batch_first=True),
                "frame_lens": frame_lens,
                "target_ids": [item[1] for item in items],
                "audio_s": float(frame_lens.sum()) / FRAMES_PER_S,
            }

    def _join(self, group: list[int]) -> tuple[Tensor, list[int]]:
        parts: list[Tensor] = []
        tokens: list[int] = []
        for index in group:
            cache, clip = self._clips[index]
            frames, ids = cache[clip]
            parts.append(frames)
            if ids:
                tokens += ([*self._joiner] if tokens else []) + ids
        return torch.cat(parts), tokens


class CachedData:
    """Plans epochs over feature caches."""

    def __init__(
        self,
        clips: Sequence[tuple[FeatureCache, CachedClip]],
        config: SpeechDataConfig,
        seed: int,
        joiner: list[int],
    ) -> None:
        self._clips = [
            (cache, clip)
            for cache, clip in clips
            if clip.n_frames / FRAMES_PER_S <= config.max_audio_s
        ]
        self._config = config
        self._seed = seed
        self._joiner = joiner

    def epoch(self, epoch: int, rank: int = 0, world_size: int = 1) -> CachedBatches:
        """Plan one epoch for one rank."""
        durations = [clip.n_frames / FRAMES_PER_S for _, clip in self._clips]
        groups = [[index] for index in range(len(durations))]
        if self._config.concatenation:
            groups = plan_concatenation(
                durations,
                [clip.language or "" for _, clip in self._clips],
                probability=self._config.concatenation,
                max_duration_s=self._config.max_concatenated_s,
                rng=np.random.default_rng((self._seed, epoch)),
            )
        sampler = DurationBucketSampler(
            [sum(durations[i] for i in group) for group in groups],
            max_batch_audio_s=self._config.max_batch_audio_s,
            seed=self._seed,
            rank=rank,
            world_size=world_size,
        )
        sampler.set_epoch(epoch)
        return CachedBatches(self._clips, groups, list(sampler), self._joiner)


class ConnectorObjective(nn.Module):
    """Cross-entropy of target and EOS under the LLM, plus CTC on the auxiliary head."""

    def __init__(
        self,
        model: SpeechLLMForConditionalGeneration,
        processor: SpeechLLMProcessor,
        config: ConnectorStageConfig,
        teacher: WhisperTeacher | None = None,
    ) -> None:
        super().__init__()
        self._teacher = teacher
        self.model = model
        self.processor = processor
        self.config = config

    def train(self, mode: bool = True) -> Self:
        """Set the mode of what is trained; a frozen part stays without dropout."""
        super().train(mode)
        for part in (self.model.encoder, self.model.llm):
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute the losses of a batch of waveforms or of cached encoder frames, and of text."""
        losses = self._speech_losses(batch)
        if "text" not in batch:
            return losses
        of_text = text_loss(
            self.model.llm,
            batch["text"],
            self.processor.audio_token_id,
            self.model.config.audio_positions,
            training=self.training,
        )
        loss = losses["loss"] + self.config.text_weight * of_text
        return {**losses, "loss": loss, "text_loss": of_text}

    @torch.no_grad()
    def read_by_ctc(self, batch: dict[str, Any]) -> list[list[int]]:
        """Tokens that the CTC head writes for each clip of a batch, augmented as in training."""
        frames, frame_lens, _ = self._frames(batch)
        logits = self.model.embed_audio(frames, frame_lens).ctc_logits
        head = self.model.ctc_head
        if head is None or logits is None:
            raise ValueError("the model has no CTC head")
        read = ctc_greedy(logits, frame_lens, head.blank)
        return [head.to_token_ids(indices) for indices in read]

    def _speech_losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        frames, frame_lens, teacher_frames = self._frames(batch)
        targets: list[list[int]] = batch["target_ids"]
        audio_lens = self.processor.audio_lens_of_frames(frame_lens).tolist()
        sequence = self.processor.sequences(audio_lens, targets, contexts=batch.get("contexts"))
        labels = sequence.pop("labels")
        # No logits of what lies before every clip's target: with a hub LLM they fill the memory.
        first = int((labels != IGNORED_LABEL).any(0).int().argmax())
        n_kept = labels.shape[1] - first + 1
        output = self.model(
            **{name: tensor.to(frames.device) for name, tensor in sequence.items()},
            encoder_frames=frames,
            frame_lens=frame_lens,
            use_cache=False,
            logits_to_keep=n_kept,
        )
        labels = labels[:, first:].to(frames.device)
        is_target = labels != IGNORED_LABEL
        logits = output.logits[:, -n_kept:-1][is_target].float()  # (sum over clips of L + 1, V)
        llm_loss = functional.cross_entropy(
            logits,
            labels[is_target],
            label_smoothing=self.config.label_smoothing if self.training else 0.0,
        )
        if self._teacher is not None and teacher_frames is not None:
            taught = self._teacher.probabilities(
                teacher_frames, frame_lens, targets, logits.shape[-1]
            )
            distance = functional.cross_entropy(logits, taught)
            llm_loss = llm_loss.lerp(distance, self.config.teacher_weight)
        if self.model.ctc_head is None or self.config.ctc_weight == 0:
            return {"loss": llm_loss}
        auxiliary = self._ctc_loss(self.model.ctc_head, output.ctc_logits, frame_lens, targets)
        return {
            "loss": llm_loss + self.config.ctc_weight * auxiliary,
            "llm_loss": llm_loss,
            "ctc_loss": auxiliary,
        }

    @staticmethod
    def _ctc_loss(
        head: CTCHead, logits: Tensor, frame_lens: Tensor, targets: list[list[int]]
    ) -> Tensor:
        """CTC loss on the tokens that the head covers; a dev transcript may have others."""
        covered = head.covered()
        indices = [[covered[token] for token in ids if token in covered] for ids in targets]
        padded = pad_targets(indices, head.blank).to(logits.device)
        target_lens = torch.tensor([len(row) for row in indices], device=logits.device)
        return ctc_loss(logits, frame_lens, padded, target_lens, head.blank)

    def _frames(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Frames (B, F, D), their lengths, and the unmasked ones that the teacher reads."""
        device = self.model.device
        teaching = self.training and self._teacher is not None
        if "encoder_frames" in batch:
            stored = batch["encoder_frames"].to(device)
            frame_lens = batch["frame_lens"].to(device)
            frames = stored
            if self.training and self.config.feature_augment:
                frames = feature_augment(stored, frame_lens, FeatureAugmentConfig())
            return frames, frame_lens, stored if teaching else None
        with torch.autocast(device.type, enabled=False):
            features, feature_lens = log_mel_spectrogram(
                batch["waveforms"].to(device),
                batch["sample_lens"].to(device),
                self.model.config.encoder_config.num_mel_bins,
                full_window=self.model.config.encoder_mode == "padded",
            )
        unmasked = None
        if teaching and self._teacher is not None:
            unmasked = self._teacher.encode(features, feature_lens)
        if self.training and self.config.spec_augment:
            features = spec_augment(features, feature_lens, SpecAugmentConfig())
        with torch.set_grad_enabled(self.config.train_encoder and torch.is_grad_enabled()):
            frames, frame_lens = self.model.encode(features, feature_lens)
        return frames, frame_lens, unmasked


def add_lora(model: SpeechLLMForConditionalGeneration, settings: LoraSettings) -> None:
    """Put a fresh adapter on the LLM and freeze the rest of it."""
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - a heavy import for one option

    targets = settings.target_modules
    adapter = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    with quiet_transformers():
        model.llm = get_peft_model(model.llm, adapter)
    model.config.lora = "lora"


class ConnectorStage:
    """`speechllm train connector`: see `model.training.loop.Stage`."""

    def __init__(  # noqa: PLR0913, PLR0917 - model, data and how
        self,
        model: SpeechLLMForConditionalGeneration,
        processor: SpeechLLMProcessor,
        config: ConnectorStageConfig,
        train: Sequence[Utterance] | Sequence[tuple[FeatureCache, CachedClip]],
        dev: Sequence[Utterance],
        seed: int,
        text: Sequence[str] = (),
    ) -> None:
        """Freeze what is not trained and plan the data.

        Args:
            model: assembled or loaded, in fp32.
            processor: the model's.
            config: what is trained.
            train: utterances to encode on the way, or clips of feature caches.
            dev: utterances for validation.
            seed: of everything random.
            text: sentences without audio, for the LLM to learn from beside the speech.

        Raises:
            CheckpointError: the teacher cannot be loaded.
            ValueError: `train_encoder` with cached features, `lora` with `train_llm`, a teacher of
                other tokens or, with cached features, with another encoder, hotwords without a CTC
                head, a context template without a place for its text, `ctc_decoding_weight`
                without a CTC head, or `text` without a fused one or for a frozen LLM.
        """
        cached = bool(train) and isinstance(train[0], tuple)
        if cached and config.train_encoder:
            raise ValueError("the encoder cannot be trained from cached encoder outputs")
        if config.lora is not None and config.train_llm:
            raise ValueError("lora and train_llm exclude each other")
        self.model = model
        self.processor = processor
        self.config = config
        model.llm.requires_grad_(config.train_llm)
        if config.lora is not None:
            torch.manual_seed(seed)  # of the adapter's first weights
            add_lora(model, config.lora)
        model.encoder.requires_grad_(config.train_encoder)
        for part in (model.encoder, model.llm):
            use_fast_attention(part)
        if config.compile_layers:
            compile_layers(model.llm)
        if model.ctc_head is not None and model.config.ctc == "auxiliary":
            model.ctc_head.requires_grad_(config.ctc_weight > 0)  # else it takes part in no loss
        teacher = None
        if config.teacher is not None:
            teacher = WhisperTeacher(config.teacher, processor)
            if cached and not teacher.has_encoder(model.encoder):
                raise ValueError(f"{config.teacher}: its encoder is not the one of the cache")
        self._module = ConnectorObjective(model, processor, config, teacher)
        self._train = (
            CachedData(train, config.data, seed, processor.text_ids(" "))  # type: ignore[arg-type]  # `cached` says which rows these are
            if cached
            else SpeechData(train, config.data, processor.text_ids, seed)  # type: ignore[arg-type]  # likewise
        )
        self._decode_jointly(config.ctc_decoding_weight)
        self._use_context()
        self._seed = seed
        self._text = self._text_reader(text) if text else None
        self._dev_utterances = dev
        plain = config.data.model_copy(update={"augment": False, "concatenation": 0.0})
        self._dev = SpeechData(dev, plain, processor.text_ids, seed) if dev else None

    def _text_reader(self, text: Sequence[str]) -> TextReader:
        """Have text read as the CTC head of the model, as it is now, might have written it."""
        if self.model.config.ctc != "fused":
            raise ValueError("text without audio is read as a CTC head writes: use --ctc fused")
        if not (self.config.train_llm or self.config.lora is not None):
            raise ValueError("text without audio is learnt by the LLM: train it, or LoRA")
        misreadings = Misreadings()
        torch.manual_seed(self._seed)  # of the augmentation
        self._module.train()
        batches = self._train.epoch(0).iterate(0)
        cached = isinstance(self._train, CachedData)
        n_batches = _MISREAD_BATCHES_CACHED if cached else _MISREAD_BATCHES
        for batch in itertools.islice(batches, n_batches):
            read = self._module.read_by_ctc(batch)
            for said, heard in zip(batch["target_ids"], read, strict=True):
                misreadings.learn(said, heard)
        return TextReader(
            text,
            self.processor,
            reading=_TEXT_READING,
            misreadings=misreadings,
            max_word_errors=_MAX_TEXT_ERRORS,
            silence=_TEXT_SILENCE,
        )

    def _decode_jointly(self, weight: float | None) -> None:
        """Have the checkpoint say how much its CTC head counts when it answers."""
        if weight is None:
            return
        if weight and self.model.ctc_head is None:
            raise ValueError("ctc_decoding_weight needs a CTC head, and the model has none")
        self.model.config.ctc_decoding_weight = weight
        if not weight:  # nor does a lexicon count then
            self.model.lexicon = None

    def _use_context(self) -> None:
        """Have the checkpoint say what it learns to read before the audio."""
        config = self.config
        if config.hotwords_share and self.model.ctc_head is None:
            raise ValueError("hotwords are filtered by a CTC head, and the model has none")
        for name, share, template in (
            ("previous_text", config.previous_text_share, config.previous_text_template),
            ("hotwords", config.hotwords_share, config.hotwords_template),
        ):
            if share and not (config.train_llm or config.lora is not None):
                raise ValueError(f"{name} before the audio is learnt by the LLM: train it, or LoRA")
            if share:
                check_addition(name, template)
                self.processor.context_templates[name] = template

    @property
    def module(self) -> nn.Module:
        """The objective over the speech LLM."""
        return self._module

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Connector at the base rate; encoder and LLM at their own."""
        model = self.model
        new = [*model.connector.parameters()]
        if model.ctc_head is not None:
            new += [p for p in model.ctc_head.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": new}]
        for part, scale in (
            (model.encoder, self.config.encoder_lr_scale),
            (model.llm, 1.0 if self.config.lora else self.config.llm_lr_scale),
        ):
            parameters = [p for p in part.parameters() if p.requires_grad]
            if parameters:
                groups.append({"params": parameters, "lr_scale": scale})
        return groups

    def epoch(self, epoch: int, rank: int, world_size: int) -> EpochBatches:
        """Plan one epoch."""
        batches: EpochBatches = self._train.epoch(epoch, rank, world_size)
        config = self.config
        seed = (self._seed, epoch, rank)
        if self._text is not None:
            batches = TextBeside(batches, self._text, config.text_batch_tokens, seed)
        if not config.hotwords_share and not config.previous_text_share:
            return batches
        return ContextBatches(
            batches,
            self.processor,
            seed,
            hotwords_share=config.hotwords_share,
            previous_text_share=config.previous_text_share,
        )

    def validate(self, module: nn.Module) -> dict[str, float]:
        """Mean losses and word error rates (of the LLM, of the CTC head) on the dev manifest."""
        if self._dev is None:
            return {}
        sums: dict[str, float] = {}
        references: list[str] = []
        hypotheses: dict[str, list[str]] = {"wer": [], "ctc_wer": []}
        transcriber = Transcriber(self.model, self.processor)
        batches = self._dev.epoch(0)
        for batch in batches.iterate(0):
            for name, value in module(batch).items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) / len(batches)
            clips = [
                waveform[:length].numpy()
                for waveform, length in zip(batch["waveforms"], batch["sample_lens"], strict=True)
            ]
            with torch.autocast(self.model.device.type, enabled=False):  # as it will be served
                answers = transcriber.transcribe(clips, with_ctc=True).transcripts
            references += batch["texts"]
            hypotheses["wer"] += [answer.text for answer in answers]
            hypotheses["ctc_wer"] += [answer.ctc_text or "" for answer in answers]
        for name, texts in hypotheses.items():
            pairs = [(r, h) for r, h in zip(references, texts, strict=True) if r.strip()]
            if pairs and (name == "wer" or self.model.ctc_head is not None):
                sums[name] = float(jiwer.wer([r for r, _ in pairs], [h for _, h in pairs]))
        return sums

    def save(self, folder: Path) -> None:
        """Write the checkpoint folder."""
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        save_model(
            self.model, folder, processor=self.processor, dtype=dtypes[self.config.stored_dtype]
        )
