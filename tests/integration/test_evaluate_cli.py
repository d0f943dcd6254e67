"""`speechllm evaluate` and `speechllm compare` on a real, small checkpoint and real audio files."""

import json
import shutil

import numpy as np
import pytest
import soundfile
import typer
from typer.testing import CliRunner

from server.cli.evaluate import compare, evaluate

RATE_HZ = 16_000


@pytest.fixture(scope="module")
def command_line():
    app = typer.Typer()
    app.command()(evaluate)
    app.command()(compare)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def usual_options(tiny_checkpoint, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return {
        "--model": tiny_checkpoint,
        "--manifest": corpus[0],
        "--output": "run",
        "--device": "cpu",
    }


@pytest.fixture
def corpus(tmp_path):
    """Six short recordings of two languages, one of them silence, one without a reference."""
    rng = np.random.default_rng(0)
    rows = []
    for i, (text, language) in enumerate(
        [
            ("Where did you find that apple?", "en"),
            ("twenty five", "en"),
            ("Нягтлан бодох хүн ирэв.", "mn"),
            ("сайн", None),
            ("", "mn"),
            (None, "en"),
        ]
    ):
        waveform = rng.normal(0, 0.1, RATE_HZ // 2 * (i + 1)).astype(np.float32)
        soundfile.write(tmp_path / f"{i}.wav", waveform, RATE_HZ)
        rows.append(
            {
                "audio": f"{i}.wav",
                "text": text,
                "speaker": f"s{i}",
                "language": language,
                "duration": len(waveform) / RATE_HZ,
            }
        )
    return write_manifest(tmp_path / "manifest.jsonl", rows), rows


def write_manifest(path, rows):
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_evaluation_scores_every_labelled_utterance(
    command_line, tiny_checkpoint, corpus, tmp_path
):
    manifest, rows = corpus
    output = tmp_path / "run"
    outcome = command_line(
        "evaluate", "--model", tiny_checkpoint, "--manifest", manifest, "--output", output,
        "--device", "cpu", "--with-ctc", "--language", "mn", "--batch-size", 2,
    )  # fmt: skip
    assert outcome.exit_code == 0, outcome.output
    results = read_lines(output / "results.jsonl")
    assert [result["reference"] for result in results] == [row["text"] for row in rows[:5]]
    assert [result["language"] for result in results] == ["en", "en", "mn", "mn", "mn"]
    assert [result["duration_s"] for result in results] == [0.5, 1.0, 1.5, 2.0, 2.5]
    assert all(isinstance(result["ctc_hypothesis"], str) for result in results)
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    assert summary["total"]["utterances"] == 5
    assert summary["total"]["non_speech_utterances"] == 1
    assert summary["unlabelled_utterances"] == 1
    assert summary["speed"]["rtfx"] > 0
    assert (output / "report.md").stat().st_size > 1000
    assert (output / "wer_by_duration.png").is_file()
    assert (output / "wer_distribution.png").is_file()
    assert "Utterances without a reference, left out: 1" in outcome.stdout


def test_batch_of_one_gives_the_same_texts_as_a_large_batch(
    command_line, tiny_checkpoint, corpus, tmp_path
):
    manifest, _ = corpus
    for size in (1, 8):
        outcome = command_line(
            "evaluate", "--model", tiny_checkpoint, "--manifest", manifest, "--device", "cpu",
            "--output", tmp_path / f"batch{size}", "--batch-size", size, "--limit", 5, "--with-ctc",
            "--dtype", "fp32",
        )  # fmt: skip
        assert outcome.exit_code == 0, outcome.output
    files = [tmp_path / f"batch{size}" / "results.jsonl" for size in (1, 8)]
    # The untrained LLM may say nothing; its CTC head always does.
    assert all(result["ctc_hypothesis"] for result in read_lines(files[0]))
    assert read_lines(files[0]) == read_lines(files[1])
    outcome = command_line("compare", *files)
    assert outcome.exit_code == 0, outcome.output
    row = next(line for line in outcome.stdout.splitlines() if "WER normalised" in line)
    assert "| +0.00 | +0.00 … +0.00 | 0.00 |" in row


def test_beams_change_the_texts_and_are_noted(command_line, tiny_checkpoint, corpus, tmp_path):
    options = ["--manifest", corpus[0], "--device", "cpu", "--dtype", "fp32"]
    for beams in (1, 4):
        outcome = command_line(
            "evaluate", "--model", tiny_checkpoint, *options, "--num-beams", beams,
            "--output", tmp_path / f"beams{beams}",
        )  # fmt: skip
        assert outcome.exit_code == 0, outcome.output
    greedy, with_beams = (
        [result["hypothesis"] for result in read_lines(tmp_path / name / "results.jsonl")]
        for name in ("beams1", "beams4")
    )
    assert with_beams != greedy
    summary = json.loads((tmp_path / "beams4" / "summary.json").read_text(encoding="utf-8"))
    assert summary["settings"]["num_beams"] == 4
    searching = shutil.copytree(tiny_checkpoint, tmp_path / "searching")
    file = searching / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_beams": 4}))
    outcome = command_line(
        "evaluate", "--model", searching, *options, "--output", tmp_path / "unsaid"
    )
    assert outcome.exit_code == 0, outcome.output
    unsaid = read_lines(tmp_path / "unsaid" / "results.jsonl")
    assert [result["hypothesis"] for result in unsaid] == with_beams


def test_unreadable_audio_is_reported_and_fails_the_command(
    command_line, tiny_checkpoint, corpus, tmp_path
):
    manifest, rows = corpus
    (tmp_path / "broken.wav").write_bytes(b"this is no audio")
    write_manifest(
        manifest,
        [rows[0], rows[1] | {"audio": "broken.wav"}, rows[2] | {"audio": "missing.wav"}],
    )
    output = tmp_path / "run"
    outcome = command_line(
        "evaluate", "--model", tiny_checkpoint, "--manifest", manifest, "--output", output,
        "--device", "cpu",
    )  # fmt: skip
    assert outcome.exit_code == 1
    assert "error: 2 of 3 utterances failed" in outcome.stderr
    assert len(read_lines(output / "results.jsonl")) == 1
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    assert len(summary["failed"]) == 2
    assert "## Failed utterances" in (output / "report.md").read_text(encoding="utf-8")


def test_nothing_readable_is_one_clear_error(command_line, tiny_checkpoint, corpus, tmp_path):
    manifest, rows = corpus
    write_manifest(manifest, [rows[0] | {"audio": "missing.wav"}])
    outcome = command_line(
        "evaluate", "--model", tiny_checkpoint, "--manifest", manifest, "--device", "cpu",
        "--output", tmp_path / "run",
    )  # fmt: skip
    assert outcome.exit_code == 1
    assert "missing.wav" in outcome.stderr
    assert "error: nothing to score" in outcome.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"--manifest": "none.jsonl"}, "none.jsonl"),
        ({"--model": "."}, "no config.json"),
        ({"--device": "toaster"}, "unknown device 'toaster'"),
        ({"--batch-size": "0"}, "--batch-size"),
        ({"--output": "manifest.jsonl"}, "manifest.jsonl"),
    ],
)
def test_bad_usage_is_one_clear_error_and_exit_code_two(
    command_line, usual_options, arguments, reason
):
    options = [part for option in (usual_options | arguments).items() for part in option]
    outcome = command_line("evaluate", *options)
    assert outcome.exit_code == 2
    assert reason in outcome.stderr
    assert "Traceback" not in outcome.output


