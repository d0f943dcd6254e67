"""Every training stage, end to end through the command line, on small models and real clips."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, WhisperConfig, WhisperForConditionalGeneration
from typer.testing import CliRunner

from model.checkpoint import load_model, load_processor
from model.training.tokenizer import train_tokenizer
from model.transcription import Transcriber
from model.whisper_baseline import WhisperTranscriber
from server.cli import app
from tests.conftest import SENTENCES

N_CLIPS = 12


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a manifest of short tones, a tokenizer, and a small Whisper and LM."""
    folder = tmp_path_factory.mktemp("train")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(N_CLIPS):
        seconds = rng.uniform(0.6, 1.6)
        time_s = np.arange(int(16_000 * seconds)) / 16_000
        tone = 0.2 * np.sin(2 * np.pi * (200 + 90 * number) * time_s)
        soundfile.write(folder / f"{number}.wav", tone.astype(np.float32), 16_000)
        rows.append(
            {
                "audio": f"{number}.wav", "text": SENTENCES[number % 6] if number else "",
                "language": "en", "duration": len(tone) / 16_000,
            }
        )  # fmt: skip
    write_manifest(folder / "train.jsonl", rows)
    write_manifest(folder / "dev.jsonl", rows[:3])
    (folder / "text.txt").write_text("\n".join(SENTENCES * 3))
    tokenizer = train_tokenizer(SENTENCES * 4, vocab_size=320)
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=64,
        decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=64, vocab_size=400,
        pad_token_id=0, bos_token_id=2, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    WhisperForConditionalGeneration(config).save_pretrained(folder / "base")
    run("train", "whisper", *whisper_options(folder), "--output", folder / "whisper")
    run("train", "lm", *lm_options(folder), "--output", folder / "lm")
    return folder


