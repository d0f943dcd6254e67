"""The speech LLM: Whisper encoder, connector and a causal LM.

Axis legend: B clips, M mel bins, T mel frames, F encoder frames, N audio embeddings,
L sequence positions, D width, V vocabulary, K outputs of the CTC head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSpeechSeq2Seq,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from model.configuration import SpeechLLMConfig
from model.connectors import make_connector
from model.connectors.stack import stack_frames
from model.ctc import CTCHead, ctc_token_counts
from model.ctc_prefix import ClipPosteriors, JointDecoding, clip_posteriors
from model.encoder import encode, length_mask

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import Cache

    from model.lexicon import Lexicon

IGNORED_LABEL = -100
# What transformers' Auto classes hand on; the checkpoint's own configuration is read instead.
_AUTO_CLASS_ARGUMENTS = {"config", "trust_remote_code", "adapter_kwargs"}


def beside_text(is_audio: Tensor, counts: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Position ids that put audio beside the text that it says.

    Args:
        is_audio: (B, L), the audio positions.
        counts: (B, L) int64, tokens heard up to each audio position; 0 elsewhere.
        attention_mask: (B, L), 1 on valid positions; None where all are.

    Returns:
        (B, L) int64: text is numbered as though the audio were not there; audio in which the n-th
        token is heard stands n positions after where the audio begins.
    """
    is_text = ~is_audio if attention_mask is None else ~is_audio & attention_mask.bool()
    positions = is_text.long().cumsum(1) - 1
    return (positions + is_audio * (1 + counts)).clamp(min=0)


@dataclass
class SpeechLLMOutput(CausalLMOutputWithPast):
    """Causal LM output, with the CTC head's logits (B, F, K) and their lengths (B,) if any."""

    ctc_logits: Tensor | None = None
    frame_lens: Tensor | None = None


@dataclass(slots=True)
class EmbeddedAudio:
    """Audio in the LLM's embedding space.

    Attributes:
        audio_embeds: (B, N, D_llm), right-padded.
        audio_lens: (B,) valid embeddings.
        ctc_logits: (B, F, K) of the CTC head, None without one.
        frame_lens: (B,) valid encoder frames.
        token_counts: (B, N) tokens that the CTC head has heard by the end of each embedding's
            stretch; None unless `config.audio_positions` is `ctc`.
    """

    audio_embeds: Tensor
    audio_lens: Tensor
    ctc_logits: Tensor | None
    frame_lens: Tensor
    token_counts: Tensor | None = None


class SpeechLLMForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Transcribe speech: audio embeddings stand in the LLM's prompt.

    `input_ids` hold `config.audio_token_id` at the audio positions; `SpeechLLMProcessor` builds
    them. Audio comes as `input_features`, as cached `encoder_frames`, or as `audio_embeds`.
    """

    config_class = SpeechLLMConfig
    base_model_prefix = "speech_llm"
    main_input_name = "input_ids"
    input_modalities: ClassVar[tuple[str, ...]] = ("audio", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: SpeechLLMConfig,
        encoder: WhisperEncoder | None = None,
        llm: PreTrainedModel | None = None,
    ) -> None:
        """Put the parts together; those not given are made with random weights."""
        super().__init__(config)
        if config.audio_positions == "ctc" and "flash" in str(config._attn_implementation):
            raise ValueError(
                "flash attention takes positions that repeat for packed sequences; load a model "
                "with audio_positions 'ctc' under sdpa or eager"
            )
        self.encoder = encoder if encoder is not None else WhisperEncoder(config.encoder_config)
        self.llm = llm if llm is not None else AutoModelForCausalLM.from_config(config.llm_config)
        d_encoder = config.encoder_config.d_model
        d_llm = self.llm.get_input_embeddings().embedding_dim
        self.connector = make_connector(config.connector, d_encoder, d_llm)
        self.ctc_head: CTCHead | None = None
        if config.ctc != "none":
            n_rows = self.llm.get_input_embeddings().num_embeddings
            blank_id = cast("int", config.pad_token_id)  # as the configuration checks
            self.ctc_head = CTCHead(d_encoder, n_rows, blank_id, config.ctc_tokens)
        self.lexicon: Lexicon | None = None
        self.post_init()

    def init_weights(self) -> None:
        """Leave the parts alone: each was initialised, or loaded, on its own."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        **kwargs: Any,  # noqa: ANN401 - transformers' own options
    ) -> SpeechLLMForConditionalGeneration:
        """Load a checkpoint folder or hub id; see `model.checkpoint.load_model`."""
        from model.checkpoint import load_model  # noqa: PLC0415 - it imports this module

        for name in _AUTO_CLASS_ARGUMENTS & kwargs.keys():
            kwargs.pop(name)
        return load_model(pretrained_model_name_or_path, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # noqa: ANN401 - transformers' own options
        """Write the checkpoint folder; see `model.checkpoint.save_model`."""
        from model.checkpoint import save_model  # noqa: PLC0415 - it imports this module

        save_model(self, save_directory, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """The LLM's token embedding."""
        embeddings: nn.Module = self.llm.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the LLM's token embedding."""
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The LLM's output layer."""
        embeddings: nn.Module = self.llm.get_output_embeddings()
        return embeddings

    def encode(self, input_features: Tensor, feature_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Run the encoder: (B, M, T) log-mel -> (B, F, D_enc) frames and their lengths (B,)."""
        features = input_features.to(self.encoder.conv1.weight.dtype)
        return encode(self.encoder, features, feature_lens, self.config.encoder_mode)

    def embed_audio(self, encoder_frames: Tensor, frame_lens: Tensor) -> EmbeddedAudio:
        """Map encoder frames (B, F, D_enc) into the LLM's embedding space."""
        encoder_frames = encoder_frames.to(next(self.connector.parameters()).dtype)
        adapted = self.connector.adapt(encoder_frames, frame_lens)
        audio_embeds, audio_lens = self.connector(adapted, frame_lens)
        head, ctc_logits, token_counts = self.ctc_head, None, None
        if head is not None:
            ctc_logits = head(adapted)
            if self.config.ctc == "fused":
                expected = self._expected_token_embeds(head, ctc_logits, frame_lens)
                audio_embeds = audio_embeds + expected
            if self.config.audio_positions == "ctc":
                stack_size = self.connector.stack_size
                token_counts = ctc_token_counts(ctc_logits, frame_lens, head.blank, stack_size)
        return EmbeddedAudio(audio_embeds, audio_lens, ctc_logits, frame_lens, token_counts)

    def audio_position_ids(
        self, input_ids: Tensor, attention_mask: Tensor | None, audio: EmbeddedAudio
    ) -> Tensor | None:
        """Position ids (B, L) of sequences with audio in them; None where they just count up.

        Args:
            input_ids: (B, L), audio positions marked by `config.audio_token_id`.
            attention_mask: (B, L), 1 on valid positions; None where all are.
            audio: what fills the audio positions.
        """
        if audio.token_counts is None:
            return None
        is_audio = input_ids == self.config.audio_token_id
        valid = length_mask(audio.audio_lens, audio.token_counts.shape[1])
        counts = torch.zeros_like(input_ids).masked_scatter(is_audio, audio.token_counts[valid])
        return beside_text(is_audio, counts, attention_mask)

    def _expected_token_embeds(
        self, head: CTCHead, ctc_logits: Tensor, frame_lens: Tensor
    ) -> Tensor:
        """Token embeddings expected under the CTC posteriors of each stack (B, N, D_llm).

        The blank embeds to nothing, so a stack without a token adds nothing; a stack with more
        than one token holds their mean. Source of the idea: LegoSLM, arXiv 2505.11352.
        """
        posteriors = ctc_logits.float().softmax(-1)
        indices = torch.arange(posteriors.shape[-1], device=posteriors.device)
        posteriors = posteriors * (indices != head.blank)
        stack_size = self.connector.stack_size
        stacked = stack_frames(posteriors, frame_lens, stack_size)  # (B, N, S*K)
        stacked = stacked.unflatten(-1, (stack_size, -1)).sum(-2)  # (B, N, K)
        mass = stacked.sum(-1, keepdim=True).clamp(min=1.0)
        table = head.rows_of(self.llm.get_input_embeddings().weight)  # (K, D_llm)
        expected: Tensor = (stacked / mass).to(table.dtype) @ table
        return expected

    def forward(  # noqa: PLR0913, PLR0917 - transformers' signature
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        feature_lens: Tensor | None = None,
        encoder_frames: Tensor | None = None,
        frame_lens: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,  # noqa: ANN401 - transformers' own options
    ) -> SpeechLLMOutput:
        """Run the LLM over a sequence whose audio positions hold audio embeddings.

        Args:
            input_ids: (B, L), audio positions marked by `config.audio_token_id`.
            attention_mask: (B, L), 1 on valid positions.
            input_features: (B, M, T) log-mel, with `feature_lens` (B,).
            feature_lens: valid mel frames.
            encoder_frames: (B, F, D_enc) from a cache, in place of `input_features`.
            frame_lens: (B,) valid encoder frames.
            position_ids: (B, L); those of sequences with audio come from the audio where
                `config.audio_positions` is `ctc`.
            past_key_values: the LLM's cache.
            inputs_embeds: (B, L, D_llm) in place of everything above.
            labels: (B, L), -100 where no loss is taken.
            use_cache: whether to return the cache.
            logits_to_keep: as in transformers.
            **kwargs: passed to the LLM.

        Returns:
            Loss (the mean over labelled positions), logits, cache, CTC logits.

        Raises:
            ValueError: audio positions and audio embeddings differ in number, audio comes without
                its lengths, or a cached sequence goes on without `position_ids` where audio takes
                no positions.
        """
        if (input_features is None) != (feature_lens is None):
            raise ValueError("input_features and feature_lens belong together")
        if (encoder_frames is None) != (frame_lens is None):
            raise ValueError("encoder_frames and frame_lens belong together")
        if position_ids is None:
            self._require_start(past_key_values)
        audio = None
        if input_features is not None and feature_lens is not None:
            encoder_frames, frame_lens = self.encode(input_features, feature_lens)
        if encoder_frames is not None and frame_lens is not None:
            audio = self.embed_audio(encoder_frames, frame_lens)
        if input_ids is not None and inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if audio is not None:
                inputs_embeds = self._insert_audio(input_ids, inputs_embeds, audio)
                if attention_mask is None:  # else positions that repeat look like packed sequences
                    attention_mask = torch.ones_like(input_ids)
                beside = self.audio_position_ids(input_ids, attention_mask, audio)
                position_ids = position_ids if beside is None else beside
        outputs = self.llm(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(
                outputs.logits[:, :-1].float().flatten(0, 1),
                labels[:, 1:].flatten(),
                ignore_index=IGNORED_LABEL,
            )
        return SpeechLLMOutput(
            loss=loss,
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            ctc_logits=audio.ctc_logits if audio is not None else None,
            frame_lens=audio.frame_lens if audio is not None else None,
        )

    def _require_start(self, past_key_values: Cache | None) -> None:
        goes_on = past_key_values is not None and past_key_values.get_seq_length() > 0
        if goes_on and self.config.audio_positions == "ctc":
            raise ValueError(
                "a sequence that goes on needs position_ids: the audio in the cache takes none"
            )

    def _insert_audio(
        self, input_ids: Tensor, inputs_embeds: Tensor, audio: EmbeddedAudio
    ) -> Tensor:
        positions = input_ids == self.config.audio_token_id
        wanted, given = positions.sum(1), audio.audio_lens.to(positions.device)
        if not torch.equal(wanted, given):
            raise ValueError(
                f"input_ids have {wanted.tolist()} audio positions, but the audio makes "
                f"{given.tolist()} embeddings"
            )
        valid = length_mask(given, audio.audio_embeds.shape[1])
        packed = audio.audio_embeds[valid].to(inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(positions[..., None], packed)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        logits_processor: LogitsProcessorList | None = None,
        **kwargs: Any,  # noqa: ANN401 - transformers' own options
    ) -> Any:  # noqa: ANN401 - tensors or an output object, as in transformers
        """Generate as transformers does, jointly with the CTC head where the configuration says so.

        See `model.ctc_prefix`.

        Raises:
            ValueError: assisted decoding, which has no joint form, with such a configuration.
        """
        if self.ctc_head is not None and self.config.ctc_decoding_weight and input_ids is not None:
            for name in ("assistant_model", "prompt_lookup_num_tokens"):
                if kwargs.get(name) is not None:
                    raise ValueError(f"{name}: no assisted decoding jointly with a CTC head")
            if "input_features" in kwargs:
                features = (kwargs.pop("input_features"), kwargs.pop("feature_lens"))
                kwargs["encoder_frames"], kwargs["frame_lens"] = self.encode(*features)
            if "encoder_frames" in kwargs:
                joint = JointDecoding(self._posteriors(kwargs), input_ids.shape[1])
                logits_processor = LogitsProcessorList([*(logits_processor or []), joint])
        return super().generate(input_ids, logits_processor=logits_processor, **kwargs)

    def _posteriors(self, options: dict[str, Any]) -> list[ClipPosteriors]:
        """What the CTC head hears in the clips that `generate` is given."""
        settings = options.get("generation_config") or self.generation_config
        ends = options.get("eos_token_id", settings.eos_token_id)
        stop_ids = [] if ends is None else torch.as_tensor(ends).flatten().tolist()
        audio = self.embed_audio(options["encoder_frames"], options["frame_lens"])
        head = cast("CTCHead", self.ctc_head)
        weight, lexicons = self.config.ctc_decoding_weight, [self.lexicon] * len(audio.audio_lens)
        return clip_posteriors(audio, head, stop_ids, weight, lexicons)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        is_first_iteration: bool = False,
        **kwargs: Any,  # noqa: ANN401 - transformers' own options
    ) -> dict[str, Any]:
        """Give the audio to the first step only; later ones read it from the cache."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in ("input_features", "feature_lens", "encoder_frames", "frame_lens"):
                inputs.pop(name, None)
            if self.config.audio_positions == "ctc":
                # `generate` counts every position; audio takes none.
                n_audio = (input_ids == self.config.audio_token_id).sum(1, keepdim=True)
                inputs["position_ids"] = inputs["position_ids"] - n_audio
        return inputs


AutoConfig.register("speech_llm", SpeechLLMConfig, exist_ok=True)
AutoModel.register(SpeechLLMConfig, SpeechLLMForConditionalGeneration, exist_ok=True)
AutoModelForSpeechSeq2Seq.register(
    SpeechLLMConfig, SpeechLLMForConditionalGeneration, exist_ok=True
)
