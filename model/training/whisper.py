"""Stage 1: fine-tune a Whisper encoder-decoder; also the baseline that a speech LLM must beat.

Axis legend: B clips, L decoder tokens, F encoder frames, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jiwer
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers import WhisperForConditionalGeneration as Whisper

from model.checkpoint import (
    check_tensors,
    load_tokenizer,
    quiet_transformers,
    read_config_file,
    read_tensors,
    resolve,
)
from model.ctc import ctc_greedy, ctc_loss
from model.data.augmentation import SpecAugmentConfig, spec_augment
from model.encoder import EncoderMode, encode, length_mask
from model.log_mel import log_mel_spectrogram
from model.training.acceleration import use_fast_attention
from model.training.speech_data import SpeechBatches, SpeechData, SpeechDataConfig, pad_targets
from model.whisper_baseline import CTC_HEAD_FILE, decoder_prefix, masked_cross_attention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from model.data.manifest import Utterance

IGNORED = -100
_TOKEN_EMBEDDING = {"model.decoder.embed_tokens.weight", "proj_out.weight"}


class WhisperStageConfig(BaseModel):
    """What is fine-tuned and with which losses."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    whisper: str = Field(description="folder or hub id of a Whisper encoder-decoder")
    tokenizer: str | None = Field(
        None, description="folder of a tokenizer that replaces the decoder's vocabulary"
    )
    init: Literal["pretrained", "random"] = "pretrained"
    encoder_mode: EncoderMode = "padded"
    ctc_weight: float = Field(0.0, ge=0, lt=1, description="share of an auxiliary CTC loss")
    new_parameters_lr_scale: float = Field(5.0, gt=0, description="for embeddings made anew")
    new_parameters_first_steps: int = Field(
        0, ge=0, description="optimiser steps in which nothing but the tensors made anew is trained"
    )
    encoder_lr_scale: float = Field(1.0, ge=0, description="0 leaves the encoder as it is")
    tuned_share: float = Field(
        1.0, gt=0, le=1, description="of the stored encoder; the rest is the one it started from"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    spec_augment: bool = False
    data: SpeechDataConfig = SpeechDataConfig()


def load_whisper(config: WhisperStageConfig) -> tuple[Whisper, PreTrainedTokenizerBase]:
    """Load the Whisper to fine-tune, with a new token embedding if its tokenizer is replaced.

    Raises:
        CheckpointError: there is no such folder or hub repository.
        ValueError: a tensor other than a replaced token embedding is missing or does not fit.
    """
    folder = resolve(config.whisper)
    tokenizer = load_tokenizer(config.tokenizer or folder)
    read_config_file(folder / "config.json")  # transformers would take its defaults
    whisper_config = WhisperConfig.from_pretrained(folder)
    whisper_config.dropout = config.dropout
    whisper_config.apply_spec_augment = False
    if config.tokenizer is not None:
        whisper_config.vocab_size = len(tokenizer)
        whisper_config.pad_token_id = tokenizer.pad_token_id
        whisper_config.bos_token_id = tokenizer.eos_token_id
        whisper_config.eos_token_id = tokenizer.eos_token_id
        whisper_config.decoder_start_token_id = _start_id(tokenizer)
    if config.init == "random":
        return Whisper(whisper_config), tokenizer
    with quiet_transformers():
        whisper, info = Whisper.from_pretrained(
            folder,
            config=whisper_config,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    unfit = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}
    replaceable = _TOKEN_EMBEDDING if config.tokenizer is not None else set()
    if unfit - replaceable:
        advice = "; a tokenizer of your own replaces it" if unfit <= _TOKEN_EMBEDDING else ""
        raise ValueError(
            f"{config.whisper} lacks or misfits {', '.join(sorted(unfit - replaceable))}{advice}"
        )
    return whisper, tokenizer


def _start_id(tokenizer: PreTrainedTokenizerBase) -> int:
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    return int(start if isinstance(start, int) else tokenizer.eos_token_id)


class WhisperObjective(nn.Module):
    """Cross-entropy of the decoder, interpolated with CTC on the encoder if wanted."""

    def __init__(
        self, whisper: Whisper, config: WhisperStageConfig, prefix: list[int], eos_id: int
    ) -> None:
        super().__init__()
        self.whisper = whisper
        self.config = config
        self.prefix = prefix
        self.eos_id = eos_id
        self.pad_id = int(whisper.config.pad_token_id)
        width = whisper.config.d_model
        self.ctc_head = nn.Linear(width, whisper.config.vocab_size) if config.ctc_weight else None

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute the losses of one batch of `SpeechBatches`."""
        frames, frame_lens = self.encode(batch["waveforms"], batch["sample_lens"])
        decoder_loss = self._decoder_loss(frames, frame_lens, batch["target_ids"])
        if self.ctc_head is None:
            return {"loss": decoder_loss}
        targets = pad_targets(batch["target_ids"], self.pad_id).to(frames.device)
        target_lens = torch.tensor([len(ids) for ids in batch["target_ids"]], device=frames.device)
        auxiliary = ctc_loss(self.ctc_head(frames), frame_lens, targets, target_lens, self.pad_id)
        weight = self.config.ctc_weight
        return {
            "loss": (1 - weight) * decoder_loss + weight * auxiliary,
            "decoder_loss": decoder_loss,
            "ctc_loss": auxiliary,
        }

    def encode(self, waveforms: Tensor, sample_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder frames (B, F, D) and their lengths (B,)."""
        device = self.whisper.device
        mode = self.config.encoder_mode
        with torch.autocast(device.type, enabled=False):
            features, feature_lens = log_mel_spectrogram(
                waveforms.to(device),
                sample_lens.to(device),
                self.whisper.config.num_mel_bins,
                full_window=mode == "padded",
            )
        if self.training and self.config.spec_augment:
            features = spec_augment(features, feature_lens, SpecAugmentConfig())
        return encode(self.whisper.model.encoder, features, feature_lens, mode)

    def _decoder_loss(self, frames: Tensor, frame_lens: Tensor, targets: list[list[int]]) -> Tensor:
        skipped, most = len(self.prefix) - 1, self.whisper.config.max_target_positions
        # What goes beyond the decoder's last position is left out, the end of the text with it.
        inputs = pad_targets([(self.prefix + ids)[:most] for ids in targets], self.pad_id)
        labels = pad_targets(
            [([IGNORED] * skipped + ids + [self.eos_id])[:most] for ids in targets], IGNORED
        )
        mask = length_mask(frame_lens, frames.shape[1])
        with masked_cross_attention(self.whisper, mask):
            hidden = self.whisper.model.decoder(
                input_ids=inputs.to(frames.device), encoder_hidden_states=frames, use_cache=False
            ).last_hidden_state
        logits = self.whisper.proj_out(hidden)
        return functional.cross_entropy(
            logits.float().flatten(0, 1),
            labels.to(frames.device).flatten(),
            ignore_index=IGNORED,
            label_smoothing=self.config.label_smoothing if self.training else 0.0,
        )


class WhisperStage:
    """`speechllm train whisper`: see `model.training.loop.Stage`."""

    def __init__(
        self,
        config: WhisperStageConfig,
        train: Sequence[Utterance],
        dev: Sequence[Utterance],
        language: str | None,
        seed: int,
    ) -> None:
        self.config = config
        torch.manual_seed(seed)  # of the tensors that are made anew
        self.whisper, self.tokenizer = load_whisper(config)
        use_fast_attention(self.whisper)
        # The sinusoids adapt too: in trimmed mode most clips use only the first positions.
        self.whisper.model.encoder.embed_positions.requires_grad_(True)
        if config.encoder_lr_scale == 0:
            self.whisper.model.encoder.requires_grad_(False)
        start_id = int(self.whisper.config.decoder_start_token_id)
        self._module = WhisperObjective(
            self.whisper,
            config,
            decoder_prefix(self.tokenizer, start_id, language),
            int(self.tokenizer.eos_token_id),
        )
        self._first_encoder = {
            name: tensor.detach().clone()
            for name, tensor in self.whisper.model.encoder.state_dict().items()
            if config.tuned_share < 1
        }
        self._take_over_ctc_head(Path(config.whisper) / CTC_HEAD_FILE)
        self._train = SpeechData(train, config.data, self._tokenise, seed)
        plain = config.data.model_copy(update={"augment": False, "concatenation": 0.0})
        self._dev = SpeechData(dev, plain, self._tokenise, seed) if dev else None

    def _take_over_ctc_head(self, file: Path) -> None:
        """Go on with the head that an earlier run of this stage left beside its Whisper."""
        head = self._module.ctc_head
        if head is None or self.config.tokenizer is not None or not file.exists():
            return
        tensors = read_tensors([file])
        check_tensors(tensors, head.state_dict(), str(file))
        head.load_state_dict(tensors)

    @property
    def module(self) -> nn.Module:
        """The objective over Whisper."""
        return self._module

    def _tokenise(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Pretrained tensors at the base rate, those made anew at a higher one.

        Tensors made anew may go first: the gradients that random ones send into a pretrained
        encoder distort what it knows of voices that the training data lack (Kumar et al. 2022,
        arXiv 2202.10054).
        """
        anew = [] if self._module.ctc_head is None else list(self._module.ctc_head.parameters())
        if self.config.tokenizer is not None:
            anew.append(self.whisper.model.decoder.embed_tokens.weight)
        encoder = [p for p in self.whisper.model.encoder.parameters() if p.requires_grad]
        known = {id(parameter) for parameter in [*anew, *encoder]}
        decoder = [p for p in self._module.parameters() if p.requires_grad and id(p) not in known]
        frozen_steps = self.config.new_parameters_first_steps
        groups: list[dict[str, Any]] = [{"params": decoder, "frozen_steps": frozen_steps}]
        if encoder:
            scale = self.config.encoder_lr_scale
            groups.append({"params": encoder, "frozen_steps": frozen_steps, "lr_scale": scale})
        if anew:
            groups.append({"params": anew, "lr_scale": self.config.new_parameters_lr_scale})
        return groups

    def epoch(self, epoch: int, rank: int, world_size: int) -> SpeechBatches:
        """Plan one epoch."""
        return self._train.epoch(epoch, rank, world_size)

    def validate(self, module: nn.Module) -> dict[str, float]:
        """Mean losses on the dev manifest, and the CTC head's word error rate."""
        if self._dev is None:
            return {}
        assert isinstance(module, WhisperObjective)  # noqa: S101 - narrows the loop's type
        sums: dict[str, float] = {}
        references: list[str] = []
        hypotheses: list[str] = []
        batches = self._dev.epoch(0)
        for batch in batches.iterate(0):
            for name, value in module(batch).items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) / len(batches)
            if module.ctc_head is not None:
                frames, frame_lens = module.encode(batch["waveforms"], batch["sample_lens"])
                paths = ctc_greedy(module.ctc_head(frames), frame_lens, module.pad_id)
                references += batch["texts"]
                hypotheses += self.tokenizer.batch_decode(paths)
        spoken = [(r, h) for r, h in zip(references, hypotheses, strict=True) if r.strip()]
        if spoken:
            sums["ctc_wer"] = float(jiwer.wer([r for r, _ in spoken], [h for _, h in spoken]))
        return sums

    def _interpolate_encoder(self) -> None:
        """Move the encoder back towards the one it started from.

        What fine-tuning on few voices makes it forget comes back, at little cost on those voices
        (Wortsman et al. 2022, arXiv 2109.01903).
        """
        encoder = self.whisper.model.encoder
        encoder.load_state_dict(
            {
                name: first.to(tuned.device).lerp(tuned, self.config.tuned_share)
                for (name, first), tuned in zip(
                    self._first_encoder.items(), encoder.state_dict().values(), strict=True
                )
            }
        )
        self._first_encoder = {}  # once: the product may be written again

    def save(self, folder: Path) -> None:
        """Write a Hugging Face Whisper folder, and the CTC head beside it."""
        if self._first_encoder:
            self._interpolate_encoder()
        self.whisper.config.encoder_mode = self.config.encoder_mode
        self.whisper.config.decoder_prefix_ids = self._module.prefix
        with quiet_transformers():
            self.whisper.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        WhisperFeatureExtractor(feature_size=self.whisper.config.num_mel_bins).save_pretrained(
            folder
        )
        if self._module.ctc_head is not None:
            state = {k: v.detach().cpu() for k, v in self._module.ctc_head.state_dict().items()}
            save_file(state, folder / CTC_HEAD_FILE)
