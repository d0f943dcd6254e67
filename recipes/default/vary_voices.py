"""Let other voices say what was recorded: copies of human speech with the speaker changed.

Few speakers are in the data, and playing them faster or slower moves a voice's pitch, formants and
pace together. The WORLD vocoder (Morise et al. 2016) takes them apart: each copy is resynthesised
at a pitch drawn from those of adults and children, with formants that mostly go with it as vocal
tracts do, an intonation that is livelier or flatter, and another pace. Words, their articulation
and the room stay.

The copies are a function of the manifest and the seed. Clips that exist are not made again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyworld
import soundfile
from prepare import Row, write_rows
from synthesise import SAMPLE_RATE_HZ
from tqdm import tqdm

from model.data.audio import load_audio

FRAME_MS = 5.0
LOWEST_PITCH_HZ, HIGHEST_PITCH_HZ = 80.0, 300.0
MIDDLE_PITCH_HZ = 150.0  # where a clip without any voiced frame is taken to lie
# Women's formants lie about 17 % above men's, their pitch about 80 %: 1.8 ** 0.27 is 1.17.
FORMANTS_PER_PITCH = 0.27
SMALLEST_FORMANT_RATIO, LARGEST_FORMANT_RATIO = 0.78, 1.28
PEAK = 0.5


@dataclass(frozen=True, slots=True)
class NewVoice:
    """Whose voice a copy has.

    Attributes:
        pitch_hz: median of its fundamental frequency.
        formant_jitter: factor on the formant ratio that goes with the pitch.
        intonation: factor on the pitch's distance from its median, in octaves.
        pace: factor on the speed.
    """

    pitch_hz: float
    formant_jitter: float
    intonation: float
    pace: float


def draw_voice(rng: random.Random) -> NewVoice:
    """A voice at random."""
    return NewVoice(
        pitch_hz=math.exp(rng.uniform(math.log(LOWEST_PITCH_HZ), math.log(HIGHEST_PITCH_HZ))),
        formant_jitter=rng.uniform(0.92, 1.08),
        intonation=rng.uniform(0.6, 1.4),
        pace=rng.uniform(0.8, 1.3),
    )


def formant_ratio(voice: NewVoice, old_pitch_hz: float) -> float:
    """How much higher the new voice's formants lie than those of a voice of the given pitch."""
    ratio = (voice.pitch_hz / old_pitch_hz) ** FORMANTS_PER_PITCH * voice.formant_jitter
    return min(max(ratio, SMALLEST_FORMANT_RATIO), LARGEST_FORMANT_RATIO)


def change_voice(waveform: np.ndarray, voice: NewVoice) -> np.ndarray:
    """Resynthesise speech in another voice.

    Args:
        waveform: (samples,), mono at 16 kHz.
        voice: the one to speak with.

    Returns:
        (samples / pace,) float32.
    """
    samples = np.ascontiguousarray(waveform, dtype=np.float64)
    pitch_hz, times_s = pyworld.dio(samples, SAMPLE_RATE_HZ, frame_period=FRAME_MS)
    pitch_hz = pyworld.stonemask(samples, pitch_hz, times_s, SAMPLE_RATE_HZ)
    envelope = pyworld.cheaptrick(samples, pitch_hz, times_s, SAMPLE_RATE_HZ)
    aperiodicity = pyworld.d4c(samples, pitch_hz, times_s, SAMPLE_RATE_HZ)

    voiced = pitch_hz > 0
    old_median_hz = float(np.median(pitch_hz[voiced])) if voiced.any() else MIDDLE_PITCH_HZ
    new_pitch_hz = np.zeros_like(pitch_hz)
    octaves = np.log2(pitch_hz[voiced] / old_median_hz) * voice.intonation
    new_pitch_hz[voiced] = voice.pitch_hz * 2.0**octaves

    bins = np.arange(envelope.shape[1]) / formant_ratio(voice, old_median_hz)
    envelope = _sample_bins(envelope, bins)
    aperiodicity = _sample_bins(aperiodicity, bins)
    spoken = pyworld.synthesize(
        new_pitch_hz, envelope, aperiodicity, SAMPLE_RATE_HZ, FRAME_MS / voice.pace
    )
    peak = max(float(np.abs(spoken).max()), 1e-3)
    return (spoken * (PEAK / peak)).astype(np.float32)


def _sample_bins(spectra: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """Spectra (frames, bins) at fractional bins; beyond the last, the last."""
    bins = np.minimum(bins, spectra.shape[1] - 1)
    below = bins.astype(int)
    above = np.minimum(below + 1, spectra.shape[1] - 1)
    share = bins - below
    mixed = spectra[:, below] * (1 - share) + spectra[:, above] * share
    return np.ascontiguousarray(mixed)


def make_copies(row: Row, folder: Path, copies: int, seed: int) -> list[Row]:
    """Write a recording's copies and describe them."""
    waveform = load_audio(Path(row["audio"]))
    made = []
    for number in range(copies):
        name = hashlib.sha256(f"{seed} {number} {row['audio']}".encode()).hexdigest()[:16]
        path = folder / f"{name}.flac"
        if not path.exists():
            voice = draw_voice(random.Random(name))  # noqa: S311 - a recipe, no secret
            partial_path = path.with_suffix(".part")
            spoken = change_voice(waveform, voice)
            soundfile.write(partial_path, spoken, SAMPLE_RATE_HZ, format="FLAC")
            partial_path.replace(path)
        duration_s = soundfile.info(path).duration
        copy = {**row, "audio": str(path.resolve()), "duration": duration_s}
        made.append({**copy, "speaker": f"{row.get('speaker')}/{name}"})
    return made


def main() -> None:
    """Write the copies and their manifest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--manifest", type=Path, required=True, help="with absolute audio paths")
    parser.add_argument("--audio-dir", type=Path, required=True, help="folder for the copies")
    parser.add_argument("--output", type=Path, required=True, help="manifest to write")
    parser.add_argument("--copies", type=int, default=3, help="of each recording")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    options.audio_dir.mkdir(parents=True, exist_ok=True)
    with options.manifest.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    copy = partial(make_copies, folder=options.audio_dir, copies=options.copies, seed=options.seed)
    with ProcessPoolExecutor(options.jobs) as pool:
        made = list(tqdm(pool.map(copy, rows, chunksize=8), total=len(rows), unit="clip"))
    write_rows(options.output, [row for copies in made for row in copies])


if __name__ == "__main__":
    main()
