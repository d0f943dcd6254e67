"""What stands before the audio of training clips: lists of hotwords, and text said just before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from model.hotwords import MAX_LISTED, clean_hotword, list_hotwords
from model.processing import previous_text_tail

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from model.processing import SpeechLLMProcessor
    from model.training.loop import EpochBatches

_MAX_OWN = 3  # of a clip's own words in its list
_MIN_LETTERS = 3  # shorter words are seldom worth a hint


class ContextBatches:
    """Batches with a context for each clip.

    The text before a clip is that of another clip of its batch: corpora of single sentences have
    no other. It teaches to read the audio behind a text, not to take a name from it.

    A clip's context is a function of the seed and the batch's place, so a run that is resumed sees
    the same ones.
    """

    def __init__(
        self,
        batches: EpochBatches,
        processor: SpeechLLMProcessor,
        seed: tuple[int, ...],
        *,
        hotwords_share: float,
        previous_text_share: float,
    ) -> None:
        """Wrap an epoch's batches.

        Args:
            batches: with `target_ids`.
            processor: of a model that is to read what has a share.
            seed: of this epoch and rank.
            hotwords_share: of the clips that get a list of hotwords.
            previous_text_share: of the clips that get a text before them.
        """
        self._batches = batches
        self._processor = processor
        self._seed = seed
        self._hotwords_share = hotwords_share
        self._previous_text_share = previous_text_share

    def __len__(self) -> int:
        return len(self._batches)

    def iterate(self, start: int) -> Iterator[dict[str, Any]]:
        """Yield batches from index `start` on."""
        for index, batch in enumerate(self._batches.iterate(start), start=start):
            rng = np.random.default_rng((*self._seed, index))
            texts = [self._processor.decode_transcript(ids) for ids in batch["target_ids"]]
            contexts = [self._context(own, texts, rng) for own in range(len(texts))]
            yield {**batch, "contexts": contexts}

    def _context(self, own: int, texts: Sequence[str], rng: np.random.Generator) -> str:
        additions: dict[str, str] = {}
        if rng.random() < self._previous_text_share:
            others = [text for index, text in enumerate(texts) if index != own and text]
            if others:
                other = others[rng.integers(len(others))]
                additions["previous_text"] = previous_text_tail(other)
        if rng.random() < self._hotwords_share:
            additions["hotwords"] = list_hotwords(sample_hotwords(texts[own], texts, rng))
        return self._processor.context(**additions)


def sample_hotwords(text: str, texts: Sequence[str], rng: np.random.Generator) -> list[str]:
    """Draw up to MAX_LISTED words: some of a transcript, and distractors from others.

    Args:
        text: the transcript.
        texts: of the batch; its own may be among them.
        rng: draws.
    """
    own = _words(text)
    others = [word for word in _words(" ".join(texts)) if word not in own]
    drawn = _draw(own, _MAX_OWN, rng) + _draw(others, MAX_LISTED - _MAX_OWN, rng)
    return [drawn[index] for index in rng.permutation(len(drawn))]


def _words(text: str) -> list[str]:
    words = (clean_hotword(word).strip(".'’-") for word in text.split())
    return list(dict.fromkeys(word for word in words if len(word) >= _MIN_LETTERS))


def _draw(words: list[str], most: int, rng: np.random.Generator) -> list[str]:
    count = min(len(words), int(rng.integers(0, most + 1)))
    return [words[index] for index in rng.choice(len(words), count, replace=False)]
