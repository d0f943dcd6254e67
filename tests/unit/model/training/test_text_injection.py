"""Text without audio beside the speech that an LLM learns from."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.training.connector import ConnectorStage, ConnectorStageConfig
from model.training.language_model import SILENT, text_loss
from model.training.loop import LoopConfig, TrainingLoop
from model.training.speech_data import SpeechDataConfig
from model.training.text_injection import Misreadings
from tests.conftest import SENTENCES

UNSAID = ["Nobody says these words aloud.", "A lamp, two chairs.", "Үүнийг хэн ч хэлээгүй."]
TOKENS = st.lists(st.integers(0, 99), max_size=20)
SEEDS = st.integers(0, 2**32 - 1)


def make_stage(fresh_model, utterances, text=UNSAID, parts=None, **fields):
    model, processor = fresh_model(**(parts or {}))
    data = SpeechDataConfig(max_batch_audio_s=2.5, workers=0)
    settings = {"train_llm": True, "text_batch_tokens": 64, "stored_dtype": "fp32", **fields}
    config = ConnectorStageConfig(data=data, **settings)
    return ConnectorStage(model, processor, config, utterances, [], 0, text)


def sentences_in(stage, batch):
    labels = batch["text"]["labels"]
    return [stage.processor.decode_transcript(row[row >= 0].tolist()) for row in labels]


def copies_in(batch):
    """What stands at the audio positions of each sentence."""
    text = batch["text"]
    heard = text["heard"].tolist()
    counts = (text["input_ids"] == 3).sum(1).tolist()
    return [[heard.pop(0) for _ in range(count)] for count in counts]


@given(st.lists(st.integers(0, 99), unique=True, max_size=20), TOKENS)
def test_a_clip_misread_throughout_is_what_the_head_wrote(said, heard):
    misreadings = Misreadings()
    misreadings.learn([100, *said], [100, *heard])  # nothing is inserted before the first token
    assert misreadings.misread([100, *said], 1.0, np.random.default_rng(0)) == [100, *heard]


@given(st.lists(st.tuples(TOKENS, TOKENS), max_size=5), TOKENS, st.floats(0, 1), SEEDS)
def test_only_tokens_that_were_misread_are_misread(clips, ids, rate, seed):
    misreadings = Misreadings()
    for said, heard in clips:
        misreadings.learn(said, heard)
    assert misreadings.misread(ids, 0.0, np.random.default_rng(seed)) == ids
    safe = [token for token in ids if all(token not in said for said, _ in clips)]
    assert misreadings.misread(safe, rate, np.random.default_rng(seed)) == safe
    if all(said == heard for said, heard in clips):
        assert len(misreadings) == 0


def test_every_batch_of_speech_has_text_beside_it(fresh_model, utterances):
    stage = make_stage(fresh_model, utterances)
    seen, read = set(), 0
    for epoch in range(8):
        batches = stage.epoch(epoch, 0, 1)
        listed = list(batches.iterate(0))
        assert len(listed) == len(batches) > 1
        for batch in listed:
            seen.update(sentences_in(stage, batch))
            copies = copies_in(batch)
            assert all(copies) or not any(copies)
            read += bool(copies[0])
            assert batch["audio_s"] > 0
    assert seen == set(UNSAID)
    assert read > 0


def test_an_epoch_reads_one_batch_of_text_after_another(fresh_model, utterances):
    lines = [f"{sentence} {number}" for number in range(10) for sentence in UNSAID]
    stage = make_stage(fresh_model, utterances, lines)
    read = [frozenset(sentences_in(stage, batch)) for batch in stage.epoch(0, 0, 1).iterate(0)]
    assert len(set(read)) == len(read) > 1


def test_a_run_that_is_resumed_reads_the_same_text(fresh_model, utterances):
    whole = list(make_stage(fresh_model, utterances).epoch(1, 0, 1).iterate(0))
    rest = list(make_stage(fresh_model, utterances).epoch(1, 0, 1).iterate(1))
    assert len(rest) == len(whole) - 1
    for one, other in zip(whole[1:], rest, strict=True):
        assert torch.equal(one["text"]["input_ids"], other["text"]["input_ids"])
        assert torch.equal(one["text"]["heard"], other["text"]["heard"])


def test_text_is_read_with_the_errors_of_the_ctc_head(fresh_model, utterances):
    model, _ = fresh_model()
    only = 300  # the head hears this token everywhere
    with torch.no_grad():
        model.ctc_head.weight.zero_()
        model.ctc_head.bias.fill_(-9.0)
        model.ctc_head.bias[only] = 9.0
    stage = make_stage(lambda: (model, fresh_model()[1]), utterances, SENTENCES)
    wrong = Counter()
    for epoch in range(8):
        for batch in stage.epoch(epoch, 0, 1).iterate(0):
            for sentence, copy in zip(sentences_in(stage, batch), copies_in(batch), strict=True):
                right = {SILENT, *stage.processor.text_ids(sentence)}
                wrong.update(token for token in copy if token not in right)
    # Besides, a few letters are mistyped and a few tokens drawn at random.
    assert wrong.most_common(1)[0][0] == only
    assert wrong[only] > 2


def test_the_loss_of_text_joins_that_of_speech(fresh_model, utterances):
    stage = make_stage(fresh_model, utterances, text_weight=0.25)
    stage.module.eval()
    batch = next(iter(stage.epoch(0, 0, 1).iterate(0)))
    with torch.no_grad():
        both = stage.module(batch)
        speech = stage.module({k: v for k, v in batch.items() if k != "text"})
        alone = text_loss(
            stage.model.llm, batch["text"], 3, stage.model.config.audio_positions, training=False
        )
    assert both["text_loss"] == alone
    torch.testing.assert_close(both["loss"], speech["loss"] + 0.25 * alone)
    assert "text_loss" not in speech


def test_sentences_that_nobody_says_are_learnt(fresh_model, utterances, tmp_path):
    def unread(stage):
        """Loss of the sentences without a copy of them."""
        sequence = stage.processor.sequences(
            [0] * len(UNSAID), [stage.processor.text_ids(text) for text in UNSAID]
        )
        batch = {**sequence, "heard": torch.zeros(0, dtype=torch.long)}
        with torch.no_grad():
            return float(text_loss(stage.model.llm, batch, 3, "sequence", training=False))

    losses = {}
    for name, text in (("with", UNSAID), ("without", [])):
        stage = make_stage(fresh_model, utterances, text)
        config = LoopConfig(epochs=8, learning_rate=1e-2, warmup_steps=0, precision="fp32")
        assert TrainingLoop(stage, config, tmp_path / name, {}).run()
        losses[name] = unread(stage)
    assert losses["with"] < losses["without"] - 1


def test_text_needs_an_llm_that_learns_and_a_fused_head(fresh_model, utterances):
    with pytest.raises(ValueError, match="text without audio is learnt by the LLM"):
        make_stage(fresh_model, utterances, train_llm=False)
    with pytest.raises(ValueError, match="use --ctc fused"):
        make_stage(fresh_model, utterances, parts={"ctc": "none"})
