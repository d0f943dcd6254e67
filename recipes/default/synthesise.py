"""Speak sentences with Debian's free voices: training data where human speech is scarce.

flite's voices built from recordings (rms, awb, slt) are the most human and speak most of the
English; espeak-ng and flite's diphone voice vary it. Mongolian Cyrillic is read by espeak-ng's
voices for Kazakh, Tatar and Bashkir, which share its letters: a test of the pipeline, no accuracy.
Every clip's rate, pitch and vocal-tract length (by resampling) are drawn at random.

The plan is a function of the texts and the seed. Clips of it that exist are not spoken again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import unicodedata
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Sequence

SAMPLE_RATE_HZ = 16_000
ENGLISH_VOICES = (
    "en-us",
    "en-gb",
    "en-gb-scotland",
    "en-gb-x-rp",
    "en-029",
    "en-us-nyc",
)
MONGOLIAN_VOICES = ("kk", "tt", "ba")
TRAINING_VARIANTS = (*(f"m{i}" for i in range(1, 8)), "f1", "f2", "f3", "")
HELD_OUT_VARIANTS = ("f4", "f5", "m8", "f5")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELD_OUT_MANIFESTS = ("kathleen_dev", "kathleen_test", "common_voice_en_dev", "jfk_test")

ORDERS_MANIFEST = "picovoice_slots"  # spoken orders that are labelled by intent and slots only
OPENINGS = ("Can I have", "Could I get", "I would like", "I want", "Please make me", "Get me", "")

N_ENGLISH_DEV = 100
N_MONGOLIAN_TEST = 150
N_MONGOLIAN_DEV = 60
N_DIGIT_STRINGS = 450
SHORTEST_TEXT, LONGEST_TEXT = 8, 140  # characters
SHORTEST_S, LONGEST_S = 0.25, 20.0
SILENCE_KEPT_S = 0.1
_SPEAKABLE = re.compile(r"^[^\W\d_][\w ,.!?'’\"“”:;\-–()]*$")


@dataclass(frozen=True, slots=True)
class Voice:
    """How a sentence is spoken.

    Attributes:
        engine: `flite` or `espeak-ng`.
        name: the engine's voice, with espeak-ng's variant after a plus sign.
        options: of the engine's command line.
        shift: resampling factor; above 1 the voice is higher and faster.
    """

    engine: str
    name: str
    options: tuple[str, ...]
    shift: float


@dataclass(frozen=True, slots=True)
class Task:
    """One clip to make."""

    number: int
    split: str
    language: str
    text: str
    voice: Voice


def comparable(text: str) -> str:
    """A text without case and punctuation, to tell whether two say the same."""
    return re.sub(r"[^\w ]", "", text.lower()).strip()


def read_sentences(path: Path, held_out: set[str], rng: random.Random) -> list[str]:
    """Sentences that a synthesiser can speak and no test says, in random order."""
    with path.open(encoding="utf-8") as file:
        lines = [unicodedata.normalize("NFC", line.strip()) for line in file]
    sentences = [
        line
        for line in dict.fromkeys(lines)
        if SHORTEST_TEXT <= len(line) <= LONGEST_TEXT
        and not re.search(r"\d", line)  # spoken otherwise than written
        and _SPEAKABLE.match(line)
        and comparable(line) not in held_out
    ]
    rng.shuffle(sentences)
    return sentences


def held_out_sentences(manifests: Path, more: Sequence[Path] = ()) -> set[str]:
    """What the human dev and test splits say, and the manifests `more`."""
    sentences: set[str] = set()
    for path in (*(manifests / f"{name}.jsonl" for name in HELD_OUT_MANIFESTS), *more):
        with path.open(encoding="utf-8") as file:
            sentences |= {comparable(json.loads(line)["text"]) for line in file}
    return sentences


def word_order(slots: dict[str, str], rng: random.Random) -> str:
    """Word an order with these slots; it teaches the words that the recordings use."""
    values = {name: value.strip() for name, value in slots.items()}
    names = ("size", "roast", "numberOfShots")
    rng.shuffle(described := [values[name] for name in names if name in values])
    drink = " ".join([*described, values.get("coffeeDrink", "coffee")])
    extras = [values[name] for name in ("milkAmount", "sugarAmount") if name in values]
    rng.shuffle(extras)
    opening = rng.choice(OPENINGS)
    article = ("an" if drink[0] in "aeiou" else "a") if opening else ""
    words = [opening, article, drink, *(["with", " and ".join(extras)] if extras else [])]
    text = " ".join(word for word in words if word)
    return text[0].upper() + text[1:] + rng.choice((".", ".", " please."))


def read_orders(manifests: Path, rng: random.Random) -> list[str]:
    """Reworded orders, one for each recording; none without the manifest."""
    path = manifests / f"{ORDERS_MANIFEST}.jsonl"
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [word_order(json.loads(line)["slots"], rng) for line in file]


def espeak_voice(language: str, variants: tuple[str, ...], rng: random.Random) -> Voice:
    """Draw an espeak-ng voice."""
    variant = rng.choice(variants)
    options = ("-s", str(rng.randint(130, 200)), "-p", str(rng.randint(25, 75)))
    name = f"{language}+{variant}" if variant else language
    return Voice("espeak-ng", name, options, rng.uniform(0.95, 1.06))


def english_voice(rng: random.Random) -> Voice:
    """Draw an English voice: 62 % flite's recorded voices, 26 % espeak-ng, 12 % flite's kal."""
    share = rng.random()
    if 0.62 <= share < 0.88:  # noqa: PLR2004 - the shares above
        return espeak_voice(rng.choice(ENGLISH_VOICES), TRAINING_VARIANTS, rng)
    if share < 0.62:  # noqa: PLR2004 - likewise
        name, stretch = rng.choice(("rms", "awb", "slt", "slt")), rng.uniform(0.8, 1.25)
    else:
        name, stretch = rng.choice(("kal16", "kal")), rng.uniform(0.85, 1.2)
    options = ("--setf", f"duration_stretch={round(stretch, 2)}")
    return Voice("flite", name, options, rng.uniform(0.86, 1.2))


def make_plan(  # noqa: PLR0913, PLR0917 - a plan's whole input
    english: list[str],
    mongolian: list[str],
    n_english: int,
    n_mongolian: int,
    rng: random.Random,
    orders: tuple[str, ...] = (),
) -> list[Task]:
    """Decide who says what in which split; held-out sentences and variants are in no other."""
    plan: list[Task] = []

    def add(split: str, language: str, text: str, voice: Voice) -> None:
        plan.append(Task(len(plan), split, language, text, voice))

    for text in english[:N_ENGLISH_DEV]:
        add("en_dev", "en", text, english_voice(rng))
    held_out = mongolian[: N_MONGOLIAN_TEST + N_MONGOLIAN_DEV]
    for number, text in enumerate(held_out):
        split = "mn_test" if number < N_MONGOLIAN_TEST else "mn_dev"
        voice = espeak_voice(rng.choice(MONGOLIAN_VOICES), HELD_OUT_VARIANTS, rng)
        add(split, "mn", text, voice)
    for _ in range(N_DIGIT_STRINGS):
        digits = " ".join(rng.choice(DIGITS) for _ in range(rng.randint(1, 8)))
        add("train", "en", digits, english_voice(rng))
    for text in _enough(mongolian[len(held_out) :], n_mongolian):
        add("train", "mn", text, espeak_voice(rng.choice(MONGOLIAN_VOICES), TRAINING_VARIANTS, rng))
    for text in (*_enough(english[N_ENGLISH_DEV:], n_english), *orders):
        add("train", "en", text, english_voice(rng))
    return plan


def _enough(sentences: list[str], count: int) -> list[str]:
    """`count` sentences, again from the first where there are too few."""
    return [sentences[i % len(sentences)] for i in range(count)] if sentences else []


def clip_path(folder: Path, split: str, number: int, task: object) -> Path:
    """Where a clip lies; its name tells its task, so that no other plan takes it for its own.

    Args:
        folder: of all clips.
        split: that it belongs to.
        number: in its plan.
        task: whose `repr` says all of it.
    """
    digest = hashlib.sha256(repr(task).encode()).hexdigest()[:8]
    return folder / split / f"{number // 1000:03d}" / f"{number:06d}-{digest}.flac"


def speak(task: Task, folder: Path) -> dict[str, object] | None:
    """Make one clip; None where the engine fails or the result cannot be that sentence."""
    path = clip_path(folder, task.split, task.number, task)
    if path.exists():
        duration_s = soundfile.info(path).duration
    else:
        waveform = _synthesise(task.text, task.voice, path)
        if waveform is None:
            return None
        partial_path = path.with_suffix(".part.flac")
        soundfile.write(partial_path, waveform, SAMPLE_RATE_HZ, subtype="PCM_16")
        partial_path.rename(path)
        duration_s = len(waveform) / SAMPLE_RATE_HZ
    if not SHORTEST_S <= duration_s <= LONGEST_S:
        return None
    return {
        "audio": str(path.relative_to(folder)),
        "text": task.text,
        "speaker": f"{task.voice.engine}:{task.voice.name}",
        "language": task.language,
        "duration": round(duration_s, 3),
        "licence": "synthetic",
    }


def _synthesise(text: str, voice: Voice, path: Path) -> np.ndarray | None:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = path.with_suffix(".wav")
    if voice.engine == "flite":
        command = ["flite", "-voice", voice.name, *voice.options, "-t", text, "-o", str(raw)]
    else:
        command = ["espeak-ng", "-v", voice.name, *voice.options, "-w", str(raw), text]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=60)  # noqa: S603 - commands of this file
        waveform, rate_hz = soundfile.read(raw, dtype="float32")
    except (subprocess.SubprocessError, soundfile.SoundFileError):
        return None
    finally:
        raw.unlink(missing_ok=True)
    return trim_and_level(waveform, rate_hz * voice.shift)


def trim_and_level(waveform: np.ndarray, rate_hz: float) -> np.ndarray | None:
    """A voice at 16 kHz without the silence around it, at half of full scale; None if silent."""
    waveform = soxr.resample(waveform, rate_hz, SAMPLE_RATE_HZ)
    loud = np.flatnonzero(np.abs(waveform) > 0.01)  # noqa: PLR2004 - -40 dBFS
    if loud.size < SILENCE_KEPT_S * SAMPLE_RATE_HZ:
        return None
    margin = int(SILENCE_KEPT_S * SAMPLE_RATE_HZ)
    waveform = waveform[max(0, loud[0] - margin) : loud[-1] + margin]
    peak = max(0.05, float(np.abs(waveform).max()))
    normalised: np.ndarray = (waveform * (0.5 / peak)).astype(np.float32)
    return normalised


def main() -> None:
    """Speak the plan and write one manifest a split."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text-dir", type=Path, required=True, help="holds en.txt and mn.txt")
    parser.add_argument("--manifests", type=Path, required=True, help="of the human recordings")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--english", type=int, default=30_000, help="sentences to speak")
    parser.add_argument("--mongolian", type=int, default=5_700, help="sentences to speak")
    options = parser.parse_args()
    for engine in ("flite", "espeak-ng"):
        if shutil.which(engine) is None:
            sys.exit(f"error: {engine} is not installed; it is a Debian package of that name")
    rng = random.Random(options.seed)  # noqa: S311 - a plan, no secret
    held_out = held_out_sentences(options.manifests)
    english = read_sentences(options.text_dir / "en.txt", held_out, rng)
    mongolian = read_sentences(options.text_dir / "mn.txt", held_out, rng)
    orders = tuple(read_orders(options.manifests, random.Random(options.seed)))  # noqa: S311 - a plan, no secret
    plan = make_plan(english, mongolian, options.english, options.mongolian, rng, orders)
    options.output.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, object]]] = defaultdict(list)
    with ProcessPoolExecutor(options.jobs) as pool:
        clips = pool.map(partial(speak, folder=options.output), plan, chunksize=16)
        for task, row in tqdm(
            zip(plan, clips, strict=True), total=len(plan), desc="speak", unit="clip"
        ):
            if row is not None:
                rows[task.split].append(row)
    for split, entries in rows.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in entries)
        (options.output / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        hours = sum(float(str(row["duration"])) for row in entries) / 3600
        print(f"{split}: {len(entries)} clips, {hours:.2f} h")  # noqa: T201 - a script's report


if __name__ == "__main__":
    main()
