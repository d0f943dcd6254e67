"""`speechllm parity` on a small real model."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from server import parity
from server.cli import app
from server.engine.decoding import Token
from server.engine.runner import SpeechRunner
from tests.recordings import encode
from tests.speech_models import noise

SECONDS = (0.5, 3.0, 1.2, 2.2)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    lines = []
    for index, seconds in enumerate(SECONDS):
        (folder / f"{index}.wav").write_bytes(encode(noise(seconds, index).clip(-1, 1)))
        text = {"text": "zero one two"} if index else {}
        lines.append(json.dumps({"audio": f"{index}.wav", "duration": seconds, **text}))
    path = folder / "manifest.jsonl"
    path.write_text("\n".join(lines))
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["parity", "--device", "cpu", *map(str, arguments)])


@pytest.fixture
def searching(tiny_checkpoint, tmp_path):
    """A checkpoint that wants beams."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "searching")
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_beams": 3}))
    return folder


def test_what_is_compared_is_the_checkpoint_s_own_search(tiny_checkpoint, searching, manifest):
    def measure(model, *arguments):
        ended = run("--model", model, "--manifest", manifest, "--json", *arguments)
        assert ended.exit_code == 0, ended.output
        ways = json.loads(ended.stdout)["ways"]
        engine = [way for way in ways if way["name"].startswith("engine")]
        assert [way["differing"] for way in engine] == [[], []]
        return engine[0]["wer"]

    searched = measure(searching)
    assert searched == measure(tiny_checkpoint, "--num-beams", 3)
    assert measure(searching, "--num-beams", 1) == measure(tiny_checkpoint) != searched


def test_the_engine_says_what_generate_says(tiny_checkpoint, manifest):
    ended = run("--model", tiny_checkpoint, "--manifest", manifest, "--batch-size", 3, "--json")
    assert ended.exit_code == 0, ended.output
    report = json.loads(ended.stdout)
    assert report["clips"] == len(SECONDS)
    assert [way["name"] for way in report["ways"]] == [
        "generate, alone", "generate, batched", "engine, alone", "engine, batched",
    ]  # fmt: skip
    for way in report["ways"]:
        assert way["differing"] == []
        assert (way["token_error_rate"], way["disagreement"], way["wer_delta"]) == (0, 0, 0)
        assert way["wer"] > 0


class DeafRunner(SpeechRunner):
    """Says something else than its model, once two run together."""

    def step(self, rows):
        tokens = super().step(rows)
        return [Token(40), *tokens[1:]] if len(tokens) > 1 else tokens


def test_an_engine_that_differs_in_company_is_told_and_stops_a_deployment(
    tiny_checkpoint, manifest, monkeypatch
):
    monkeypatch.setattr(parity, "SpeechRunner", DeafRunner)
    arguments = ("--model", tiny_checkpoint, "--manifest", manifest, "--batch-size", 2)
    ended = run(*arguments)
    assert ended.exit_code == 1
    assert ended.stderr == "error: engine, batched: further from generate than allowed\n"
    assert "engine, batched differs on: " in ended.stdout
    assert "engine, alone differs" not in ended.stdout
    lenient = run(*arguments, "--max-wer-delta", 1000, "--max-disagreement", 1000)
    assert lenient.exit_code == 0


def test_a_recording_that_cannot_be_read_is_one_clear_line(tiny_checkpoint, tmp_path):
    path = tmp_path / "manifest.jsonl"
    path.write_text('{"audio": "missing.wav", "duration": 1.0}')
    ended = run("--model", tiny_checkpoint, "--manifest", path)
    assert ended.exit_code == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: missing.wav: ")


def test_a_clip_that_is_too_long_is_refused_by_name(tiny_checkpoint, tmp_path):
    (tmp_path / "long.wav").write_bytes(encode(noise(31.0).clip(-1, 1)))
    path = tmp_path / "manifest.jsonl"
    path.write_text('{"audio": "long.wav", "duration": 31.0}')
    ended = run("--model", tiny_checkpoint, "--manifest", path)
    assert ended.exit_code == 2
    assert ended.stderr == "error: long.wav: longer than the 30 s that the model takes\n"
