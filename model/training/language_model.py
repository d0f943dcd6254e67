"""Pre-train a small Qwen2 on text, for places where no published LLM can be had.

Besides plain language modelling the LM learns to read: the audio positions of its prompt hold the
embeddings of a corrupted copy of the sentence, laid out in time as a fused CTC head will lay out
its posteriors. A speech LLM whose connector then starts to train need not learn to look at the
audio from nothing.

Axis legend: B sentences, L sequence positions, N audio positions, D width.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, WhisperFeatureExtractor

from model.assembly import prepare_tokenizer
from model.checkpoint import quiet_transformers
from model.configuration import AudioPositions
from model.modeling import IGNORED_LABEL, beside_text
from model.processing import SpeechLLMProcessor
from model.training.acceleration import compile_layers, use_fast_attention

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from model.training.text_injection import Misreadings

_DENSE_SHARE = 0.6  # of the curriculum
SILENCE_PER_TOKEN = (0.4, 1.8)  # audio positions, from fast speech to slow
SILENT = -1  # an audio position at which nothing was heard


class LanguageModelConfig(BaseModel):
    """Sizes of the LM and shares of what it learns."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokenizer: str
    hidden_size: int = Field(384, ge=8)
    intermediate_size: int = Field(960, ge=8)
    layers: int = Field(6, ge=1)
    heads: int = Field(6, ge=1)
    key_value_heads: int = Field(2, ge=1)
    max_positions: int = Field(2048, ge=64)
    reading: float = Field(0.8, ge=0, le=1, description="share of batches that are read")
    max_word_errors: float = Field(0.35, ge=0, le=1, description="of a corrupted copy's words")
    positions_per_s: float = Field(12.5, gt=0, description="audio positions, of the connector")
    prompt: str = ""
    audio_positions: AudioPositions = "sequence"
    batch_tokens: int = Field(4096, ge=64, description="padded target tokens in a batch")
    curriculum: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the first epoch that goes from short, dense copies to full ones",
    )
    compile_layers: bool = Field(False, description="compile the LM's layers with torch.compile")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % (2 * self.heads):
            raise ValueError("hidden_size must be a multiple of twice the heads")
        if self.heads % self.key_value_heads:
            raise ValueError("heads must be a multiple of key_value_heads")
        return self


def corrupt_words(text: str, rate: float, rng: np.random.Generator) -> str:
    """Misspell, split or drop words, each with probability `rate`.

    The result looks like what a CTC head without a language model writes.
    """
    words = [_corrupt(word, text, rng) if rng.random() < rate else word for word in text.split()]
    return " ".join(word for word in words if word)


def _corrupt(word: str, text: str, rng: np.random.Generator) -> str:
    at = int(rng.integers(len(word)))
    other = text[int(rng.integers(len(text)))].strip() or word[0]
    variants = (
        word[:at] + word[at + 1 :],  # a letter less
        word[:at] + other + word[at + 1 :],  # another letter
        word[:at] + other + word[at:],  # a letter more
        word[:at] + " " + word[at:],
        word[: max(1, at)],
        "",
    )
    return variants[rng.integers(len(variants))]


def lay_out(
    ids: Sequence[int],
    rng: np.random.Generator,
    vocab_size: int,
    rate: float,
    pace: float,
) -> list[int]:
    """Spread token ids over audio positions, with silence between and a few wrong tokens.

    Args:
        ids: what is read.
        rng: decides everything.
        vocab_size: wrong tokens are drawn from it.
        rate: of errors, in 0..1.
        pace: mean number of silent positions after a token; before and after all tokens there are
            three times as many.
    """
    positions = [SILENT] * int(rng.poisson(3 * pace))
    for token in ids:
        heard = int(rng.integers(vocab_size)) if rng.random() < rate / 4 else token
        if rng.random() >= rate / 8:
            positions.append(heard)
        positions += [SILENT] * int(rng.poisson(pace))
    return positions + [SILENT] * int(rng.poisson(3 * pace))


