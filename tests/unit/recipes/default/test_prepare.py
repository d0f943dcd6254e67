"""What evaluation holds out stays out of training, in every file the recipe writes."""

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile

from model.data.manifest import read_manifest

RATE_HZ = 16_000
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def write_split(root: Path, manifest: Path, texts: list[str], rate_hz: int = RATE_HZ) -> None:
    """A manifest whose clips are 0.5 s tones."""
    tone = 0.1 * np.sin(np.arange(rate_hz // 2) / 5)
    rows = []
    for number, text in enumerate(texts):
        audio = Path("audio") / manifest.stem / f"{number}.flac"
        (root / audio).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(root / audio, tone, rate_hz)
        row = {"audio": str(audio), "text": text, "speaker": manifest.stem, "language": "en"}
        rows.append(json.dumps({**row, "duration": 0.5}) + "\n")
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text("".join(rows), encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recipe") / "data"
    human = {
        "kathleen_train": ["They are his tongue.", "Robbery and fraud they said."],
        "matthes_train": ["Printing differs from most arts."],
        "precise_train": ["aardvark"],
        "kathleen_dev": ["They were three hundred yards apart."],
        "kathleen_test": ["Also, she wouldn't walk."],
        "common_voice_en_dev": ["Look, the seam is broken."],
        "jfk_test": ["Ask not what your country can do."],
    }
    for name, texts in human.items():
        write_split(root, root / "manifests" / f"{name}.jsonl", texts)
    for name in ("fsdd_train", "fsdd_test"):
        write_split(root, root / "manifests" / f"{name}.jsonl", list(DIGITS), rate_hz=8000)
    (root / "noise").mkdir()
    rng = np.random.default_rng(1)
    for number in range(5, 10):
        noise = 0.1 * rng.standard_normal(RATE_HZ)
        soundfile.write(root / "noise" / f"bg_noise{number}.flac", noise, RATE_HZ)
    (root / "text").mkdir()
    english = "Where is my shoe?\nALSO SHE WOULDN’T WALK\nWe need more soap.\n"
    (root / "text" / "en.txt").write_text(english, encoding="utf-8")
    (root / "text" / "mn.txt").write_text("Нягтлан ирэв.\nХүйтэн байна!\n", encoding="utf-8")
    synthetic = root.parent / "synthetic"
    write_split(synthetic, synthetic / "train.jsonl", ["Where is my shoe?", "Нягтлан ирэв."])
    write_split(synthetic, synthetic / "en_dev.jsonl", ["We need more soap."] * 40)
    write_split(synthetic, synthetic / "mn_dev.jsonl", ["Хүйтэн байна."])
    write_split(synthetic, synthetic / "mn_test.jsonl", ["Өнөөдөр хүйтэн байна."])
    return root


def run_prepare(prepare: ModuleType, data: Path, output: Path) -> None:
    arguments = ["--data-dir", str(data), "--synthetic", str(data.parent / "synthetic")]
    with pytest.MonkeyPatch.context() as patch:
        # Each clip is a file to write; the counts of the recipe would take seconds.
        patch.setattr(prepare, "N_NOISE_TRAIN", 12)
        patch.setattr(prepare, "N_NOISE_TEST", 6)
        patch.setattr(prepare, "N_DIGIT_STRINGS", 8)
        patch.setattr(prepare, "N_DIGIT_STRINGS_TRAIN", 6)
        patch.setattr(sys, "argv", ["prepare.py", *arguments, "--output", str(output)])
        prepare.main()


@pytest.fixture(scope="module")
def prepared(data: Path, prepare: ModuleType) -> Path:
    output = data.parent / "prepared"
    run_prepare(prepare, data, output)
    return output


def test_every_manifest_is_readable_and_its_audio_exists(prepared: Path) -> None:
    names = ("common_voice_en_dev", "fsdd", "fsdd_strings", "jfk", "kathleen", "non_speech")
    expected = {"train", "train_human", "train_strings", "dev", "test_synthetic_mn"}
    expected |= {f"test_{name}" for name in names}
    manifests = {path.stem: read_manifest(path) for path in prepared.glob("*.jsonl")}
    assert set(manifests) == expected
    for utterances in manifests.values():
        for utterance in utterances:
            assert utterance.audio.is_absolute()
            info = soundfile.info(utterance.audio)
            assert info.duration == pytest.approx(utterance.duration, abs=0.001)


def test_training_is_the_human_clips_non_speech_and_synthetic_speech(prepared: Path) -> None:
    human = read_manifest(prepared / "train_human.jsonl")
    train = read_manifest(prepared / "train.jsonl")
    assert {u.speaker for u in human} == {
        "kathleen_train",
        "matthes_train",
        "fsdd_train",
        "precise_train",
    }
    assert train[: len(human)] == human
    assert [u.text for u in train[len(human) :]] == [""] * 12 + [
        "Where is my shoe?",
        "Нягтлан ирэв.",
    ]


def test_a_word_that_is_recorded_very_often_is_capped(prepare: ModuleType) -> None:
    rows = [{"text": "athena", "audio": number} for number in range(5)] + [{"text": "glass"}]
    assert prepare.cap_repeats(rows, 2) == [*rows[:2], rows[5]]


def test_no_dev_or_test_recording_is_trained_on(prepared: Path) -> None:
    train = {u.audio for u in read_manifest(prepared / "train.jsonl")}
    held_out = {
        u.audio
        for path in prepared.glob("*.jsonl")
        if not path.stem.startswith("train")
        for u in read_manifest(path)
    }
    assert held_out
    assert not train & held_out


def test_dev_is_human_and_synthetic_of_both_languages(prepared: Path) -> None:
    speakers = [u.speaker for u in read_manifest(prepared / "dev.jsonl")]
    assert speakers == ["kathleen_dev", *["en_dev"] * 30, "mn_dev"]


def test_lm_text_holds_no_held_out_sentence_of_the_collections(prepared: Path) -> None:
    lines = (prepared / "lm_text.txt").read_text(encoding="utf-8").splitlines()
    assert lines.count("Where is my shoe?") == 1
    assert lines.count("Нягтлан ирэв.") == 3
    assert "Printing differs from most arts." in lines
    assert not {"ALSO SHE WOULDN’T WALK", "We need more soap.", "Хүйтэн байна!"} & set(lines)


def test_noise_for_training_leaves_out_the_recordings_of_the_test(prepared: Path) -> None:
    names = {path.name for path in (prepared / "noise_train").iterdir()}
    assert names == {"bg_noise5.flac", "bg_noise6.flac", "bg_noise7.flac"}


def test_non_speech_is_the_same_for_a_seed_and_differs_between_training_and_test(
    data: Path, tmp_path: Path, prepare: ModuleType
) -> None:
    noises = [data / "noise" / "bg_noise5.flac"]
    clips = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        rows = prepare.non_speech(noises, tmp_path / name, 8, seed)
        assert {row["text"] for row in rows} == {""}
        assert all(0.5 <= row["duration"] <= 8 for row in rows)
        clips.append([Path(row["audio"]).read_bytes() for row in rows])
    assert clips[0] == clips[1]
    assert not set(clips[0]) & set(clips[2])


def test_a_digit_string_is_its_digits_with_gaps_between(prepared: Path) -> None:
    strings = read_manifest(prepared / "test_fsdd_strings.jsonl")
    assert len(strings) == 8
    for utterance in strings:
        words = utterance.text.split()
        assert 3 <= len(words) <= 8
        assert set(words) <= set(DIGITS)
        gaps_s = utterance.duration - 0.5 * len(words)
        assert 0.049 * (len(words) - 1) <= gaps_s <= 0.401 * (len(words) - 1)
        assert soundfile.info(utterance.audio).samplerate == RATE_HZ


def test_a_digit_string_is_said_by_one_speaker_and_the_speakers_take_turns(
    prepare: ModuleType, data: Path, tmp_path: Path
) -> None:
    rows = prepare.read_rows(data / "manifests" / "fsdd_train.jsonl", data)
    rows = [{**row, "speaker": "low" if number < 5 else "high"} for number, row in enumerate(rows)]
    strings = prepare.digit_strings(rows, tmp_path, 6, seed=1)
    assert [row["speaker"] for row in strings] == ["high", "low"] * 3
    for row in strings:
        own = DIGITS[5:] if row["speaker"] == "high" else DIGITS[:5]
        assert set(row["text"].split()) <= set(own)


def test_preparing_twice_gives_the_same_files(
    prepared: Path, data: Path, prepare: ModuleType
) -> None:
    def contents() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in prepared.rglob("*") if path.is_file()}

    before = contents()
    assert len(before) > 26
    run_prepare(prepare, data, prepared)
    assert contents() == before
