"""`speechllm` as a command line, in this process."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from model.transcription import Transcriber
from server.cli import app
from server.settings import Settings
from tests.recordings import encode, tone


@pytest.fixture(scope="module")
def run():
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def recording(tmp_path):
    path = tmp_path / "tone.m4a"
    path.write_bytes(encode(tone(1.0), form="m4a"))
    return path


def test_help_needs_no_torch():
    code = (
        "import sys, server.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_group_of_commands_is_there(run):
    text = run("--help").stdout
    for command in ("data", "train", "cache", "evaluate", "compare", "serve", "transcribe", "info"):
        assert f" {command} " in text, command


def test_serve_has_a_flag_for_every_setting(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = run("serve", "--help").stdout
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')} " in text, name


def test_transcribe_prints_what_the_model_says(run, tiny_checkpoint, recording):
    ended = run("transcribe", recording, "--model", tiny_checkpoint, "--device", "cpu", "--json")
    assert ended.exit_code == 0, ended.output
    line = json.loads(ended.stdout)
    assert line["file"] == str(recording)
    assert line["duration"] == pytest.approx(1.0, abs=0.13)
    assert set(line) == {"file", "text", "language", "duration", "finish_reason"}


def test_transcribe_goes_on_after_a_bad_file_and_reports_it(
    run, tiny_checkpoint, recording, tmp_path
):
    letter = tmp_path / "letter.txt"
    letter.write_text("Dear Sir or Madam")
    missing = tmp_path / "missing.wav"
    ended = run("transcribe", letter, missing, recording, "--model", tiny_checkpoint)
    assert ended.exit_code == 1
    assert f"error: {letter}: the file is not audio" in ended.stderr
    assert f"error: {missing}: No such file" in ended.stderr
    assert ended.stdout.startswith(f"{recording}: ")


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
    assert ended.exit_code == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    assert str(tmp_path / "nothing") in line