class TextReader:
    """Tokenised sentences, and the batches in which an LLM reads them."""

    def __init__(  # noqa: PLR0913 - text, and how it is read
        self,
        texts: Sequence[str],
        processor: SpeechLLMProcessor,
        *,
        reading: float,
        misreadings: Misreadings | None = None,
        max_word_errors: float = 0.35,
        silence: tuple[float, float] = SILENCE_PER_TOKEN,
    ) -> None:
        """Tokenise.

        Args:
            texts: sentences.
            processor: of the model.
            reading: share of the batches with a copy before each sentence; others have nothing.
            misreadings: what a CTC head makes of tokens; None for errors drawn at random only.
            max_word_errors: share of a copy's words that are corrupted, at most.
            silence: fewest and most silent audio positions behind a token.
        """
        self._texts = texts
        self.sentences = [processor.text_ids(text) for text in texts]
        self._processor = processor
        self._reading = reading
        self._misreadings = misreadings
        self._max_word_errors = max_word_errors
        self._silence = silence
        self._vocab_size = len(processor.tokenizer)

    def plan(self, batch_tokens: int, rng: np.random.Generator) -> list[list[int]]:
        """Batches of sentences of about a length, the shortest first: indices."""
        lengths = [len(ids) for ids in self.sentences]
        order = sorted(range(len(lengths)), key=lambda i: lengths[i] * rng.uniform(0.9, 1.1))
        batches: list[list[int]] = [[]]
        longest = 0
        for index in order:
            longest = max(longest, lengths[index] + 1)
            if batches[-1] and longest * (len(batches[-1]) + 1) > batch_tokens:
                batches.append([])
                longest = lengths[index] + 1
            batches[-1].append(index)
        return batches

    def batch(
        self, indices: Sequence[int], rng: np.random.Generator, difficulty: float = 1.0
    ) -> dict[str, Any]:
        """Sequences of sentences behind their copies, and what their audio positions hold."""
        # One pace a batch, and a copy for all or for none: sentences of a length then need little
        # padding.
        pace = difficulty * rng.uniform(*self._silence)
        is_read = rng.random() < self._reading
        heard: list[list[int]] = []
        for index in indices:
            if not is_read:
                heard.append([])
                continue
            rate = difficulty * rng.uniform(0, self._max_word_errors)
            copy = self._copy(self._texts[index], rate, rng)
            heard.append(lay_out(copy, rng, self._vocab_size, rate, pace))
        targets = [self.sentences[index] for index in indices]
        sequence = self._processor.sequences([len(ids) for ids in heard], targets)
        ids = [token for copy in heard for token in copy]
        return {**sequence, "heard": torch.tensor(ids, dtype=torch.long)}

    def _copy(self, text: str, rate: float, rng: np.random.Generator) -> list[int]:
        if self._misreadings is None:
            return self._processor.text_ids(corrupt_words(text, rate, rng))
        ids = self._processor.text_ids(corrupt_words(text, rate / 4, rng))
        return self._misreadings.misread(ids, rate, rng)


class TextBatches:
    """One epoch of text batches; see `model.training.loop.EpochBatches`."""

    def __init__(
        self,
        reader: TextReader,
        batches: list[list[int]],
        seed: tuple[int, int, int],
        config: LanguageModelConfig,
    ) -> None:
        self._reader = reader
        self._batches = batches
        self._seed = seed
        self._config = config

    def __len__(self) -> int:
        return len(self._batches)

    def iterate(self, start: int) -> Iterator[dict[str, Any]]:
        """Yield batches from index `start` on."""
        for number, indices in enumerate(self._batches[start:], start=start):
            rng = np.random.default_rng((*self._seed, number))
            batch = self._reader.batch(indices, rng, self._difficulty(number))
            yield {**batch, "audio_s": len(batch["heard"]) / self._config.positions_per_s}

    def _difficulty(self, number: int) -> float:
        """0 until copying is learnt, then growing to 1 at the end of the curriculum's share.

        Copying a dense sequence emerges within some hundred steps; between silences it does not
        emerge from nothing in several times as many, but is kept once learnt.
        """
        span = self._config.curriculum * len(self._batches)
        if self._seed[1] > 0 or span == 0:
            return 1.0
        return float(np.clip((number / span - _DENSE_SHARE) / (1 - _DENSE_SHARE), 0, 1))


def text_loss(
    llm: PreTrainedModel,
    batch: dict[str, Any],
    audio_token_id: int,
    audio_positions: AudioPositions,
    *,
    training: bool,
) -> Tensor:
    """Next-token cross-entropy on sentence and EOS of a batch of `TextReader`, a scalar."""
    device = llm.device
    input_ids, heard = batch["input_ids"].to(device), batch["heard"].to(device)
    embedding = llm.get_input_embeddings()
    audio_embeds = embedding(heard.clamp(min=0)) * (heard != SILENT)[:, None]
    if training:
        # A posterior is rarely certain: shrink what is heard by a random confidence.
        audio_embeds = audio_embeds * torch.empty_like(audio_embeds[:, :1]).uniform_(0.5, 1.0)
    is_audio = input_ids == audio_token_id
    inputs_embeds = embedding(input_ids).masked_scatter(
        is_audio[..., None], audio_embeds.to(embedding.weight.dtype)
    )
    attention_mask = batch["attention_mask"].to(device)
    position_ids = None
    if audio_positions == "ctc":
        said = torch.zeros_like(input_ids).masked_scatter(is_audio, (heard != SILENT).long())
        position_ids = beside_text(is_audio, said.cumsum(1) * is_audio, attention_mask)
    labels = batch["labels"].to(device)
    # No logits of what lies before every target.
    first = int((labels != IGNORED_LABEL).any(0).int().argmax())
    logits = llm(
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=False,
        logits_to_keep=labels.shape[1] - first + 1,
    ).logits
    return functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1),
        labels[:, first:].flatten(),
        ignore_index=IGNORED_LABEL,
    )


