"""`speechllm data` on a synthetic Common Voice release of real MP3 files and on JSONL manifests."""

import json
import unicodedata

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from model.data.audio import load_audio
from model.data.manifest import read_manifest
from server.cli.data import app

HEADER = "client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender\taccents\tlocale\tsegment"
MP3_RATE_HZ = 32_000


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def read_report(path):
    return json.loads(path.read_text(encoding="utf-8"))


def write_clip(path, seconds=1.0, amplitude=0.1, rate_hz=MP3_RATE_HZ):
    noise = np.random.default_rng(0).normal(0, 1, int(seconds * rate_hz)) * amplitude
    soundfile.write(path, noise.clip(-1, 1), rate_hz)


def write_table(folder, split, rows):
    lines = [f"{client}\t{clip}\t{text}\t2\t0\t\t\t\tmn\t" for client, clip, text in rows]
    content = "\n".join([HEADER, *lines, ""])
    (folder / f"{split}.tsv").write_text(content, encoding="utf-8", newline="")


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    root = tmp_path_factory.mktemp("cv-corpus")
    folder = root / "mn"
    clips = folder / "clips"
    clips.mkdir(parents=True)
    for name, seconds in (("ok1", 1.0), ("ok2", 1.5), ("dev1", 1.0), ("long", 4.0), ("wrong", 2.0)):
        write_clip(clips / f"{name}.mp3", seconds)
    write_clip(clips / "silent.mp3", amplitude=0.0)
    write_clip(clips / "blank.mp3")
    (clips / "garbage.mp3").write_bytes(b"not an mp3")
    whole = (clips / "long.mp3").read_bytes()
    (clips / "cut.mp3").write_bytes(whole[: len(whole) // 2])
    train = [
        ("anna", "ok1.mp3", '"Ёстой хийх үү'),
        ("bold", "ok2.mp3", unicodedata.normalize("NFD", "Тэр  «за» гэв, йод.")),
        ("anna", "long.mp3", "урт"),
        ("anna", "wrong.mp3", "буруу"),
        ("anna", "silent.mp3", "чимээгүй"),
        ("anna", "blank.mp3", " "),
        ("anna", "garbage.mp3", "эвдэрсэн"),
        ("anna", "cut.mp3", "тасарсан"),
        ("anna", "missing.mp3", "байхгүй"),
    ]
    dev = [("bold", "dev1.mp3", "сайн")]
    write_table(folder, "train", train)
    write_table(folder, "dev", dev)
    write_table(folder, "validated", train + dev)
    durations = "clip\tduration[ms]\nok1.mp3\t1000\nwrong.mp3\t9000\n"
    (folder / "clip_durations.tsv").write_text(durations)
    return root


COMMON_VOICE_TRAIN_FAULTS = {
    "long": "too long",
    "wrong": "duration mismatch",
    "silent": "empty",
    "blank": "no text",
    "garbage": "unreadable",
    "cut": "unreadable",
    "missing": "unreadable",
}


def test_common_voice_becomes_a_checked_manifest_and_a_report_of_what_was_dropped(
    release, tmp_path
):
    output = tmp_path / "lists" / "train.jsonl"
    outcome = run(
        "common-voice", release, "--split", "train", "--language", "mn", "--output", output,
        "--max-duration", "3",
    )  # fmt: skip
    assert outcome.exit_code == 0, outcome.output
    first, second = read_manifest(output)
    assert (first.text, second.text) == ('"Ёстой хийх үү', "Тэр «за» гэв, йод.")
    assert (first.id, first.speaker, first.language) == ("ok1", "anna", "mn")
    assert first.duration == pytest.approx(len(load_audio(first.audio)) / 16_000, abs=1e-3)

    report = read_report(tmp_path / "lists" / "train.report.json")
    dropped = {entry["id"]: entry["reason"] for entry in report["dropped_utterances"]}
    assert dropped == COMMON_VOICE_TRAIN_FAULTS
    assert report["dropped"]["unreadable"] == 3
    assert report["kept"] == {"utterances": 2, "hours": round(2.5 / 3600, 4), "speakers": 2}
    assert report["warnings"] == []
    assert "dropped: unreadable" in outcome.stdout
    assert str(output) in outcome.stdout


def test_several_splits_count_each_clip_once_and_warn_of_shared_speakers(release, tmp_path):
    output = tmp_path / "all.jsonl"
    outcome = run(
        "common-voice", release / "mn", "--split", "train", "--split", "dev", "--language", "mn",
        "--output", output,
    )  # fmt: skip
    assert outcome.exit_code == 0, outcome.output
    report = read_report(tmp_path / "all.report.json")
    assert {name: split["utterances"] for name, split in report["splits"].items()} == {
        "train": 3,
        "dev": 1,
    }
    assert report["warnings"] == ["1 speaker is in both train and dev"]
    assert "warning: 1 speaker is in both train and dev" in outcome.stdout


def test_all_splits_keep_a_clip_of_validated_under_the_split_it_belongs_to(release, tmp_path):
    output = tmp_path / "all.jsonl"
    outcome = run(
        "common-voice", release, "--split", "all", "--language", "mn", "--output", output
    )  # fmt: skip
    assert outcome.exit_code == 0, outcome.output
    report = read_report(tmp_path / "all.report.json")
    assert report["kept"]["utterances"] == len(read_manifest(output)) == 4
    assert report["splits"]["validated"]["utterances"] == 0
    assert report["dropped"]["duplicate id"] == 10


def test_release_next_to_its_manifest_can_be_moved_together(release, tmp_path):
    output = release / "dev.jsonl"
    run("common-voice", release, "--split", "dev", "--language", "mn", "--output", output)
    assert json.loads(output.read_text(encoding="utf-8"))["audio"] == "mn/clips/dev1.mp3"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"folder": "nowhere"}, "nowhere: no such folder"),
        ({"--split": "test"}, "has no test split, only train, dev, validated"),
        ({"--language": "en"}, "no Common Voice release"),
        ({"--output": "."}, "is a folder"),
    ],
)
def test_bad_common_voice_usage_is_one_line_and_exit_code_2(
    release, tmp_path, monkeypatch, changes, fault
):
    monkeypatch.chdir(tmp_path)
    options = {"--split": "train", "--language": "mn", "--output": "out.jsonl"} | changes
    folder = options.pop("folder", release)
    outcome = run("common-voice", folder, *(part for pair in options.items() for part in pair))
    assert outcome.exit_code == 2
    (line,) = outcome.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert fault in line
    assert not (tmp_path / "out.jsonl").exists()


