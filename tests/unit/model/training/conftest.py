"""Short clips on disk, and a small speech LLM to train on them."""

import numpy as np
import pytest
import soundfile

from model.checkpoint import load_model, load_processor
from model.data.manifest import Utterance
from tests.conftest import SENTENCES, make_tiny_checkpoint

RATE_HZ = 16_000


@pytest.fixture(scope="session")
def utterances(tmp_path_factory):
    """Eight clips of a tone and noise, 0.4 to 1.1 s; the last one is non-speech."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    found = []
    for number in range(8):
        seconds = 0.4 + 0.1 * number
        times = np.arange(round(RATE_HZ * seconds)) / RATE_HZ
        waveform = 0.3 * np.sin(2 * np.pi * (200 + 150 * number) * times)
        waveform += 0.02 * rng.standard_normal(len(times))
        path = folder / f"{number}.wav"
        soundfile.write(path, waveform, RATE_HZ)
        text = SENTENCES[number % len(SENTENCES)] if number < 7 else ""
        found.append(Utterance(str(number), path, text, None, "en", seconds))
    return found


@pytest.fixture
def fresh_model(tmp_path):
    """Make a speech LLM and its processor; equal for every call with equal overrides."""

    def make(**overrides):
        folder = tmp_path / "-".join(["tiny", *map(str, overrides.values())])
        if not folder.exists():
            make_tiny_checkpoint(folder, **overrides)
        return load_model(folder), load_processor(folder)

    return make