def write_manifest(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def speechllm(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "server.cli", *map(str, arguments)]


def run(*arguments: object, fails: bool = False) -> str:
    """Run `speechllm …` in this process and return what it printed."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert (done.exit_code != 0) == fails, done.output
    return done.output


def whisper_options(folder: Path) -> list[object]:
    return [
        "--manifest", folder / "train.jsonl", "--dev", folder / "dev.jsonl",
        "--whisper", folder / "base", "--tokenizer", folder / "tokenizer",
        "--encoder-mode", "trimmed", "--ctc-weight", 0.3, "--epochs", 2, "--precision", "fp32",
        "--max-batch-audio-s", 4, "--warmup-steps", 2, "--workers", 0,
    ]  # fmt: skip


def lm_options(folder: Path) -> list[object]:
    return [
        "--text", folder / "text.txt", "--tokenizer", folder / "tokenizer", "--epochs", 2,
        "--hidden-size", 48, "--intermediate-size", 64, "--layers", 1, "--heads", 4,
        "--batch-tokens", 100, "--warmup-steps", 2, "--curriculum", 0.5,
        "--audio-positions", "ctc",
    ]  # fmt: skip


def connector_options(folder: Path) -> list[object]:
    return [
        "--encoder", folder / "whisper", "--llm", folder / "lm", "--ctc", "fused",
        "--prompt", "", "--language", "en", "--stack-size", 4, "--connector-hidden-size", 32,
        "--connector-convolutions", 1, "--audio-positions", "ctc",
        "--precision", "fp32", "--epochs", 1, "--max-batch-audio-s", 4, "--warmup-steps", 2,
        "--workers", 0, "--stored-dtype", "fp32",
    ]  # fmt: skip


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def clip() -> np.ndarray:
    return np.sin(np.arange(12_000) / 10).astype(np.float32)


def test_whisper_stage_writes_a_whisper_that_transcribes_and_a_ctc_head(work: Path) -> None:
    product = work / "whisper"
    baseline = WhisperTranscriber.from_pretrained(product, device="cpu")
    transcript = baseline.transcribe([clip()], with_ctc=True).transcripts[0]
    assert isinstance(transcript.ctc_text, str)
    before, after = (load_file(folder / "model.safetensors") for folder in (work / "base", product))
    assert after["model.decoder.embed_tokens.weight"].shape == (320, 32)
    unmoved = [
        name for name, tensor in before.items()
        if name in after and tensor.shape == after[name].shape and torch.equal(tensor, after[name])
    ]  # fmt: skip
    assert unmoved == []  # fine-tuned in every tensor
    dev = [line for line in metrics(product) if "dev_ctc_wer" in line]
    assert [line["epoch"] for line in dev] == [1, 2]
    assert (product / "curves.png").stat().st_size > 1000


def test_whisper_stage_goes_on_with_what_it_wrote(work: Path, tmp_path: Path) -> None:
    options = whisper_options(work)
    options[options.index("--whisper") + 1] = work / "whisper"
    at = options.index("--tokenizer")
    del options[at : at + 2]
    # One step at a rate of next to nothing: all that is trained is what was taken over.
    still = ["--epochs", 1, "--learning-rate", 1e-12, "--warmup-steps", 0]
    run("train", "whisper", *options, *still, "--output", tmp_path / "more")
    for name in ("model.safetensors", "ctc_head.safetensors"):
        before, after = load_file(work / "whisper" / name), load_file(tmp_path / "more" / name)
        torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


def test_new_parameters_first_leaves_the_pretrained_ones_alone(work: Path, tmp_path: Path) -> None:
    first = ["--new-parameters-first-steps", 1000, "--output", tmp_path]
    run("train", "whisper", *whisper_options(work), *first)
    before, after = (load_file(f / "model.safetensors") for f in (work / "base", tmp_path))
    embedding = "model.decoder.embed_tokens.weight"
    assert after[embedding].shape != before[embedding].shape  # made anew
    for name in after.keys() - {embedding, "proj_out.weight"}:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)


def test_an_encoder_without_a_learning_rate_stays_as_it_is(work: Path, tmp_path: Path) -> None:
    run(
        "train", "whisper", *whisper_options(work), "--encoder-lr-scale", 0,
        "--output", tmp_path / "run",
    )  # fmt: skip
    before, after = (load_file(f / "model.safetensors") for f in (work / "base", tmp_path / "run"))
    for name, tensor in before.items():
        if name.startswith("model.encoder."):
            assert torch.equal(tensor, after[name]), name
        elif name.startswith("model.decoder.layers."):
            assert not torch.equal(tensor, after[name]), name


def test_a_tuned_share_lies_between_the_first_encoder_and_the_tuned_one(
    work: Path, tmp_path: Path
) -> None:
    run("train", "whisper", *whisper_options(work), "--tuned-share", 0.25, "--output", tmp_path)
    names = ("base", "whisper")
    first, tuned = (load_file(work / name / "model.safetensors") for name in names)
    stored = load_file(tmp_path / "model.safetensors")
    for name, tensor in stored.items():
        if name.startswith("model.encoder."):
            torch.testing.assert_close(tensor, first[name].lerp(tuned[name], 0.25))
        else:
            torch.testing.assert_close(tensor, tuned[name])


def test_lm_stage_writes_a_causal_lm_with_its_tokenizer(work: Path) -> None:
    llm = AutoModelForCausalLM.from_pretrained(work / "lm")
    assert llm.config.model_type == "qwen2"
    assert llm.config.pad_token_id != llm.config.eos_token_id
    assert (work / "lm" / "tokenizer.json").exists()


def test_connector_from_cache_keeps_encoder_and_llm_as_they_were(work: Path) -> None:
    run(
        "cache", "--manifest", work / "train.jsonl", "--encoder", work / "whisper",
        "--llm", work / "lm", "--augmented-copies", 1, "--output", work / "cache",
    )  # fmt: skip
    output = work / "connector"
    run(
        "train", "connector", *connector_options(work), "--cache", work / "cache",
        "--dev", work / "dev.jsonl", "--concatenation", 0.3, "--output", output,
    )  # fmt: skip
    encoder, llm = (
        load_file(output / "encoder/model.safetensors"),
        load_file(output / "llm/model.safetensors"),
    )
    whisper = load_file(work / "whisper" / "model.safetensors")
    assert all(torch.equal(t, whisper[f"model.encoder.{n}"]) for n, t in encoder.items())
    former = load_file(work / "lm" / "model.safetensors")
    assert all(torch.equal(tensor, former[name]) for name, tensor in llm.items())
    assert isinstance(
        Transcriber.from_pretrained(output, device="cpu").transcribe([clip()]).transcripts[0].text,
        str,
    )
    assert {"dev_wer", "dev_ctc_wer", "dev_llm_loss"} <= set(metrics(output)[-1])


def test_a_cache_of_another_encoder_is_refused(work: Path, tmp_path: Path) -> None:
    run(
        "cache", "--manifest", work / "dev.jsonl", "--encoder", work / "base",
        "--llm", work / "lm", "--encoder-mode", "trimmed", "--output", tmp_path / "cache",
    )  # fmt: skip
    said = run(
        "train", "connector", *connector_options(work), "--cache", tmp_path / "cache",
        "--output", tmp_path / "run", fails=True,
    )  # fmt: skip
    assert "made with another encoder" in said
    taken = ["train", "connector", *connector_options(work), "--cache", tmp_path / "cache"]
    run(*taken, "--mixed-encoders", "--output", tmp_path / "run")
    said = run(
        *taken, "--mixed-encoders", "--teacher", work / "whisper", "--output", tmp_path / "b",
        fails=True,
    )  # fmt: skip
    assert "a teacher hears its own encoder only" in said


def test_a_cache_takes_no_augmentation(work: Path, tmp_path: Path) -> None:
    said = run(
        "train", "connector", *connector_options(work), "--cache", tmp_path, "--augment",
        "--output", tmp_path / "run", fails=True,
    )  # fmt: skip
    assert "there is none in a cache" in " ".join(said.replace("│", " ").split())


def test_a_run_does_not_go_on_with_other_data(work: Path, tmp_path: Path) -> None:
    options = [*whisper_options(work), "--max-steps", 1, "--output", tmp_path / "run"]
    run("train", "whisper", *options)
    options[1] = work / "dev.jsonl"
    said = run("train", "whisper", *options, fails=True)
    assert "a run with other settings (stage.utterances)" in said
    text = tmp_path / "text.txt"
    text.write_text("\n".join(SENTENCES))
    options = [*lm_options(work), "--max-steps", 1, "--output", tmp_path / "lm"]
    run("train", "lm", *options)
    options[1] = text
    assert "(stage.lines)" in run("train", "lm", *options, fails=True)


def test_a_text_longer_than_the_decoder_is_learnt_as_far_as_it_goes(
    work: Path, tmp_path: Path
) -> None:
    row = {"audio": str(work / "1.wav"), "text": "zero one two " * 300, "duration": 1.0}
    write_manifest(tmp_path / "long.jsonl", [row])
    options = [*whisper_options(work), "--epochs", 1, "--ctc-weight", 0]
    options[1] = tmp_path / "long.jsonl"
    run("train", "whisper", *options, "--output", tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_connector_goes_on_with_lora_and_then_with_everything(work: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    from_audio = ["--manifest", work / "train.jsonl", "--augment", "--concatenation", 0.3]
    run("train", "connector", *connector_options(work), *from_audio, "--output", first)
    more = ["--epochs", 1, "--max-batch-audio-s", 4, "--workers", 0, "--stored-dtype", "fp32"]
    lora = tmp_path / "lora"
    text = tmp_path / "text.txt"
    text.write_text("Nobody says these words.\n\nЭнэ үгийг хэн ч хэлээгүй.\n", encoding="utf-8")
    more += ["--text", text, "--text-batch-tokens", 64]
    run("train", "connector", "--model", first, *from_audio, *more, "--lora", "--output", lora)
    assert (lora / "lora" / "adapter_model.safetensors").exists()
    former, base = (load_file(f / "llm/model.safetensors") for f in (first, lora))
    assert all(torch.equal(tensor, former[name]) for name, tensor in base.items())
    everything = tmp_path / "all"
    run(
        "train", "connector", "--model", lora, *from_audio, *more,
        "--train-llm", "--train-encoder", "--output", everything,
    )  # fmt: skip
    assert not (everything / "lora").exists()
    model = load_model(everything)
    start = load_model(first)
    for part in ("encoder.layers.0.fc1.weight", "llm.model.layers.0.mlp.up_proj.weight"):
        assert not torch.equal(model.state_dict()[part], start.state_dict()[part]), part
    load_processor(everything)
    text.write_text("Other words.\n", encoding="utf-8")
    said = run(
        "train", "connector", "--model", first, *from_audio, *more, "--lora", "--output", lora,
        fails=True,
    )  # fmt: skip
    assert "lines" in said
    text.write_text("\n \n")
    said = run(
        "train", "connector", "--model", first, *from_audio, *more, "--train-llm",
        "--output", tmp_path / "none", fails=True,
    )  # fmt: skip
    assert "--text holds no line of text" in said


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in this process then round as they do in a child with OMP_NUM_THREADS=1."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def steps_saved(folder: Path) -> int:
    """Optimizer steps in the state of a run that may be replacing that very state right now."""
    try:
        return json.loads((folder / "state" / "progress.json").read_text())["step"]
    except FileNotFoundError:
        return 0


@pytest.mark.usefixtures("one_thread")
def test_a_killed_run_resumes_to_the_same_curve_and_weights(work: Path, tmp_path: Path) -> None:
    options = [*whisper_options(work), "--save-every-s", 0.001, "--augment"]
    run("train", "whisper", *options, "--output", tmp_path / "whole")
    killed = tmp_path / "killed"
    with subprocess.Popen(
        speechllm("train", "whisper", *options, "--output", killed),
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        while process.poll() is None and steps_saved(killed) < 3:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert not (killed / "model.safetensors").exists(), "killed too late to test anything"
    run("train", "whisper", *options, "--output", killed)
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    resumed = load_file(killed / "model.safetensors")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in expected.items())
    losses = [
        [(line["step"], line["dev_loss"]) for line in metrics(folder) if "dev_loss" in line]
        for folder in (tmp_path / "whole", killed)
    ]
    assert losses[0] == losses[1]


def test_sigterm_saves_the_state_and_says_how_to_go_on(work: Path, tmp_path: Path) -> None:
    with subprocess.Popen(
        speechllm(
            "train", "whisper", *whisper_options(work), "--output", tmp_path, "--epochs", 500
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        while process.poll() is None and not (tmp_path / "metrics.jsonl").exists():
            time.sleep(0.05)
        process.terminate()
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the same command goes on from there" in said
    assert (tmp_path / "state" / "progress.json").exists()


def test_max_steps_stops_and_the_same_command_without_it_finishes(
    work: Path, tmp_path: Path
) -> None:
    said = run("train", "lm", *lm_options(work), "--output", tmp_path, "--max-steps", 2)
    assert "stopped at step 2" in said
    assert not (tmp_path / "model.safetensors").exists()
    run("train", "lm", *lm_options(work), "--output", tmp_path)
    assert (tmp_path / "model.safetensors").exists()


def test_a_run_with_other_settings_is_refused_by_name(work: Path) -> None:
    said = run(
        "train", "lm", *lm_options(work), "--learning-rate", 0.5, "--output", work / "lm",
        fails=True,
    )  # fmt: skip
    assert "loop.learning_rate" in said


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--precision", "fp7"], "--precision"),
        (["--whisper", "no/such/whisper"], "no/such/whisper"),
        (["--max-audio-s", 0.1], "none of 12 utterances"),
    ],
)
def test_bad_input_gives_one_line(
    work: Path, tmp_path: Path, arguments: list[object], reason: str
) -> None:
    options = ["train", "whisper", *whisper_options(work), *arguments, "--output", tmp_path]
    said = run(*options, fails=True)
    assert said.splitlines()[-1].startswith("error: ")
    assert reason in said.splitlines()[-1]


def test_what_the_system_refuses_is_told_without_its_number(tmp_path: Path) -> None:
    missing = tmp_path / "none.txt"
    said = run("train", "tokenizer", "--text", missing, "--output", tmp_path / "out", fails=True)
    assert said.splitlines()[-1] == f"error: {missing}: No such file or directory"
