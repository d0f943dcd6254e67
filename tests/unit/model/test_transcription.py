"""Transcription in batches: budgets, finish reasons, languages, and the Whisper baseline."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from model.checkpoint import CheckpointError, load_processor
from model.processing import token_budget
from model.training.tokenizer import train_tokenizer
from model.transcription import Transcriber, identify_language, pick_device, pick_dtype
from model.whisper_baseline import CTC_HEAD_FILE, WhisperTranscriber, decoder_prefix
from tests.conftest import SENTENCES

SECONDS = (0.4, 2.0, 1.1)


def clips() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [(0.1 * rng.standard_normal(int(16_000 * s))).astype(np.float32) for s in SECONDS]


@pytest.fixture(scope="module")
def transcriber(tiny_checkpoint: Path) -> Transcriber:
    return Transcriber.from_pretrained(tiny_checkpoint, device="cpu")


def test_a_batch_equals_each_clip_alone(transcriber: Transcriber) -> None:
    together = transcriber.transcribe(clips(), with_ctc=True).transcripts
    alone = [transcriber.transcribe([clip], with_ctc=True).transcripts[0] for clip in clips()]
    assert together == alone
    assert len({tuple(transcript.token_ids) for transcript in together}) > 1


def test_beams_find_likelier_answers_than_greedy_search(transcriber: Transcriber) -> None:
    greedy, with_beams = (
        transcriber.transcribe(clips(), num_beams=num_beams).transcripts for num_beams in (1, 4)
    )
    assert [each.token_ids for each in with_beams] != [each.token_ids for each in greedy]
    with pytest.raises(ValueError, match="num_beams must be at least 1, got 0"):
        transcriber.transcribe(clips(), num_beams=0)


def test_every_clip_has_its_own_token_cap(transcriber: Transcriber) -> None:
    for transcript, seconds in zip(
        transcriber.transcribe(clips()).transcripts, SECONDS, strict=True
    ):
        budget = token_budget(transcriber.config, seconds)
        assert len(transcript.token_ids) <= budget
        if transcript.finish_reason == "length":
            assert len(transcript.token_ids) == budget


def test_max_new_tokens_caps_all(transcriber: Transcriber) -> None:
    for transcript in transcriber.transcribe(clips(), max_new_tokens=2).transcripts:
        assert len(transcript.token_ids) <= 2


def test_eos_ends_a_transcript_with_stop(
    transcriber: Transcriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    eos = transcriber.processor.tokenizer.eos_token_id
    rows = [[40, 41, eos, 42], [40] * 99, [eos]]
    monkeypatch.setattr(transcriber, "_generate", lambda *_args: rows)
    first, second, third = transcriber.transcribe(clips()).transcripts
    assert (first.token_ids, first.finish_reason) == ([40, 41], "stop")
    assert second.finish_reason == "length"
    assert (third.text, third.finish_reason) == ("", "stop")


def test_a_cap_below_one_token_is_refused(transcriber: Transcriber) -> None:
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        transcriber.transcribe(clips(), max_new_tokens=0)


def test_a_prompt_changes_the_sequence(transcriber: Transcriber) -> None:
    plain = transcriber.transcribe(clips())
    asked = transcriber.transcribe(clips(), prompt="zero one two three four five six")
    assert [t.token_ids for t in plain.transcripts] != [t.token_ids for t in asked.transcripts]


def test_no_clip_gives_no_transcript(transcriber: Transcriber) -> None:
    assert transcriber.transcribe([]).transcripts == []


def test_ctc_is_read_only_when_asked_for(transcriber: Transcriber) -> None:
    assert transcriber.transcribe(clips()[:1]).transcripts[0].ctc_text is None
    assert isinstance(
        transcriber.transcribe(clips()[:1], with_ctc=True).transcripts[0].ctc_text, str
    )


def test_a_clip_beyond_the_checkpoint_s_limit_is_refused(transcriber: Transcriber) -> None:
    with pytest.raises(ValueError, match=r"31\.00 s is longer than the 30 s"):
        transcriber.transcribe([np.zeros(16_000 * 31, np.float32)])


@pytest.mark.parametrize(
    ("text", "languages", "expected"),
    [
        ("Сайн байна уу", ["en", "mn"], "mn"),
        ("hello", ["en", "mn"], "en"),
        ("hello", ["mn"], "mn"),
        ("", ["en", "mn"], None),
        ("123", ["en", "mn"], None),
        ("hello", ["en", "de"], None),
        ("hello", [], None),
        ("Whisper гэж юу юм бэ", ["en", "mn"], "mn"),
    ],
)
def test_language_is_told_by_script_where_that_decides(
    text: str, languages: list[str], expected: str | None
) -> None:
    assert identify_language(text, languages) == expected


def test_devices_and_dtypes() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    with pytest.raises(ValueError, match="unknown device 'gpu0'"):
        pick_device("gpu0")
    with pytest.raises(ValueError, match="unknown dtype 'int3'"):
        pick_dtype("int3", torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_an_absent_cuda_device_is_refused() -> None:
    with pytest.raises(ValueError, match="finds no CUDA device"):
        pick_device("cuda")


def write_whisper(folder: Path, mode: str) -> None:
    tokenizer = train_tokenizer(SENTENCES * 4, vocab_size=320)
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64,
        decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=64, vocab_size=320,
        pad_token_id=0, bos_token_id=2, eos_token_id=2, decoder_start_token_id=1,
        init_std=0.5, encoder_mode=mode,
    )  # fmt: skip
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", ["trimmed", "padded"])
def test_the_whisper_baseline_hides_padding_from_its_decoder(
    tmp_path: Path, mode: str, attention: str
) -> None:
    write_whisper(tmp_path, mode)
    baseline = WhisperTranscriber.from_pretrained(tmp_path, device="cpu")
    baseline.whisper.set_attn_implementation(attention)
    together = baseline.transcribe(clips()).transcripts
    alone = [baseline.transcribe([clip]).transcripts[0] for clip in clips()]
    assert [t.token_ids for t in together] == [t.token_ids for t in alone]
    assert len({tuple(t.token_ids) for t in together}) > 1


def test_a_whisper_without_a_tensor_is_refused(tmp_path: Path) -> None:
    write_whisper(tmp_path, "trimmed")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.decoder.layers.0.fc1.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.0\.fc1\.weight is missing"):
        WhisperTranscriber.from_pretrained(tmp_path, device="cpu")


@pytest.mark.parametrize("fault", ["shape", "cut short", "no config"])
def test_a_damaged_whisper_is_refused(tmp_path: Path, fault: str) -> None:
    write_whisper(tmp_path, "trimmed")
    file = tmp_path / "model.safetensors"
    if fault == "shape":
        tensors = load_file(file)
        tensors["model.decoder.layers.0.fc1.weight"] = torch.zeros(7, 7)
        save_file(tensors, file, metadata={"format": "pt"})
    elif fault == "cut short":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        (tmp_path / "config.json").unlink()
    reason = {
        "shape": r"layers\.0\.fc1\.weight has shape \(7, 7\)",
        "cut short": r"model\.safetensors: not a whole safetensors file",
        "no config": r"config",
    }[fault]
    with pytest.raises(CheckpointError, match=reason):
        WhisperTranscriber.from_pretrained(tmp_path, device="cpu")


def test_the_whisper_baseline_reads_a_ctc_head_beside_it(tmp_path: Path) -> None:
    write_whisper(tmp_path, "trimmed")
    token = train_tokenizer(SENTENCES * 4, vocab_size=320).convert_tokens_to_ids("a")
    bias = torch.zeros(320)
    bias[token] = 100.0  # every frame reads "a", which repeats merge into one
    save_file({"weight": torch.zeros(320, 32), "bias": bias}, tmp_path / CTC_HEAD_FILE)
    baseline = WhisperTranscriber.from_pretrained(tmp_path, device="cpu")
    read = baseline.transcribe(clips(), with_ctc=True).transcripts
    assert [transcript.ctc_text for transcript in read] == ["a"] * 3
    assert baseline.transcribe(clips()[:1]).transcripts[0].ctc_text is None
    save_file({"weight": torch.zeros(8, 32), "bias": bias}, tmp_path / CTC_HEAD_FILE)
    with pytest.raises(CheckpointError, match=r"ctc_head\.safetensors: weight has shape \(8, 32\)"):
        WhisperTranscriber.from_pretrained(tmp_path, device="cpu")


def test_the_whisper_baseline_takes_no_beams(tmp_path: Path) -> None:
    write_whisper(tmp_path, "trimmed")
    baseline = WhisperTranscriber.from_pretrained(tmp_path, device="cpu")
    with pytest.raises(ValueError, match="decoded greedily"):
        baseline.transcribe(clips(), num_beams=2)


def test_decoder_prefix_names_language_and_task_where_the_vocabulary_has_them(
    tiny_checkpoint: Path,
) -> None:
    tokenizer = load_processor(tiny_checkpoint).tokenizer
    assert decoder_prefix(tokenizer, 7, "mn") == [7]
    names = ["<|startoftranscript|>", "<|mn|>", "<|transcribe|>", "<|notimestamps|>"]
    tokenizer.add_tokens(names, special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(names)
    assert decoder_prefix(tokenizer, 7, "mn") == ids
    assert decoder_prefix(tokenizer, 7, None) == [ids[0], ids[3]]
