"""Lists of hotwords, and the text before, in front of training clips."""

import numpy as np
import pytest

from model.hotwords import MAX_LISTED
from model.training.connector import ConnectorStage, ConnectorStageConfig
from model.training.contexts import sample_hotwords
from model.training.speech_data import SpeechDataConfig
from tests.conftest import SENTENCES


def make_stage(fresh_model, utterances, share, previous=0.0, **overrides):
    model, processor = fresh_model(**overrides)
    data = SpeechDataConfig(max_batch_audio_s=2.5, workers=0)
    config = ConnectorStageConfig(
        hotwords_share=share, previous_text_share=previous, data=data, train_llm=True
    )
    return ConnectorStage(model, processor, config, utterances, [], 0)


def contexts_of(stage, epoch=0, start=0):
    return [batch["contexts"] for batch in stage.epoch(epoch, 0, 1).iterate(start)]


def test_a_list_holds_own_words_and_distractors():
    rng = np.random.default_rng(0)
    lists = [sample_hotwords(SENTENCES[0], SENTENCES, rng) for _ in range(200)]
    own = {"They", "were", "three", "hundred", "yards", "apart"}
    assert all(len(words) == len(set(words)) <= MAX_LISTED for words in lists)
    assert {word for words in lists for word in words} > own | {"Нягтлан", "pictures"}
    assert any(own.isdisjoint(words) for words in lists)
    assert any(words and own.issuperset(words) for words in lists)
    assert sample_hotwords("", [""], rng) == []


def test_a_share_of_the_clips_has_hotwords_before_it(fresh_model, utterances):
    stage = make_stage(fresh_model, utterances, 0.5)
    contexts = [c for epoch in range(20) for batch in contexts_of(stage, epoch) for c in batch]
    listed = [context for context in contexts if context.startswith("Hotwords: ")]
    # Not every sampled list has a word in it.
    assert 0.3 < len(listed) / len(contexts) < 0.5
    assert not any(set(contexts) - set(listed) - {""})
    assert stage.processor.context_templates == {"hotwords": "Hotwords: {}.\n"}


def test_a_share_of_the_clips_has_the_text_of_another_before_it(fresh_model, utterances):
    stage = make_stage(fresh_model, utterances, 0.0, previous=0.5)
    batches = [batch for epoch in range(20) for batch in stage.epoch(epoch, 0, 1).iterate(0)]
    n_before = 0
    for batch in batches:
        for own, context in enumerate(batch["contexts"]):
            others = [text for at, text in enumerate(batch["texts"]) if at != own]
            assert context in {"", *(f"Before: {text}\n" for text in others)}
            n_before += bool(context)
    assert n_before > 10
    assert stage.processor.context_templates == {"previous_text": "Before: {}\n"}


def test_a_run_that_is_resumed_sees_the_same_lists(fresh_model, utterances):
    stage = make_stage(fresh_model, utterances, 1.0)
    whole = contexts_of(stage)
    assert len(whole) > 2
    assert contexts_of(stage, start=2) == whole[2:]
    assert contexts_of(stage, epoch=1) != whole


def test_without_a_share_nothing_changes(fresh_model, utterances):
    stage = make_stage(fresh_model, utterances, 0.0)
    assert "contexts" not in next(stage.epoch(0, 0, 1).iterate(0))
    assert stage.processor.context_templates == {}


def test_a_model_without_a_ctc_head_cannot_learn_them(fresh_model, utterances):
    with pytest.raises(ValueError, match="the model has none"):
        make_stage(fresh_model, utterances, 0.5, ctc="none")
