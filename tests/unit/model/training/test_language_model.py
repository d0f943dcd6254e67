"""The text stage: corrupted copies, their layout in time, and a Qwen2 that learns."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.training.language_model import (
    SILENT,
    LanguageModelConfig,
    LanguageModelStage,
    corrupt_words,
    lay_out,
    read_lines,
)
from model.training.loop import LoopConfig, TrainingLoop
from model.training.tokenizer import train_tokenizer
from tests.conftest import SENTENCES

SEEDS = st.integers(0, 2**32 - 1)
SHARES = st.floats(0, 1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(SENTENCES * 4, vocab_size=320).save_pretrained(folder)
    return str(folder)


def make_stage(tokenizer, lines=SENTENCES, **fields):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "layers": 1, "heads": 4}
    config = LanguageModelConfig(tokenizer=tokenizer, batch_tokens=128, **sizes, **fields)
    return LanguageModelStage(config, lines, SENTENCES[:2], seed=0)


@given(st.text(max_size=60), SHARES, SEEDS)
def test_any_text_can_be_corrupted(text, rate, seed):
    corrupted = corrupt_words(text, rate, np.random.default_rng(seed))
    assert isinstance(corrupted, str)
    assert corrupted == corrupt_words(text, rate, np.random.default_rng(seed))


@given(st.sampled_from([*SENTENCES, "й", "ё ё", "", "   "]), SEEDS)
def test_rate_0_leaves_every_word(text, seed):
    assert corrupt_words(text, 0, np.random.default_rng(seed)) == " ".join(text.split())


def test_rate_1_changes_most_texts():
    rng = np.random.default_rng(0)
    changed = [corrupt_words(text, 1.0, rng) != text for text in SENTENCES * 5]
    assert np.mean(changed) > 0.9


@given(st.lists(st.integers(0, 319), max_size=30), SHARES, SHARES, SEEDS)
def test_laid_out_ids_are_in_range_and_not_more_than_were_read(ids, rate, pace, seed):
    laid_out = lay_out(ids, np.random.default_rng(seed), 320, rate, pace)
    assert all(token == SILENT or 0 <= token < 320 for token in laid_out)
    assert sum(token != SILENT for token in laid_out) <= len(ids)


@given(st.lists(st.integers(0, 319), max_size=30), SEEDS)
def test_without_errors_the_layout_keeps_the_ids_in_order(ids, seed):
    laid_out = lay_out(ids, np.random.default_rng(seed), 320, 0.0, 1.1)
    assert [token for token in laid_out if token != SILENT] == ids


@given(st.lists(st.integers(0, 319), max_size=30), SEEDS)
def test_pace_0_leaves_no_silence(ids, seed):
    assert lay_out(ids, np.random.default_rng(seed), 320, 0.0, 0.0) == ids


def test_an_epoch_reads_every_sentence_once_on_any_number_of_ranks(tokenizer):
    lines = [f"{sentence} {number}" for number in range(4) for sentence in SENTENCES]
    stage = make_stage(tokenizer, lines)
    for world_size in (1, 2, 3):
        shares = [stage.epoch(0, rank, world_size) for rank in range(world_size)]
        assert len({len(share) for share in shares}) == 1
        labels = [
            tuple(row[row >= 0].tolist())
            for share in shares
            for batch in share.iterate(0)
            for row in batch["labels"]
        ]
        wanted = {(*stage.processor.text_ids(line), 2) for line in lines}
        assert set(labels) == wanted


def test_batches_from_an_index_on_are_those_of_the_whole_epoch(tokenizer):
    stage = make_stage(tokenizer, SENTENCES * 6)
    whole = list(stage.epoch(1, 0, 1).iterate(0))
    rest = list(stage.epoch(1, 0, 1).iterate(2))
    assert len(rest) == len(whole) - 2 > 0
    for one, other in zip(whole[2:], rest, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert torch.equal(one["heard"], other["heard"])


def test_the_loss_falls_and_the_product_is_a_causal_lm(tokenizer, tmp_path):
    stage = make_stage(tokenizer, SENTENCES * 4)
    before = stage.validate(stage.module.eval())["loss"]
    config = LoopConfig(epochs=12, learning_rate=1e-2, warmup_steps=2, precision="fp32")
    assert TrainingLoop(stage, config, tmp_path, {}).run()
    after = stage.validate(stage.module.eval())["loss"]
    assert after < before - 1
    llm = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    prompt = loaded(SENTENCES[0], return_tensors="pt").input_ids
    torch.testing.assert_close(llm(prompt).logits, stage.llm.eval()(prompt).logits)
    assert llm.generation_config.eos_token_id == loaded.eos_token_id == 2
    assert llm.generation_config.pad_token_id == loaded.pad_token_id == 0


def test_held_out_text_is_as_hard_whatever_the_curriculum(tokenizer):
    losses = set()
    for curriculum in (0.0, 0.9):
        torch.manual_seed(0)
        stage = make_stage(tokenizer, SENTENCES * 4, curriculum=curriculum)
        losses.add(stage.validate(stage.module.eval())["loss"])
    assert len(losses) == 1


def test_no_text_is_refused(tokenizer):
    with pytest.raises(ValueError, match="no line of text"):
        make_stage(tokenizer, ["", "  "])


def test_text_files_and_manifests_are_read_line_by_line(tmp_path):
    (tmp_path / "a.txt").write_bytes("один\r\nhoyor\n".encode())
    (tmp_path / "b.jsonl").write_text('{"text": "гу\u2028рав"}\n{"text": null}\n')
    assert read_lines([tmp_path / "a.txt", tmp_path / "b.jsonl"]) == [
        "один",
        "hoyor",
        "гу\u2028рав",
        "",
    ]
