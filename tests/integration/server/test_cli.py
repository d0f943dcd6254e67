"""`speechllm` as a command line, in this process."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from model.transcription import Transcriber
from server.cli import app
from server.settings import Settings
from tests.conftest import make_tiny_checkpoint
from tests.recordings import encode, speechlike


@pytest.fixture(scope="module")
def run():
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def recording(tmp_path):
    path = tmp_path / "speech.m4a"
    path.write_bytes(encode(speechlike(1.0), form="m4a"))
    return path


def test_help_needs_no_torch():
    code = (
        "import sys, server.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_version_is_told(run):
    assert run("--version").output.startswith("speechllm ")


def test_every_group_of_commands_is_there(run):
    text = run("--help").stdout
    groups = ("data", "train", "cache", "lexicon", "evaluate", "compare", "serve", "transcribe")
    for command in (*groups, "parity", "info"):
        assert f" {command} " in text, command


def test_serve_has_a_flag_for_every_setting(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = run("serve", "--help").stdout
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')} " in text, name


def transcribe(run, model, *arguments):
    return run("transcribe", *arguments, "--model", model, "--device", "cpu")


def test_transcribe_prints_lines_of_json(run, tiny_checkpoint, recording):
    ended = transcribe(run, tiny_checkpoint, recording, "--format", "jsonl")
    assert ended.exit_code == 0, ended.output
    line = json.loads(ended.stdout)
    assert line["file"] == str(recording)
    assert line["text"]
    assert line["duration"] == pytest.approx(1.0, abs=0.13)
    assert set(line) == {"file", "text", "language", "duration", "timings"}


def test_transcribe_tells_of_a_setting_that_cannot_be(run, recording, monkeypatch):
    ended = run("transcribe", recording, "--device", "gpu")
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: --device / SPEECHLLM_DEVICE: ")
    for name, value in (("PORT", "tcp://10.0.0.1:8000"), ("API_KEYS", "short")):
        with monkeypatch.context() as patch:
            patch.setenv(f"SPEECHLLM_{name}", value)
            ended = run("transcribe", recording)
        assert ended.exit_code == 2
        assert f" / SPEECHLLM_{name}: " in ended.stderr


def test_transcribe_goes_on_after_a_bad_file_and_reports_it(
    run, tiny_checkpoint, recording, tmp_path
):
    letter = tmp_path / "letter.txt"
    letter.write_text("Dear Sir or Madam")
    missing = tmp_path / "missing.wav"
    ended = transcribe(run, tiny_checkpoint, letter, missing, recording)
    assert ended.exit_code == 1
    assert f"error: {letter}: the file is not audio" in ended.stderr
    assert f"error: {missing}: No such file" in ended.stderr
    assert ended.stderr.endswith("error: 2 of 3 recordings failed\n")
    assert ended.stdout.startswith(f"{recording}: ")


def test_transcribe_writes_files_and_goes_on_where_it_was(
    run, tiny_checkpoint, recording, tmp_path, monkeypatch
):
    output = tmp_path / "out"
    arguments = [recording, "--format", "srt", "--output", output]
    assert transcribe(run, tiny_checkpoint, *arguments).exit_code == 0
    written = output / "speech.srt"
    assert written.read_text().startswith("1\n00:00:00,")
    written.write_text("kept")
    again = transcribe(run, tiny_checkpoint, *arguments)
    assert (again.exit_code, written.read_text()) == (0, "kept")
    assert "1 recordings are transcribed already" in again.stderr
    assert transcribe(run, tiny_checkpoint, *arguments, "--overwrite").exit_code == 0
    assert written.read_text() != "kept"


def test_transcribe_reads_standard_input(tiny_checkpoint, recording):
    command = [sys.executable, "-m", "server.cli", "transcribe", "-", "--format", "verbose_json"]
    ended = subprocess.run(
        [*command, "--model", str(tiny_checkpoint), "--device", "cpu"],
        input=recording.read_bytes(), capture_output=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["task"] == "transcribe"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["{0}", "{0}/../other.wav", "--format", "srt"], "several recordings in srt need --output"),
        (["{0}", "--language", "fr"], "the language 'fr' is none of this checkpoint's: en, mn"),
        (["{0}", "--language", "french"], "the field 'language'"),
        (["{0}", "--server", "http://127.0.0.1:1"], "leave out --model"),
        (["{0}.d/*.wav"], "no file matches"),
        ([], "Missing argument"),
    ],
)
def test_bad_usage_of_transcribe_is_status_2(run, tiny_checkpoint, recording, arguments, reason):
    filled = [each.format(recording) for each in arguments]
    ended = transcribe(run, tiny_checkpoint, *filled)
    assert ended.exit_code == 2, ended.output
    assert reason in ended.stderr


def test_a_server_that_is_not_there_is_one_clear_line(run, recording):
    ended = run("transcribe", recording, "--server", "http://127.0.0.1:1")
    assert ended.exit_code == 1
    assert ended.stderr.startswith("error: http://127.0.0.1:1: cannot connect")
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--server", "http://127.0.0.1:abc"], "is no address of a server"),
        (["--server", "http://127.0.0.1:1", "--api-key", "é"], "no header can carry"),
    ],
)
def test_what_cannot_be_a_server_or_a_key_is_status_2(run, recording, options, reason):
    ended = run("transcribe", recording, *options)
    assert ended.exit_code == 2
    assert reason in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_info_describes_a_checkpoint(run, tiny_checkpoint):
    ended = run("info", "--model", tiny_checkpoint, "--device", "cpu")
    assert ended.exit_code == 0, ended.output
    description = json.loads(ended.stdout)
    model = Transcriber.from_pretrained(tiny_checkpoint, "cpu").model
    assert description["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert description["max_audio_s"] == 30.0


@pytest.mark.parametrize("command", ["transcribe", "info"])
def test_a_missing_checkpoint_is_one_clear_line(run, command, tmp_path, recording, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    files = [recording] if command == "transcribe" else []
    ended = run(command, *files, "--model", tmp_path / "nothing")
    assert ended.exit_code == (2 if command == "transcribe" else 1)
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    assert str(tmp_path / "nothing") in line


def test_a_lexicon_is_made_of_texts(run, tmp_path):
    checkpoint, text = tmp_path / "checkpoint", tmp_path / "text.txt"
    make_tiny_checkpoint(checkpoint, ctc_decoding_weight=0.3)
    manifest = tmp_path / "train.jsonl"
    text.write_text("Where did you, where?\nӨндөр.\n", encoding="utf-8")
    manifest.write_text(json.dumps({"audio": "a.wav", "text": "you find"}) + "\n")

    def lexicon(*more):
        return run("lexicon", "--model", checkpoint, "--text", text, "--text", manifest, *more)

    ended = lexicon("--penalty", 2.5)
    assert ended.output == f"5 words in {checkpoint / 'lexicon.txt'}\n"
    told = json.loads(run("info", "--model", checkpoint, "--device", "cpu").stdout)
    assert (told["lexicon_words"], told["lexicon_penalty"]) == (5, 2.5)
    assert lexicon("--min-count", 2).output.startswith("2 words")
    assert (checkpoint / "lexicon.txt").read_text() == "where\nyou\n"
    ended = lexicon("--min-count", 3)
    assert (ended.exit_code, ended.output) == (1, "error: no word stands 3 times in the text\n")
    ended = lexicon("--penalty", 0)
    assert (ended.exit_code, "the penalty must be above 0" in ended.output) == (1, True)
    assert (checkpoint / "lexicon.txt").read_text() == "where\nyou\n"
    ended = run("lexicon", "--model", tmp_path, "--text", text)
    assert (ended.exit_code, "is this a checkpoint folder?" in ended.output) == (1, True)
    ended = run("lexicon", "--model", checkpoint, "--text", tmp_path / "none.txt")
    assert (ended.exit_code, "none.txt" in ended.output) == (1, True)