class LanguageModelObjective(nn.Module):
    """Loss of an LM alone, on batches of `TextBatches`."""

    def __init__(
        self, llm: Qwen2ForCausalLM, audio_token_id: int, audio_positions: AudioPositions
    ) -> None:
        super().__init__()
        self.llm = llm
        self.audio_token_id = audio_token_id
        self.audio_positions = audio_positions

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute the loss of one batch."""
        loss = text_loss(
            self.llm, batch, self.audio_token_id, self.audio_positions, training=self.training
        )
        return {"loss": loss}


class LanguageModelStage:
    """`speechllm train lm`: see `model.training.loop.Stage`."""

    def __init__(
        self, config: LanguageModelConfig, lines: Sequence[str], dev: Sequence[str], seed: int
    ) -> None:
        """Make a Qwen2 with random weights.

        Raises:
            ValueError: no line of text.
        """
        self.config = config
        tokenizer = prepare_tokenizer(config.tokenizer)
        self.processor = SpeechLLMProcessor(
            WhisperFeatureExtractor(), tokenizer, prompt=config.prompt
        )
        self.vocab_size = len(tokenizer)
        self._texts = [line for line in lines if line.strip()]
        if not self._texts:
            raise ValueError("there is no line of text to train on")
        self._dev_texts = [line for line in dev if line.strip()]
        self._seed = seed
        torch.manual_seed(seed)
        self.llm = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=self.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.key_value_heads,
                max_position_embeddings=config.max_positions,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        self.llm.generation_config = GenerationConfig(
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        use_fast_attention(self.llm)
        if config.compile_layers:
            compile_layers(self.llm)
        self._module = LanguageModelObjective(
            self.llm, self.processor.audio_token_id, config.audio_positions
        )
        self._reader, self._dev_reader = (
            TextReader(
                texts,
                self.processor,
                reading=config.reading,
                max_word_errors=config.max_word_errors,
            )
            for texts in (self._texts, self._dev_texts)
        )

    @property
    def module(self) -> nn.Module:
        """The objective over the LM."""
        return self._module

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Everything."""
        return [{"params": list(self.llm.parameters())}]

    def epoch(self, epoch: int, rank: int, world_size: int) -> TextBatches:
        """Plan one epoch."""
        return self._plan(self._reader, epoch, rank, world_size)

    def _plan(self, reader: TextReader, epoch: int, rank: int, size: int) -> TextBatches:
        rng = np.random.default_rng((self._seed, epoch))
        batches = reader.plan(self.config.batch_tokens, rng)
        places = np.arange(len(batches)) if epoch == 0 and self.config.curriculum else 0
        spread = len(batches) * (1 - self.config.curriculum if epoch == 0 else 1)
        keys = places + rng.uniform(0, max(spread, 1), len(batches))
        shuffled = [batches[i] for i in np.argsort(keys)]
        # Where the number does not divide, the first batches come a second time.
        shuffled += [shuffled[i % len(shuffled)] for i in range(-len(shuffled) % size)]
        return TextBatches(reader, shuffled[rank::size], (self._seed, epoch, rank), self.config)

    def validate(self, module: nn.Module) -> dict[str, float]:
        """Mean loss on held-out text, corrupted as in training once the curriculum is over."""
        if not self._dev_texts:
            return {}
        batches = self._plan(self._dev_reader, 1, 0, 1)
        losses = [float(module(batch)["loss"].detach()) for batch in batches.iterate(0)]
        return {"loss": sum(losses) / len(losses)}

    def save(self, folder: Path) -> None:
        """Write a Hugging Face causal LM folder with its tokenizer."""
        with quiet_transformers():
            self.llm.save_pretrained(folder)
        self.processor.tokenizer.save_pretrained(folder)


def read_lines(paths: Sequence[Path]) -> list[str]:
    """Lines of text files; of JSONL manifests, their texts."""
    # Not `splitlines`, which knows more ends of lines than JSON does.
    return [
        str(json.loads(line).get("text") or "") if path.suffix == ".jsonl" else line
        for path in paths
        for line in path.read_text(encoding="utf-8").split("\n")
        if line
    ]
