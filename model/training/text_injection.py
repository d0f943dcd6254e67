"""Text without audio beside the audio that an LLM learns to transcribe.

Transcribed speech is scarce and text is not. An LLM with a fused CTC head can be trained on both:
the audio positions of a sentence without audio hold the embeddings of what the head might have
written for it. Training on such text together with speech is that of JOIST (Sainath et al. 2022,
arXiv 2210.07353) and MAESTRO (Chen et al. 2022, arXiv 2204.03409); here the head's own errors take
the place of their masks and durations.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
from rapidfuzz.distance import Levenshtein

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from model.training.language_model import TextReader
    from model.training.loop import EpochBatches


class Misreadings:
    """Which tokens a CTC head writes where it does not write the right one."""

    def __init__(self) -> None:
        self._wrong: dict[int, list[tuple[int, ...]]] = defaultdict(list)

    def __len__(self) -> int:
        return sum(map(len, self._wrong.values()))

    def learn(self, said: Sequence[int], heard: Sequence[int]) -> None:
        """Remember the errors of one clip.

        Args:
            said: tokens of its transcript.
            heard: tokens that the head wrote. What it inserts belongs to the token before.
        """
        copies: list[list[int]] = [[] for _ in said]
        for edit in Levenshtein.opcodes(said, heard):
            tokens = heard[edit.dest_start : edit.dest_end]
            if edit.tag == "insert":
                if edit.src_start > 0:
                    copies[edit.src_start - 1] += tokens
            elif edit.tag != "delete":
                for index, token in enumerate(tokens, start=edit.src_start):
                    copies[index].append(token)
        for token, copy in zip(said, copies, strict=True):
            if copy != [token]:
                self._wrong[token].append(tuple(copy))

    def misread(self, ids: Sequence[int], rate: float, rng: np.random.Generator) -> list[int]:
        """A copy in which each token is one of its misreadings with probability `rate`.

        A token that has always been read rightly stays.
        """
        copy: list[int] = []
        for token in ids:
            wrong = self._wrong.get(token)
            if wrong and rng.random() < rate:
                copy += wrong[rng.integers(len(wrong))]
            else:
                copy.append(token)
        return copy


class TextBeside:
    """Speech batches, each with a batch of text under `text`; see `loop.EpochBatches`.

    What a batch holds is a function of the seed and its place, so a run that is resumed sees the
    same. An epoch of speech reads as many batches of text, from a new place and in a new order.
    """

    def __init__(
        self, speech: EpochBatches, reader: TextReader, batch_tokens: int, seed: tuple[int, ...]
    ) -> None:
        """Plan the text of an epoch.

        Args:
            speech: the batches to add to.
            reader: of the text.
            batch_tokens: padded target tokens in a batch.
            seed: of this epoch and rank.
        """
        rng = np.random.default_rng(seed)
        batches = reader.plan(batch_tokens, rng)
        self._batches = [batches[index] for index in rng.permutation(len(batches))]
        self._speech = speech
        self._reader = reader
        self._seed = seed

    def __len__(self) -> int:
        return len(self._speech)

    def iterate(self, start: int) -> Iterator[dict[str, Any]]:
        """Yield batches from index `start` on."""
        for number, batch in enumerate(self._speech.iterate(start), start=start):
            rng = np.random.default_rng((*self._seed, number))
            indices = self._batches[number % len(self._batches)]
            yield {**batch, "text": self._reader.batch(indices, rng)}
