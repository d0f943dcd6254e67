"""Encoder outputs and token ids on disk, so that the connector trains without encoding again.

A cache is a folder of safetensors shards (fp16 frames, int32 token ids) and an `index.json` that
names the encoder, its mode and the tokenizer by fingerprint.

Axis legend: F encoder frames, D encoder width, L target tokens.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from model.checkpoint import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from torch import Tensor

    from model.modeling import SpeechLLMForConditionalGeneration
    from model.processing import SpeechLLMProcessor

INDEX_FILE = "index.json"
SHARD_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class CachedClip:
    """One clip's entry in the index."""

    id: str
    shard: str
    n_frames: int
    text: str
    language: str | None
    duration: float


def fingerprint(
    model: SpeechLLMForConditionalGeneration, processor: SpeechLLMProcessor
) -> dict[str, str]:
    """What a cache depends on: the encoder's weights, its mode, the tokenizer."""
    weights = hashlib.sha256()
    for name, tensor in sorted(model.encoder.state_dict().items()):
        weights.update(name.encode())
        weights.update(tensor.detach().float().cpu().numpy().tobytes())
    vocabulary = json.dumps(sorted(processor.tokenizer.get_vocab().items()))
    return {
        "encoder": weights.hexdigest(),
        "encoder_mode": model.config.encoder_mode,
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
    }


class FeatureCacheWriter:
    """Write a cache shard by shard; a killed run goes on after its last whole shard.

    A shard is written before the index that names it; one that a kill left without an entry is
    overwritten.
    """

    def __init__(self, folder: Path, identity: dict[str, str], source: str) -> None:
        """Open `folder`.

        Args:
            folder: of the cache.
            identity: `fingerprint` of what encodes.
            source: fingerprint of what is encoded and how it is varied; clip ids only mean the
                same under the same source.

        Raises:
            CheckpointError: it holds a cache of another encoder, tokenizer or source.
        """
        self._folder = folder
        self._identity = {**identity, "source": source}
        self._clips: list[CachedClip] = []
        self._pending: dict[str, Tensor] = {}
        self._pending_clips: list[CachedClip] = []
        self._bytes = 0
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / INDEX_FILE).exists():
            found = FeatureCache(folder, identity)
            if found.source != source:
                raise CheckpointError(
                    f"{folder}: this cache was begun from another manifest, seed or noise; "
                    "choose another folder"
                )
            self._clips = found.clips

    @property
    def done(self) -> set[str]:
        """Ids that are already on disk."""
        return {clip.id for clip in self._clips}

    def add(self, clip: dict[str, Any], frames: Tensor, token_ids: list[int]) -> None:
        """Add one clip: fields of `CachedClip`, its frames (F, D) and target ids (L,)."""
        shard = f"frames-{self._n_shards():05d}.safetensors"
        self._pending_clips.append(CachedClip(shard=shard, n_frames=len(frames), **clip))
        self._pending[f"{clip['id']}:frames"] = frames.to(torch.float16).cpu().contiguous()
        self._pending[f"{clip['id']}:tokens"] = torch.tensor(token_ids, dtype=torch.int32)
        self._bytes += frames.numel() * 2
        if self._bytes >= SHARD_BYTES:
            self.flush()

    def _n_shards(self) -> int:
        return len({clip.shard for clip in self._clips})

    def flush(self) -> None:
        """Write what is pending, shard first, then the index that names it."""
        if not self._pending_clips:
            return
        save_file(self._pending, self._folder / self._pending_clips[0].shard)
        self._clips += self._pending_clips
        self._pending, self._pending_clips, self._bytes = {}, [], 0
        self._write_index(complete=False)

    def finish(self) -> None:
        """Write what is pending, and that the cache is whole."""
        self.flush()
        self._write_index(complete=True)

    def _write_index(self, *, complete: bool) -> None:
        clips = [asdict(clip) for clip in self._clips]
        index = {**self._identity, "complete": complete, "clips": clips}
        fresh = self._folder / f"{INDEX_FILE}.new"
        fresh.write_text(json.dumps(index, ensure_ascii=False))
        fresh.replace(self._folder / INDEX_FILE)


class FeatureCache:
    """Read a cache; clips are memory-mapped, so any number of epochs costs one read."""

    def __init__(self, folder: Path, identity: dict[str, str] | None = None) -> None:
        """Open `folder`; with `identity`, of what is going to read it, check that it fits.

        Raises:
            CheckpointError: it is no cache, damaged, or another encoder, mode or tokenizer
                made it.
        """
        path = folder / INDEX_FILE
        if not path.exists():
            raise CheckpointError(f"{folder}: holds no feature cache ({INDEX_FILE} is missing)")
        try:
            index = json.loads(path.read_text())
            self.clips = [CachedClip(**clip) for clip in index["clips"]]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: not the index of a feature cache ({error})") from error
        differing = [name for name, value in (identity or {}).items() if index.get(name) != value]
        if differing:
            raise CheckpointError(
                f"{folder}: this cache was made with another {' and '.join(differing)}; make it "
                "again with `speechllm cache`"
            )
        for shard in dict.fromkeys(clip.shard for clip in self.clips):
            if not (folder / shard).exists():
                raise CheckpointError(f"{path}: names {shard}, which is not there")
        self.source: str | None = index.get("source")
        self.is_complete = bool(index.get("complete", True))
        self.folder = folder
        self._readers: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}

    def __getitem__(self, clip: CachedClip) -> tuple[Tensor, list[int]]:
        """Frames (F, D) fp16 and target ids of one clip."""
        reader = self._readers.get(clip.shard)
        if reader is None:
            reader = safe_open(self.folder / clip.shard, framework="pt")
            self._readers[clip.shard] = reader
        tokens = reader.get_tensor(f"{clip.id}:tokens")
        return reader.get_tensor(f"{clip.id}:frames"), tokens.tolist()


def merge_clips(caches: Iterable[FeatureCache]) -> list[tuple[FeatureCache, CachedClip]]:
    """All clips of several caches.

    Raises:
        CheckpointError: one was broken off before all of its clips were in it.
    """
    merged = []
    for cache in caches:
        if not cache.is_complete:
            raise CheckpointError(
                f"{cache.folder}: this cache is not finished; repeat the `speechllm cache` command "
                "that makes it"
            )
        merged += [(cache, clip) for clip in cache.clips]
    return merged
