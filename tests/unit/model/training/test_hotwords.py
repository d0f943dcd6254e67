"""Lists of hotwords in training prompts."""

import numpy as np
import pytest

from model.hotwords import MAX_LISTED
from model.training.connector import ConnectorStage, ConnectorStageConfig
from model.training.hotwords import sample_hotwords
from model.training.speech_data import SpeechDataConfig
from tests.conftest import SENTENCES


def make_stage(fresh_model, utterances, share, **overrides):
    model, processor = fresh_model(**overrides)
    data = SpeechDataConfig(max_batch_audio_s=2.5, workers=0)
    config = ConnectorStageConfig(hotwords_share=share, data=data)
    return ConnectorStage(model, processor, config, utterances, [], 0)


def prompts_of(stage, epoch=0, start=0):
    return [batch["prompts"] for batch in stage.epoch(epoch, 0, 1).iterate(start)]


def test_a_list_holds_own_words_and_distractors():
    rng = np.random.default_rng(0)
    lists = [sample_hotwords(SENTENCES[0], SENTENCES, rng) for _ in range(200)]
    own = {"They", "were", "three", "hundred", "yards", "apart"}
    assert all(len(words) == len(set(words)) <= MAX_LISTED for words in lists)
    assert {word for words in lists for word in words} > own | {"Нягтлан", "pictures"}
    assert any(own.isdisjoint(words) for words in lists)
    assert any(words and own.issuperset(words) for words in lists)
    assert sample_hotwords("", [""], rng) == []


def test_a_share_of_the_prompts_lists_hotwords(fresh_model, utterances):
    stage = make_stage(fresh_model, utterances, 0.5)
    prompts = [p for epoch in range(20) for batch in prompts_of(stage, epoch) for p in batch]
    listed = [prompt for prompt in prompts if " Hotwords: " in prompt]
    # Not every sampled list has a word in it.
    assert 0.3 < len(listed) / len(prompts) < 0.5
    assert stage.processor.prompt_additions == {"hotwords": " Hotwords: {}."}


def test_a_run_that_is_resumed_sees_the_same_lists(fresh_model, utterances):
    stage = make_stage(fresh_model, utterances, 1.0)
    whole = prompts_of(stage)
    assert len(whole) > 2
    assert prompts_of(stage, start=2) == whole[2:]
    assert prompts_of(stage, epoch=1) != whole


def test_without_a_share_nothing_changes(fresh_model, utterances):
    stage = make_stage(fresh_model, utterances, 0.0)
    assert "prompts" not in next(stage.epoch(0, 0, 1).iterate(0))
    assert stage.processor.prompt_additions == {}


def test_a_model_without_a_ctc_head_cannot_learn_them(fresh_model, utterances):
    with pytest.raises(ValueError, match="the model has none"):
        make_stage(fresh_model, utterances, 0.5, ctc="none")