def test_manifest_without_any_reference_is_refused(command_line, tiny_checkpoint, corpus, tmp_path):
    manifest, rows = corpus
    write_manifest(manifest, rows[5:])
    outcome = command_line(
        "evaluate", "--model", tiny_checkpoint, "--manifest", manifest, "--device", "cpu",
        "--output", tmp_path / "run",
    )  # fmt: skip
    assert outcome.exit_code == 2
    assert "no utterance has a text to score against" in outcome.stderr


def test_files_that_cannot_be_compared_are_refused(command_line, tmp_path):
    outcome = command_line("compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert outcome.exit_code == 2
    assert "error: " in outcome.stderr
    assert "a.jsonl: cannot be read" in outcome.stderr


def test_one_real_recording_is_transcribed(command_line, tiny_checkpoint, shared_data, tmp_path):
    outcome = command_line(
        "evaluate", "--model", tiny_checkpoint, "--device", "cpu",
        "--manifest", shared_data / "manifests" / "jfk_test.jsonl", "--audio-root", shared_data,
        "--output", tmp_path / "run",
    )  # fmt: skip
    assert outcome.exit_code == 0, outcome.output
    result = read_lines(tmp_path / "run" / "results.jsonl")[0]
    assert result["reference"].startswith("And so my fellow Americans")
    assert result["duration_s"] == pytest.approx(11.0, abs=0.01)