@pytest.fixture
def recordings(tmp_path):
    """A manifest like those people keep: audio below a root beside it, some of it faulty."""
    audio = tmp_path / "audio"
    audio.mkdir()
    for name in ("a.flac", "b.ogg", "c.wav", "d.wav"):
        write_clip(audio / name, rate_hz=16_000)
    write_clip(audio / "silence.wav", amplitude=0.0, rate_hz=16_000)
    rows = [
        {"audio": "audio/a.flac", "text": "zero", "duration": 1.0, "licence": "CC0-1.0"},
        {"audio": "audio/b.ogg", "text": "one", "speaker": "x"},
        {"audio": "audio/c.wav", "text": None, "duration": 1.0, "intent": "order"},
        {"audio": "audio/d.wav", "text": "late", "duration": 2.0},
        {"audio": "audio/silence.wav", "text": "", "duration": 1.0},
    ]
    source = tmp_path / "manifests" / "in.jsonl"
    source.parent.mkdir()
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return source


@pytest.mark.parametrize(
    ("options", "texts"),
    [([], ["zero", "one", ""]), (["--keep-unlabelled"], ["zero", "one", None, ""])],
)
def test_manifest_is_checked_and_its_durations_are_measured(recordings, tmp_path, options, texts):
    output = tmp_path / "out.jsonl"
    outcome = run(
        "manifest", recordings, "--audio-root", tmp_path, "--output", output, *options
    )  # fmt: skip
    assert outcome.exit_code == 0, outcome.output
    utterances = read_manifest(output)
    assert [utterance.text for utterance in utterances] == texts
    assert all(utterance.duration == pytest.approx(1.0, abs=0.01) for utterance in utterances)
    report = read_report(tmp_path / "out.report.json")
    assert report["dropped"]["duration mismatch"] == 1
    assert report["dropped"].get("no text", 0) == (0 if options else 1)


def test_nothing_left_is_a_failure_that_writes_the_report_alone(recordings, tmp_path):
    output = tmp_path / "out.jsonl"
    outcome = run("manifest", recordings, "--output", output)  # the audio root is missing
    assert outcome.exit_code == 1
    assert "no utterance is usable" in outcome.stderr
    assert "; the first one: " in outcome.stderr
    assert not output.exists()
    report = read_report(tmp_path / "out.report.json")
    assert report["manifest"] is None
    assert report["dropped"]["unreadable"] == 4


def test_malformed_manifest_is_refused_by_line(recordings, tmp_path):
    with recordings.open("a") as file:
        file.write('{"audio": 5}\n')
    outcome = run("manifest", recordings, "--output", tmp_path / "out.jsonl")
    assert outcome.exit_code == 2
    assert "in.jsonl, line 6: audio must be a string" in outcome.stderr


def test_manifest_is_not_overwritten_by_its_own_check(recordings):
    before = recordings.read_bytes()
    outcome = run("manifest", recordings, "--output", recordings)
    assert outcome.exit_code == 2
    assert recordings.read_bytes() == before


def test_shared_recordings_pass(shared_data, tmp_path):
    output = tmp_path / "out.jsonl"
    source = shared_data / "manifests" / "kathleen_dev.jsonl"
    outcome = run("manifest", source, "--audio-root", shared_data, "--output", output)
    assert outcome.exit_code == 0, outcome.output
    assert len(read_manifest(output)) == len(read_manifest(source, shared_data))
