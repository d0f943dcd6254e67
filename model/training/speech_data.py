"""Batches of audio and target tokens for the training loop.

Everything about a batch is a function of (seed, epoch, index): which utterances are joined, how
they are augmented and where they are placed.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch.utils.data import DataLoader, Dataset

from model.data.audio import load_audio
from model.data.augmentation import (
    AugmentationConfig,
    WaveformAugmenter,
    concatenate_utterances,
    joined_duration_s,
    plan_concatenation,
)
from model.data.sampler import DurationBucketSampler
from model.log_mel import SAMPLE_RATE_HZ, WINDOW_S, WINDOW_SAMPLES, pad_waveforms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from model.data.manifest import Utterance

    Tokenise = Callable[[str], list[int]]


class SpeechDataConfig(BaseModel):
    """What a stage reads and how it is varied."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_batch_audio_s: float = Field(120.0, gt=0, description="padded audio seconds in a batch")
    max_audio_s: float = Field(float(WINDOW_S), gt=0, le=WINDOW_S)
    concatenation: float = Field(0.0, ge=0, le=1, description="share of utterances that are joined")
    max_concatenated_s: float = Field(20.0, gt=0, le=WINDOW_S)
    augment: bool = False
    noise_dir: Path | None = None
    workers: int = Field(1, ge=0, description="processes that decode and augment")


@dataclass(frozen=True, slots=True)
class _Example:
    """One training example: the utterances that it joins, and the seed of its augmentation."""

    indices: tuple[int, ...]
    seed: tuple[int, ...]


class _Examples(Dataset[tuple[np.ndarray, str]]):
    """Decodes, augments and joins on demand, in the loader's workers."""

    def __init__(
        self,
        utterances: Sequence[Utterance],
        examples: Sequence[_Example],
        augmenter: WaveformAugmenter | None,
        max_audio_s: float,
    ) -> None:
        self._utterances = utterances
        self._examples = examples
        self._augmenter = augmenter
        self._max_audio_s = max_audio_s

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
        example = self._examples[index]
        rng = np.random.default_rng(example.seed)
        parts = [self._utterances[i] for i in example.indices]
        clips = [(load_audio(part.audio), part.text or "") for part in parts]
        waveform, text = (
            clips[0] if len(clips) == 1 else concatenate_utterances(clips, rng, self._max_audio_s)
        )
        if self._augmenter is not None:
            waveform = self._augmenter(waveform, rng)
        return waveform[:WINDOW_SAMPLES], text  # a manifest's durations are rounded


class SpeechBatches:
    """One epoch of audio batches; see `EpochBatches`."""

    def __init__(
        self, dataset: _Examples, batches: list[list[int]], tokenise: Tokenise, workers: int
    ) -> None:
        self._dataset = dataset
        self._batches = batches
        self._tokenise = tokenise
        self._workers = workers

    def __len__(self) -> int:
        return len(self._batches)

    def iterate(self, start: int) -> Iterator[dict[str, Any]]:
        """Yield batches from index `start` on."""
        if self._workers:
            # tokenizers would warn at every fork that its threads do not survive it.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return iter(
            DataLoader(
                self._dataset,
                batch_sampler=self._batches[start:],
                num_workers=self._workers,
                prefetch_factor=4 if self._workers else None,
                collate_fn=self._collate,
                worker_init_fn=_leave_interrupts_to_the_trainer,
            )
        )

    def _collate(self, items: list[tuple[np.ndarray, str]]) -> dict[str, Any]:
        waveforms, sample_lens = pad_waveforms([waveform for waveform, _ in items])
        return {
            "waveforms": waveforms,
            "sample_lens": sample_lens,
            "target_ids": [self._tokenise(text) for _, text in items],
            "texts": [text for _, text in items],
            "audio_s": float(sample_lens.sum()) / SAMPLE_RATE_HZ,
        }


def _leave_interrupts_to_the_trainer(_worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the trainer finishes its step first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class SpeechData:
    """Plans the epochs of a manifest."""

    def __init__(
        self,
        utterances: Sequence[Utterance],
        config: SpeechDataConfig,
        tokenise: Tokenise,
        seed: int,
    ) -> None:
        """Keep what can be trained on.

        Raises:
            ValueError: nothing is left: no text, or every clip longer than `max_audio_s`.
        """
        self._utterances = [
            utterance
            for utterance in utterances
            if utterance.text is not None and utterance.duration <= config.max_audio_s
        ]
        if not self._utterances:
            raise ValueError(
                f"none of {len(utterances)} utterances has a text and at most "
                f"{config.max_audio_s:g} s of audio"
            )
        self._config = config
        self._tokenise = tokenise
        self._seed = seed
        self._augmenter = (
            WaveformAugmenter(
                AugmentationConfig(max_duration_s=config.max_audio_s),
                load_noises(config.noise_dir),
            )
            if config.augment
            else None
        )

    @property
    def hours(self) -> float:
        """Hours of audio in an epoch."""
        return sum(utterance.duration for utterance in self._utterances) / 3600

    def _plan(self, epoch: int) -> list[_Example]:
        durations = [utterance.duration for utterance in self._utterances]
        if self._config.concatenation == 0:
            groups = [[index] for index in range(len(durations))]
        else:
            groups = plan_concatenation(
                durations,
                [utterance.language or "" for utterance in self._utterances],
                probability=self._config.concatenation,
                max_duration_s=self._config.max_concatenated_s,
                rng=np.random.default_rng((self._seed, epoch)),
            )
        return [_Example(tuple(group), (self._seed, epoch, *group)) for group in groups]

    def epoch(self, epoch: int, rank: int = 0, world_size: int = 1) -> SpeechBatches:
        """Plan the batches of one epoch for one rank."""
        examples = self._plan(epoch)
        sampler = DurationBucketSampler(
            [
                joined_duration_s(self._utterances[i].duration for i in example.indices)
                for example in examples
            ],
            max_batch_audio_s=self._config.max_batch_audio_s,
            seed=self._seed,
            rank=rank,
            world_size=world_size,
        )
        sampler.set_epoch(epoch)
        dataset = _Examples(self._utterances, examples, self._augmenter, self._config.max_audio_s)
        return SpeechBatches(dataset, list(sampler), self._tokenise, self._config.workers)


def load_noises(folder: Path | str | None) -> list[np.ndarray]:
    """Recordings of noise in `folder`, none without one."""
    paths = sorted(Path(folder).iterdir()) if folder is not None else []
    return [load_audio(path) for path in paths if path.is_file()]


def pad_targets(target_ids: list[list[int]], pad_id: int) -> torch.Tensor:
    """Stack token ids of different length, right-padded (B, L) int64."""
    longest = max((len(ids) for ids in target_ids), default=0)
    return torch.tensor([ids + [pad_id] * (longest - len(ids)) for ids in target_ids]).long()
