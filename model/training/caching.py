"""Stage 2: write encoder outputs and token ids to a feature cache."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from tqdm import tqdm

from model.data.audio import load_audio
from model.data.augmentation import (
    SPEED_PROBABILITY,
    SPEED_RANGE,
    AugmentationConfig,
    WaveformAugmenter,
)
from model.data.sampler import DurationBucketSampler
from model.log_mel import WINDOW_SAMPLES
from model.training.feature_cache import FeatureCacheWriter, fingerprint
from model.training.speech_data import load_noises

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from model.data.manifest import Utterance
    from model.modeling import SpeechLLMForConditionalGeneration
    from model.processing import SpeechLLMProcessor


class CachingConfig(BaseModel):
    """How often and how varied each utterance is encoded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    plain_copies: int = Field(1, ge=0, le=1, description="1 keeps the recording as it is")
    augmented_copies: int = Field(0, ge=0, description="further, augmented copies")
    noise_dir: str | None = None
    speed_share: float = Field(
        SPEED_PROBABILITY, ge=0, le=1, description="of the augmented copies at another speed"
    )
    speed_range: tuple[float, float] = SPEED_RANGE
    max_batch_audio_s: float = Field(120.0, gt=0)
    max_audio_s: float = Field(30.0, gt=0, le=30)
    precision: Literal["bf16", "fp32"] = Field("bf16", description="of the encoder's arithmetic")
    seed: int = 0


@torch.inference_mode()
def write_cache(
    model: SpeechLLMForConditionalGeneration,
    processor: SpeechLLMProcessor,
    utterances: Sequence[Utterance],
    config: CachingConfig,
    output: Path,
) -> int:
    """Encode utterances into `output`; what is there already is not encoded again.

    Returns:
        Number of clips in the cache.

    Raises:
        CheckpointError: `output` holds a cache of another encoder, tokenizer, manifest or seed.
        ValueError: no utterance has a text and fits.
    """
    usable = [u for u in utterances if u.text is not None and u.duration <= config.max_audio_s]
    if not usable:
        raise ValueError(f"none of {len(utterances)} utterances has a text and fits")
    writer = FeatureCacheWriter(output, fingerprint(model, processor), _source(usable, config))
    done = writer.done
    first = 0 if config.plain_copies else 1
    wanted = [
        (f"{number}-{copy}", copy, utterance)
        for copy in range(first, config.augmented_copies + 1)
        for number, utterance in enumerate(usable)
    ]
    pending = [item for item in wanted if item[0] not in done]
    augmenter = WaveformAugmenter(
        AugmentationConfig(
            speed_probability=config.speed_share,
            speed_range=config.speed_range,
            max_duration_s=config.max_audio_s,
        ),
        load_noises(config.noise_dir),
    )
    sampler = DurationBucketSampler(
        [item[2].duration for item in pending], config.max_batch_audio_s, config.seed
    )
    is_bf16 = config.precision == "bf16"
    device = next(model.encoder.parameters()).device
    total_s = sum(item[2].duration for item in pending)
    with tqdm(total=round(total_s), unit="audio-s", desc="cache", mininterval=2.0) as bar:
        for batch in sampler if pending else ():
            items = [pending[index] for index in batch]
            clips = [_waveform(item, augmenter, config.seed) for item in items]
            features, feature_lens = processor.features(clips, device)
            with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
                frames, frame_lens = model.encode(features, feature_lens)
            for item, row, length in zip(items, frames, frame_lens.tolist(), strict=True):
                name, _, utterance = item
                text = utterance.text or ""
                fields = {"id": name, "text": text, "language": utterance.language}
                writer.add(
                    {**fields, "duration": utterance.duration},
                    row[:length],
                    processor.text_ids(text),
                )
            bar.update(round(sum(item[2].duration for item in items)))
    writer.finish()
    return len(writer.done)


def _source(utterances: Sequence[Utterance], config: CachingConfig) -> str:
    """Fingerprint of what decides a clip's content under its id (its number and its copy's)."""
    rows = [[u.id, u.text, u.duration] for u in utterances]
    speed = [config.speed_share, *config.speed_range]
    fields = [rows, config.seed, config.noise_dir, config.max_audio_s, config.precision, speed]
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


def _waveform(
    item: tuple[str, int, Utterance], augmenter: WaveformAugmenter, seed: int
) -> np.ndarray:
    name, copy, utterance = item
    waveform = load_audio(utterance.audio)
    if copy:
        number = int(name.split("-", maxsplit=1)[0])
        waveform = augmenter(waveform, np.random.default_rng((seed, copy, number)))
    return waveform[:WINDOW_SAMPLES]  # a manifest's durations are rounded
