"""Assemble the default recipe's manifests from human recordings and synthetic speech."""

from __future__ import annotations

import argparse
import json
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from synthesise import HELD_OUT_MANIFESTS, SAMPLE_RATE_HZ, comparable

Row = dict[str, Any]

HUMAN_TRAIN = ("kathleen_train", "matthes_train", "fsdd_train", "precise_train")
TEST_NOISES = ("bg_noise8.flac", "bg_noise9.flac")
N_NOISE_TRAIN, N_NOISE_TEST = 300, 60
N_DIGIT_STRINGS, N_DIGIT_STRINGS_TRAIN = 200, 500
MAX_SAME_WORD = 20  # recordings of one; a word heard hundreds of times is heard in noise too
MONGOLIAN_COPIES = 3  # of its text: there is a tenth as much of it as of English


def read_rows(path: Path, root: Path) -> list[Row]:
    """Rows of a manifest whose audio paths become absolute."""
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [{**row, "audio": str((root / row["audio"]).resolve())} for row in rows]


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write a manifest and say how much it holds."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(lines, encoding="utf-8")
    hours = sum(row["duration"] for row in rows) / 3600
    print(f"{path.name:32} {len(rows):6} clips {hours:8.2f} h")  # noqa: T201 - a script's report


def write_clip(path: Path, waveform: np.ndarray, text: str, speaker: str) -> Row:
    """Write one clip and describe it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.clip(waveform, -1, 1).astype(np.float32), SAMPLE_RATE_HZ)
    return {
        "audio": str(path.resolve()),
        "text": text,
        "speaker": speaker,
        "language": "en" if text else None,
        "duration": len(waveform) / SAMPLE_RATE_HZ,
    }


def make_noise(recordings: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Silence, white noise, brown noise or a piece of a recording, 0.5-8 s, at a random level."""
    n_samples = int(SAMPLE_RATE_HZ * rng.uniform(0.5, 8))
    kind = rng.integers(4)
    if kind == 0:
        return np.zeros(n_samples)
    if kind == 1:
        return rng.standard_normal(n_samples) * 10 ** rng.uniform(-4, -1)
    if kind == 2:  # noqa: PLR2004 - the third of four
        walk = np.cumsum(rng.standard_normal(n_samples))
        walk -= np.convolve(walk, np.ones(400) / 400, "same")
        return walk / np.abs(walk).max() * 10 ** rng.uniform(-3, -0.5)
    recording = recordings[rng.integers(len(recordings))]
    start = int(rng.integers(len(recording)))
    piece = np.take(recording, np.arange(start, start + n_samples), mode="wrap")
    return piece * 10 ** rng.uniform(-1, 0.3)


def non_speech(noises: list[Path], folder: Path, count: int, seed: int) -> list[Row]:
    """Clips without speech, whose transcript is empty."""
    rng = np.random.default_rng(seed)
    recordings = [soundfile.read(path, dtype="float32")[0] for path in noises]
    return [
        write_clip(folder / f"{number:04d}.flac", make_noise(recordings, rng), "", "noise")
        for number in range(count)
    ]


def digit_strings(rows: list[Row], folder: Path, count: int, seed: int) -> list[Row]:
    """Random strings of three to eight digits, each string by one speaker, the speakers in turn."""
    rng = np.random.default_rng(seed)
    speakers = sorted({row["speaker"] for row in rows})
    clips = []
    for number in range(count):
        speaker = speakers[number % len(speakers)]
        spoken = [row for row in rows if row["speaker"] == speaker]
        picked = [spoken[i] for i in rng.integers(0, len(spoken), rng.integers(3, 9))]
        parts: list[np.ndarray] = []
        for row in picked:
            waveform, rate_hz = soundfile.read(row["audio"], dtype="float32")
            gap = np.zeros(int(SAMPLE_RATE_HZ * rng.uniform(0.05, 0.4)), np.float32)
            parts += [soxr.resample(waveform, rate_hz, SAMPLE_RATE_HZ), gap]
        text = " ".join(row["text"] for row in picked)
        clips.append(
            write_clip(folder / f"{number:04d}.flac", np.concatenate(parts[:-1]), text, speaker)
        )
    return clips


