"""Configuration of a speech LLM: encoder, connector, LLM and how they are put together."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, get_args

from transformers import AutoConfig, PreTrainedConfig, WhisperConfig

from model.connectors import connector_config
from model.encoder import EncoderMode

DEFAULT_PROMPT = "Юу гэж хэлсэн бэ?"
"""What the first system asked of its LLM: "What did they say?" in Mongolian."""


class SpeechLLMConfig(PreTrainedConfig):
    """Describe a speech LLM.

    Args:
        encoder_config: the Whisper encoder's configuration.
        llm_config: any causal LM's configuration; Qwen2 when only a dict without model_type.
        encoder: where the encoder's weights lie: a folder (relative to the checkpoint or absolute)
            or a hub id such as `openai/whisper-tiny`.
        llm: the same for the LLM, for example `Qwen/Qwen2.5-0.5B-Instruct`.
        lora: folder of a peft adapter on the LLM, relative to the checkpoint; None without one.
        connector: `{"type": name, …}`, see `model.connectors`.
        ctc: `none`: no auxiliary head; `auxiliary`: a CTC head over tokens of the LLM reads the
            encoder; `fused`: and its posteriors, times the LLM's token embeddings, are added to
            the audio embeddings.
        ctc_tokens: outputs of the CTC head, the blank included, where it covers some of the LLM's
            vocabulary; its `token_ids` in the checkpoint say which. None: all of it.
        audio_positions: `sequence`: an audio embedding takes the next position, as a token does;
            `ctc`: audio lies beside the text. An embedding stands where the text's token will
            stand that the CTC head hears in it, and the text is numbered as though the audio took
            no positions, so that the place to read from is as far from every token. Needs a head.
        ctc_decoding_weight: of the CTC head's scores when an answer is decoded, beside the LLM's
            that have the rest, see `model.ctc_prefix`; 0 decodes with the LLM alone.
        lexicon_penalty: in nats, of each word that is not in the checkpoint's `lexicon.txt`, when
            an answer is decoded jointly, see `model.lexicon`; 0 for none, and without a lexicon.
        encoder_mode: `padded` or `trimmed`, see `model.encoder.encode`.
        prompt: what the user turn asks after the audio.
        audio_token_id: id that marks audio positions in `input_ids`; an entry that no text uses.
        pad_token_id, eos_token_id: of the LLM's tokenizer; they differ.
        languages: ISO 639-1 codes of what the checkpoint was trained on.
        max_audio_s: longest clip, at most the encoder's 30 s window.
        max_tokens_per_audio_s, min_token_budget: cap on generated tokens for a clip of s seconds:
            `min_token_budget + max_tokens_per_audio_s * s`.

    Raises:
        ValueError: a value outside its range, with the value and the range.
    """

    model_type: ClassVar[str] = "speech_llm"
    sub_configs: ClassVar[dict[str, Any]] = {
        "encoder_config": WhisperConfig,
        "llm_config": AutoConfig,
    }

    # Read from JSON as dicts; __post_init__ builds the configurations.
    encoder_config: Any = None
    llm_config: Any = None
    encoder: str = "encoder"
    llm: str = "llm"
    lora: str | None = None
    connector: Any = None
    ctc: str = "none"
    ctc_tokens: int | None = None
    audio_positions: str = "sequence"
    ctc_decoding_weight: float = 0.0
    lexicon_penalty: float = 0.0
    encoder_mode: str = "padded"
    prompt: str = DEFAULT_PROMPT
    audio_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_id: int | None = None
    languages: list[str] | None = None
    max_audio_s: float = 30.0
    max_tokens_per_audio_s: float = 12.0
    min_token_budget: int = 16

    def __post_init__(self, **kwargs: Any) -> None:  # noqa: ANN401 - transformers' signature
        """Build the nested configurations and check every value."""
        if not isinstance(self.encoder_config, PreTrainedConfig):
            self.encoder_config = WhisperConfig(**(self.encoder_config or {}))
        if not isinstance(self.llm_config, PreTrainedConfig):
            fields = dict(self.llm_config or {})
            self.llm_config = AutoConfig.for_model(fields.pop("model_type", "qwen2"), **fields)
        if not isinstance(self.connector or {}, dict):
            raise ValueError(f"connector must be an object, got {self.connector!r}")
        self.connector = connector_config(self.connector or {})
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        _check_choice("encoder_mode", self.encoder_mode, get_args(EncoderMode))
        _check_choice("ctc", self.ctc, get_args(CtcUse))
        _check_choice("audio_positions", self.audio_positions, get_args(AudioPositions))
        if self.audio_positions == "ctc" and self.ctc == "none":
            raise ValueError("audio_positions 'ctc' needs a CTC head, and ctc is 'none'")
        self._check_decoding()
        if self.ctc != "none" and self.pad_token_id is None:
            raise ValueError("a CTC head needs pad_token_id, which stands for its blank")
        if self.ctc_tokens is not None and (self.ctc == "none" or self.ctc_tokens < 1):
            raise ValueError(
                f"ctc_tokens is {self.ctc_tokens}: it must be at least 1, and ctc not 'none'"
            )
        if not 0 < self.max_audio_s <= 30:  # noqa: PLR2004 - Whisper's window
            raise ValueError(f"max_audio_s must lie in (0, 30], got {self.max_audio_s}")
        if self.max_tokens_per_audio_s <= 0 or self.min_token_budget < 1:
            raise ValueError("max_tokens_per_audio_s and min_token_budget must be positive")
        if self.eos_token_id is not None and self.pad_token_id == self.eos_token_id:
            raise ValueError(
                f"pad_token_id and eos_token_id are both {self.eos_token_id}: EOS would be "
                "padding and never be learnt"
            )

    def _check_decoding(self) -> None:
        if not 0 <= self.ctc_decoding_weight < 1:
            raise ValueError(
                f"ctc_decoding_weight must lie in [0, 1), got {self.ctc_decoding_weight}"
            )
        if self.ctc_decoding_weight and self.ctc == "none":
            raise ValueError("ctc_decoding_weight needs a CTC head, and ctc is 'none'")
        if not 0 <= self.lexicon_penalty < math.inf:
            raise ValueError(
                f"lexicon_penalty must not be below 0, nor infinite: {self.lexicon_penalty}"
            )
        if self.lexicon_penalty and not self.ctc_decoding_weight:
            raise ValueError("lexicon_penalty is of joint decoding, and ctc_decoding_weight is 0")

    def get_text_config(self, *_args: Any, **_kwargs: Any) -> PreTrainedConfig:  # noqa: ANN401 - transformers' signature
        """The LLM's configuration, from which transformers sizes caches and vocabularies."""
        return self.llm_config


CtcUse = Literal["none", "auxiliary", "fused"]
AudioPositions = Literal["sequence", "ctc"]


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
