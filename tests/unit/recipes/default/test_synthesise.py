"""The plan is what keeps training and test apart; the engines are run for real where installed."""

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile

from model.data.manifest import read_manifest

LETTERS = "абвгдежзийклмноөпрстуүфхцчшщ"


def numbered(alphabet: str, count: int, template: str) -> list[str]:
    """`count` distinct sentences without digits."""
    size = len(alphabet)
    words = (alphabet[i % size] + alphabet[i // size % size] * 2 for i in range(count))
    return [template.format(word) for word in words]


@pytest.fixture
def plan(synthesise: ModuleType) -> list:
    english = numbered("abcdefghijklmnopqrstuvwxyz", 400, "The word {} is spoken here.")
    mongolian = numbered(LETTERS, 400, "Энэ бол {} гэсэн үг.")
    return synthesise.make_plan(english, mongolian, 250, 150, seeded(1))


def seeded(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - plans, no secrets


def texts(plan: list, *splits: str) -> set[str]:
    return {task.text for task in plan if task.split in splits}


def variant(task: object) -> str:
    return task.voice.name.partition("+")[2]


def write_texts(folder: Path, english: list[str], mongolian: list[str]) -> None:
    folder.mkdir()
    (folder / "en.txt").write_text("\n".join(english) + "\n", encoding="utf-8")
    (folder / "mn.txt").write_text("\n".join(mongolian) + "\n", encoding="utf-8")


def write_held_out(synthesise: ModuleType, folder: Path, text: str) -> None:
    folder.mkdir()
    for name in synthesise.HELD_OUT_MANIFESTS:
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")


def run(recipe: Path, work: Path, *options: str, **keywords: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(recipe / "synthesise.py"), "--text-dir", str(work / "text")]
    command += ["--manifests", str(work / "manifests"), "--output", str(work / "out"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, **keywords)


def test_same_seed_gives_the_same_plan_and_another_seed_another(synthesise: ModuleType) -> None:
    english = numbered("abcdefghijklmnopqrstuvwxyz", 200, "The word {} is spoken here.")
    mongolian = numbered(LETTERS, 300, "Энэ бол {} гэсэн үг.")
    plans = [synthesise.make_plan(english, mongolian, 80, 50, seeded(seed)) for seed in (1, 1, 2)]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]


def test_plan_holds_as_many_clips_as_asked_for(plan: list, synthesise: ModuleType) -> None:
    sizes = {split: sum(task.split == split for task in plan) for split in ("en_dev", "mn_dev")}
    assert sizes == {"en_dev": synthesise.N_ENGLISH_DEV, "mn_dev": synthesise.N_MONGOLIAN_DEV}
    assert sum(t.split == "mn_test" for t in plan) == synthesise.N_MONGOLIAN_TEST
    train = [task for task in plan if task.split == "train"]
    assert len(train) == synthesise.N_DIGIT_STRINGS + 250 + 150
    assert sum(task.language == "mn" for task in train) == 150
    assert [task.number for task in plan] == list(range(len(plan)))


def test_dev_and_test_sentences_are_never_trained_on(plan: list) -> None:
    splits = [texts(plan, split) for split in ("train", "en_dev", "mn_dev", "mn_test")]
    assert all(splits)
    assert len(set.union(*splits)) == sum(map(len, splits))


def test_sentences_repeat_only_where_there_are_too_few(synthesise: ModuleType) -> None:
    mongolian = numbered(LETTERS, 220, "Энэ бол {} гэсэн үг.")
    plan = synthesise.make_plan([], mongolian, 0, 25, seeded(1))
    spoken = [task.text for task in plan if task.split == "train" and task.language == "mn"]
    assert spoken == [*mongolian[210:], *mongolian[210:], *mongolian[210:215]]


def test_variants_of_the_mongolian_test_are_unseen_in_training(plan: list) -> None:
    trained = {variant(task) for task in plan if task.split == "train"}
    tested = {variant(task) for task in plan if task.split in {"mn_dev", "mn_test"}}
    assert tested == {"f4", "f5", "m8"}
    assert not trained & tested


def test_mongolian_is_read_by_kazakh_tatar_and_bashkir_only(plan: list) -> None:
    voices = {task.voice.name.partition("+")[0] for task in plan if task.language == "mn"}
    assert voices == {"kk", "tt", "ba"}


def test_recorded_voices_speak_most_of_the_english(synthesise: ModuleType) -> None:
    rng = seeded(1)
    names = [synthesise.english_voice(rng).name for _ in range(4000)]
    recorded = sum(name in {"rms", "awb", "slt"} for name in names) / len(names)
    diphone = sum(name in {"kal", "kal16"} for name in names) / len(names)
    assert recorded == pytest.approx(0.62, abs=0.03)
    assert diphone == pytest.approx(0.12, abs=0.03)


def test_digit_strings_are_one_to_eight_digit_words(plan: list, synthesise: ModuleType) -> None:
    strings = [
        words
        for task in plan
        if task.split == "train" and set(words := task.text.split()) <= set(synthesise.DIGITS)
    ]
    assert len(strings) == synthesise.N_DIGIT_STRINGS
    assert {len(words) for words in strings} == set(range(1, 9))
    assert {word for words in strings for word in words} == set(synthesise.DIGITS)


def test_orders_come_last_and_say_each_slot_once(tmp_path: Path, synthesise: ModuleType) -> None:
    slots = {"size": "eight ounce", "coffeeDrink": "iced mocha", "milkAmount": " soy milk"}
    (tmp_path / "picovoice_slots.jsonl").write_text(
        f"{json.dumps({'slots': slots})}\n{json.dumps({'slots': {'roast': 'dark roast'}})}\n"
    )
    orders = synthesise.read_orders(tmp_path, seeded(1))
    assert len(orders) == 2
    assert all(orders[0].lower().count(value.strip()) == 1 for value in slots.values())
    assert "dark roast coffee" in orders[1].lower()
    plan = synthesise.make_plan([], [], 0, 0, seeded(1), tuple(orders))
    assert [task.text for task in plan[-2:]] == orders


def test_without_recorded_orders_none_are_spoken(tmp_path: Path, synthesise: ModuleType) -> None:
    assert synthesise.read_orders(tmp_path, seeded(1)) == []


@pytest.mark.parametrize(
    "unspeakable",
    [
        "There were 3 of them here.",
        "Too short",
        "The word is repeated " + "again and " * 12 + "again.",
        "Write to me @ the office.",
        "-Where are you going?",
    ],
    ids=["digits", "short", "long", "symbol", "looks-like-an-option"],
)
def test_sentences_that_would_be_misspoken_are_skipped(
    unspeakable: str, tmp_path: Path, synthesise: ModuleType
) -> None:
    if unspeakable == "Too short":
        unspeakable = "x" * (synthesise.SHORTEST_TEXT - 1)
    path = tmp_path / "en.txt"
    path.write_text(f"{unspeakable}\nWhere is “my” shoe, then?\n", encoding="utf-8")
    sentences = synthesise.read_sentences(path, set(), seeded(1))
    assert sentences == ["Where is “my” shoe, then?"]


def test_a_held_out_sentence_is_known_by_its_words(tmp_path: Path, synthesise: ModuleType) -> None:
    write_held_out(synthesise, tmp_path / "manifests", "Also, she wouldn't walk.")
    held_out = synthesise.held_out_sentences(tmp_path / "manifests")
    path = tmp_path / "en.txt"
    path.write_text("ALSO she wouldn’t walk!\nAlso, he would walk.\n", encoding="utf-8")
    sentences = synthesise.read_sentences(path, held_out, seeded(1))
    assert sentences == ["Also, he would walk."]


def test_shared_text_holds_no_human_test_sentence_once_read(
    shared_data: Path, synthesise: ModuleType
) -> None:
    held_out = synthesise.held_out_sentences(shared_data / "manifests")
    text = shared_data / "text" / "en.txt"
    sentences = synthesise.read_sentences(text, held_out, seeded(1))
    assert len(sentences) > 40_000
    # A comparison that is blind to spaces too, unlike the script's.
    letters = {"".join(filter(str.isalnum, text.lower())) for text in held_out}
    spoken = {"".join(filter(str.isalnum, sentence.lower())) for sentence in sentences}
    assert not letters & spoken


@pytest.fixture(scope="module")
def engines() -> None:
    for engine in ("flite", "espeak-ng"):
        if shutil.which(engine) is None:
            pytest.skip(f"{engine} is not installed")


@pytest.mark.usefixtures("engines")
@pytest.mark.parametrize(
    ("engine", "name", "text"),
    [
        ("flite", "slt", "Where did you find that apple?"),
        ("flite", "kal", "Where did you find that apple?"),
        ("espeak-ng", "en-gb+f2", "Where did you find that apple?"),
        ("espeak-ng", "kk+m8", "Өнөөдөр хүйтэн байна, ёстой!"),
    ],
)
def test_a_clip_is_the_trimmed_sentence_at_16_khz(
    engine: str, name: str, text: str, tmp_path: Path, synthesise: ModuleType
) -> None:
    task = synthesise.Task(1042, "train", "en", text, synthesise.Voice(engine, name, (), 1.0))
    row = synthesise.speak(task, tmp_path)
    assert re.fullmatch(r"train/001/001042-[0-9a-f]{8}\.flac", row["audio"])
    assert row["text"] == text
    assert row["speaker"] == f"{engine}:{name}"
    waveform, rate_hz = soundfile.read(tmp_path / row["audio"])
    assert (rate_hz, waveform.ndim) == (16_000, 1)
    assert len(waveform) / rate_hz == pytest.approx(row["duration"], abs=0.001)
    assert 0.03 < row["duration"] / len(text) < 0.15
    assert np.abs(waveform).max() == pytest.approx(0.5, abs=0.01)
    edge = int(0.2 * rate_hz)
    assert np.abs(waveform[:edge]).max() > 0.005
    assert np.abs(waveform[-edge:]).max() > 0.005
    assert list(tmp_path.rglob("*.*")) == [tmp_path / row["audio"]]


@pytest.mark.usefixtures("engines")
def test_another_plan_in_the_same_folder_takes_no_clip_for_its_own(
    tmp_path: Path, synthesise: ModuleType
) -> None:
    voice = synthesise.Voice("flite", "kal16", (), 1.0)
    rows = [
        synthesise.speak(synthesise.Task(0, "train", "en", text, voice), tmp_path)
        for text in ("Where is it?", "Where did you find that apple?", "Where is it?")
    ]
    assert rows[0] == rows[2]
    assert rows[0]["audio"] != rows[1]["audio"]
    assert rows[0]["duration"] < rows[1]["duration"]


@pytest.mark.usefixtures("engines")
def test_a_shift_above_one_raises_the_voice_and_shortens_the_clip(
    tmp_path: Path, synthesise: ModuleType
) -> None:
    durations = []
    for number, shift in enumerate((1.0, 1.2)):
        voice = synthesise.Voice("flite", "kal16", (), shift)
        task = synthesise.Task(number, "train", "en", "Where did you find that apple?", voice)
        durations.append(synthesise.speak(task, tmp_path)["duration"])
    assert durations[0] / durations[1] == pytest.approx(1.2, abs=0.08)


@pytest.mark.usefixtures("engines")
def test_a_text_that_comes_out_silent_gives_no_clip(tmp_path: Path, synthesise: ModuleType) -> None:
    voice = synthesise.Voice("espeak-ng", "en-us", (), 1.0)
    task = synthesise.Task(0, "train", "en", "... ... ...", voice)
    assert synthesise.speak(task, tmp_path) is None
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.usefixtures("engines")
def test_a_killed_run_is_resumed_without_speaking_again(
    tmp_path: Path, recipe: Path, synthesise: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_texts(
        tmp_path / "text", ["Where is my shoe?", "Please shut the door."], ["Нягтлан ирэв."]
    )
    write_held_out(synthesise, tmp_path / "manifests", "Please, shut the door!")
    # The real script, main() and all, only with few digit strings: each costs a second.
    monkeypatch.setattr(synthesise, "N_DIGIT_STRINGS", 3)
    monkeypatch.setattr(synthesise, "N_ENGLISH_DEV", 0)
    monkeypatch.setattr(synthesise, "N_MONGOLIAN_TEST", 0)
    monkeypatch.setattr(synthesise, "N_MONGOLIAN_DEV", 0)
    arguments = ["--text-dir", "text", "--manifests", "manifests", "--output", "out"]
    arguments += ["--jobs", "1", "--english", "2", "--mongolian", "1"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["synthesise.py", *arguments])

    synthesise.main()
    manifest = tmp_path / "out" / "train.jsonl"
    first = manifest.read_bytes()
    utterances = read_manifest(manifest)
    assert [u.text for u in utterances[3:]] == ["Нягтлан ирэв."] + ["Where is my shoe?"] * 2
    lost, kept = utterances[0].audio, utterances[1].audio
    spoken, stamp = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    manifest.unlink()

    synthesise.main()
    assert manifest.read_bytes() == first
    assert lost.read_bytes() == spoken
    assert kept.stat().st_mtime_ns == stamp


def test_a_missing_engine_is_named(tmp_path: Path, recipe: Path) -> None:
    result = run(recipe, tmp_path, env={"PATH": str(tmp_path)})
    assert result.returncode == 1
    assert result.stderr == "error: flite is not installed; it is a Debian package of that name\n"