def cap_repeats(rows: list[Row], most: int) -> list[Row]:
    """Rows without those whose text `most` rows before them have."""
    counts: Counter[str] = Counter()
    kept = []
    for row in rows:
        counts[row["text"]] += 1
        if counts[row["text"]] <= most:
            kept.append(row)
    return kept


def held_out_texts(*splits: list[Row]) -> set[str]:
    """What dev and test splits say; single words, such as digits, are no sentence to hold out."""
    texts = {comparable(row["text"]) for rows in splits for row in rows}
    return {text for text in texts if " " in text}


def lm_text(text_dir: Path, transcripts: list[str], held_out: set[str]) -> list[str]:
    """Text for tokenizer and LM, without any sentence of a dev or test split."""

    def read(name: str) -> list[str]:
        lines = (text_dir / name).read_text(encoding="utf-8").splitlines()
        lines = [unicodedata.normalize("NFC", line.strip()) for line in lines]
        return [line for line in lines if line and comparable(line) not in held_out]

    spoken = [text for text in transcripts if len(text.split()) > 2]  # noqa: PLR2004 - no lists
    return read("en.txt") + read("mn.txt") * MONGOLIAN_COPIES + spoken


def main() -> None:
    """Write the manifests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--synthetic", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    data, output = options.data_dir, options.output
    output.mkdir(parents=True, exist_ok=True)

    def human(name: str) -> list[Row]:
        rows = read_rows(data / "manifests" / f"{name}.jsonl", data)
        return cap_repeats(rows, MAX_SAME_WORD) if name == "precise_train" else rows

    def synthetic(name: str) -> list[Row]:
        return read_rows(options.synthetic / f"{name}.jsonl", options.synthetic)

    noises = sorted((data / "noise").glob("*.flac"))
    train_noises = [path for path in noises if path.name not in TEST_NOISES]
    noise_dir = output / "noise_train"
    noise_dir.mkdir(exist_ok=True)
    for path in train_noises:
        (noise_dir / path.name).unlink(missing_ok=True)
        (noise_dir / path.name).symlink_to(path.resolve())

    held_out = held_out_texts(
        *(human(name) for name in HELD_OUT_MANIFESTS),
        *(synthetic(name) for name in ("en_dev", "mn_dev", "mn_test")),
    )
    train_human = [
        row
        for name in HUMAN_TRAIN
        for row in human(name)
        if comparable(row["text"]) not in held_out
    ]
    silent = non_speech(train_noises, output / "non_speech_train", N_NOISE_TRAIN, seed=1)
    write_rows(output / "train_human.jsonl", train_human)
    write_rows(output / "train.jsonl", train_human + silent + synthetic("train"))
    strings = digit_strings(
        human("fsdd_train"), output / "digit_strings_train", N_DIGIT_STRINGS_TRAIN, seed=6
    )
    write_rows(output / "train_strings.jsonl", strings)
    dev = human("kathleen_dev") + synthetic("en_dev")[:30] + synthetic("mn_dev")
    write_rows(output / "dev.jsonl", dev)
    for split in ("kathleen_test", "common_voice_en_dev", "fsdd_test", "jfk_test"):
        write_rows(output / f"test_{split.removesuffix('_test')}.jsonl", human(split))
    strings = digit_strings(human("fsdd_test"), output / "digit_strings", N_DIGIT_STRINGS, seed=5)
    write_rows(output / "test_fsdd_strings.jsonl", strings)
    write_rows(output / "test_synthetic_mn.jsonl", synthetic("mn_test"))
    test_noises = [path for path in noises if path.name in TEST_NOISES]
    silent = non_speech(test_noises, output / "non_speech_test", N_NOISE_TEST, seed=2)
    write_rows(output / "test_non_speech.jsonl", silent)

    lines = lm_text(data / "text", [row["text"] for row in train_human], held_out)
    (output / "lm_text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"lm_text.txt: {len(lines)} lines")  # noqa: T201 - a script's report


if __name__ == "__main__":
    main()
