"""Lists of hotwords in the prompts of training clips: words of the transcript, and others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from model.hotwords import MAX_LISTED, clean_hotword, list_hotwords

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from model.processing import SpeechLLMProcessor
    from model.training.loop import EpochBatches

_MAX_OWN = 3  # of a clip's own words in its list
_MIN_LETTERS = 3  # shorter words are seldom worth a hint


class HotwordBatches:
    """Batches with a prompt for each clip; a share of them lists hotwords.

    A clip's list is a function of the seed and the batch's place, so a run that is resumed sees
    the same ones.
    """

    def __init__(
        self,
        batches: EpochBatches,
        processor: SpeechLLMProcessor,
        share: float,
        seed: tuple[int, ...],
    ) -> None:
        """Wrap an epoch's batches.

        Args:
            batches: with `target_ids`.
            processor: of a model whose prompt takes hotwords.
            share: of the clips that get a list.
            seed: of this epoch and rank.
        """
        self._batches = batches
        self._processor = processor
        self._share = share
        self._seed = seed

    def __len__(self) -> int:
        return len(self._batches)

    def iterate(self, start: int) -> Iterator[dict[str, Any]]:
        """Yield batches from index `start` on."""
        for index, batch in enumerate(self._batches.iterate(start), start=start):
            rng = np.random.default_rng((*self._seed, index))
            texts = [self._processor.decode_transcript(ids) for ids in batch["target_ids"]]
            lists = [
                sample_hotwords(text, texts, rng) if rng.random() < self._share else []
                for text in texts
            ]
            prompts = [
                self._processor.extended_prompt(hotwords=list_hotwords(words)) for words in lists
            ]
            yield {**batch, "prompts": prompts}


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
