"""Transcribe recordings that are labelled by intent and slots only, and keep what can be trusted.

A transcript is kept when the decoder ended it and it says every slot's value, as whole words. The
rest of an order is a few function words, so that what is kept is mostly right: many voices and
rooms, for which there is no other training speech.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from prepare import Row, read_rows, write_rows
from synthesise import ORDERS_MANIFEST, comparable
from tqdm import tqdm

from model.data.audio import load_audio
from model.evaluation.decoding import SpeechTranscriber, load_transcriber

BATCH_SIZE = 16
MAX_WORDS_BESIDE_SLOTS = 14


def says_slots(text: str, slots: dict[str, str]) -> bool:
    """Whether `text` holds every slot's value, each value's words together, and little else."""
    words = f" {' '.join(comparable(text).split())} "
    values = [" ".join(comparable(value).split()) for value in slots.values()]
    n_slot_words = sum(len(value.split()) for value in values)
    fits = len(words.split()) <= n_slot_words + MAX_WORDS_BESIDE_SLOTS
    return fits and all(f" {value} " in words for value in values)


def pseudo_label(rows: list[Row], transcriber: SpeechTranscriber) -> list[Row]:
    """Rows with transcripts, of those that can be trusted."""
    kept = []
    ordered = sorted(rows, key=lambda row: float(row["duration"]))
    for start in tqdm(range(0, len(ordered), BATCH_SIZE), desc="label", unit="batch"):
        batch = ordered[start : start + BATCH_SIZE]
        clips = [load_audio(Path(row["audio"])) for row in batch]
        answers = transcriber.transcribe(clips).transcripts
        kept += [
            {**row, "text": answer.text}
            for row, answer in zip(batch, answers, strict=True)
            if answer.finish_reason == "stop" and says_slots(answer.text, row["slots"])
        ]
    return kept


def main() -> None:
    """Write a manifest of the trusted transcripts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="a Whisper or a speech LLM")
    parser.add_argument("--output", type=Path, required=True, help="manifest to write")
    options = parser.parse_args()
    rows = read_rows(options.data_dir / "manifests" / f"{ORDERS_MANIFEST}.jsonl", options.data_dir)
    write_rows(options.output, pseudo_label(rows, load_transcriber(options.model, "auto")))


if __name__ == "__main__":
    main()
