"""How much lists of hotwords help: word error rates of the words listed, and of all others.

Each clip's list holds its own rare words and as many of other clips, as a list of names would. Only
those that the CTC head has heard something like are prompted, as the server does it.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import jiwer
import numpy as np
from prepare import Row, read_rows
from tqdm import tqdm

from model.data.audio import load_audio
from model.evaluation.normalisation import normalise_basic
from model.hotwords import heard_hotwords, list_hotwords
from model.transcription import Transcriber

MIN_LETTERS = 5  # of a rare word
MOST_OFTEN = 2  # in all references
DISTRACTORS = 5


def rare_words(rows: list[Row]) -> list[list[str]]:
    """Rare words of each row's text."""
    texts = [normalise_basic(row["text"]).split() for row in rows]
    counts = Counter(word for text in texts for word in text)
    return [
        [word for word in text if len(word) >= MIN_LETTERS and counts[word] <= MOST_OFTEN]
        for text in texts
    ]


def word_errors(reference: str, hypothesis: str, listed: set[str]) -> np.ndarray:
    """Errors in listed and in other words, then how many of each there are: (4,) int64.

    An inserted word counts as a listed one if it is one.
    """
    counts = np.zeros(4, np.int64)
    output = jiwer.process_words(normalise_basic(reference), normalise_basic(hypothesis))
    said, heard = output.references[0], output.hypotheses[0]
    for chunk in output.alignments[0]:
        inserts = chunk.type == "insert"
        words = (
            heard[chunk.hyp_start_idx : chunk.hyp_end_idx]
            if inserts
            else said[chunk.ref_start_idx : chunk.ref_end_idx]
        )
        for word in words:
            kind = 0 if word in listed else 1
            counts[kind] += chunk.type != "equal"
            counts[kind + 2] += not inserts
    return counts


def main() -> None:
    """Transcribe with and without lists, and print both rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = read_rows(options.manifest, options.manifest.parent)
    own = rare_words(rows)
    everybody = sorted({word for words in own for word in words})
    rng = np.random.default_rng(options.seed)
    transcriber = Transcriber.from_pretrained(options.model, dtype="fp32")
    plain, biased, unheard = (np.zeros(4, np.int64) for _ in range(3))
    for row, words in zip(tqdm(rows), own, strict=True):
        others = [everybody[i] for i in rng.integers(0, len(everybody), len(words) + DISTRACTORS)]
        others = [word for word in others if word not in words]
        clip, listed = load_audio(Path(row["audio"])), set(words)

        def say(hotwords: list[str], clip: np.ndarray = clip) -> tuple[str, str]:
            context = transcriber.processor.context(hotwords=list_hotwords(hotwords))
            (answer,) = transcriber.transcribe([clip], context=context, with_ctc=True).transcripts
            return answer.text, answer.ctc_text or ""

        text, heard = say([])
        plain += word_errors(row["text"], text, listed)
        chosen = heard_hotwords(sorted({*words, *others}), heard)
        biased += word_errors(row["text"], say(chosen)[0] if chosen else text, listed)
        chosen = heard_hotwords(others, heard)
        unheard += word_errors(row["text"], say(chosen)[0] if chosen else text, listed)
    for name, counts in (
        ("no list", plain),
        ("own words and others", biased),
        ("others only", unheard),
    ):
        rates = 100 * counts[:2] / counts[2:]
        print(  # noqa: T201 - a script's report
            f"{name:22} listed words {rates[0]:5.1f} % of {counts[2]}, others {rates[1]:5.1f} % "
            f"of {counts[3]}"
        )


if __name__ == "__main__":
    main()
