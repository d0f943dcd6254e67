"""A fine-tuned Whisper teaches a speech LLM that writes the same tokens."""

import pytest
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from model.checkpoint import CheckpointError
from model.training.caching import CachingConfig, write_cache
from model.training.connector import ConnectorStage, ConnectorStageConfig
from model.training.distillation import WhisperTeacher
from model.training.feature_cache import FeatureCache, fingerprint, merge_clips
from model.training.speech_data import SpeechDataConfig
from model.training.tokenizer import train_tokenizer
from tests.conftest import SENTENCES

TARGETS = [[40, 41, 42], [], [43]]


@pytest.fixture
def teacher_folder(tmp_path, fresh_model):
    """Make a Whisper; with a model, its encoder is the model's."""

    def make(model=None, lines=SENTENCES, mode="trimmed"):
        tokenizer = train_tokenizer(lines * 4, vocab_size=320)
        torch.manual_seed(1)
        config = WhisperConfig(
            d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64,
            decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=64,
            vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=2, eos_token_id=2,
            decoder_start_token_id=1, init_std=0.5, encoder_mode=mode,
        )  # fmt: skip
        whisper = WhisperForConditionalGeneration(config)
        if model is not None:
            whisper.model.encoder.load_state_dict(model.encoder.state_dict())
        folder = tmp_path / "teacher"
        whisper.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        WhisperFeatureExtractor().save_pretrained(folder)
        return str(folder)

    return make


def make_stage(fresh_model, train, **fields):
    model, processor = fresh_model(max_tokens_per_audio_s=50.0)
    data = SpeechDataConfig(max_batch_audio_s=2.5, workers=0)
    plain = {"feature_augment": False, "spec_augment": False}
    config = ConnectorStageConfig(**{**plain, **fields}, data=data)
    return ConnectorStage(model, processor, config, train, [], 0)


def test_probabilities_are_those_of_each_clip_alone(fresh_model, teacher_folder):
    teacher = WhisperTeacher(teacher_folder(), fresh_model()[1])
    frames = torch.randn(3, 20, 32, generator=torch.Generator().manual_seed(0))
    lens = torch.tensor([20, 7, 12])
    together = teacher.probabilities(frames, lens, TARGETS, 320)
    alone = [
        teacher.probabilities(frames[i : i + 1, :length], lens[i : i + 1], TARGETS[i : i + 1], 320)
        for i, length in enumerate(lens.tolist())
    ]
    assert together.shape == (sum(len(ids) + 1 for ids in TARGETS), 320)
    torch.testing.assert_close(together, torch.cat(alone))
    torch.testing.assert_close(together.sum(-1), torch.ones(len(together)))


def test_an_llm_may_have_more_embeddings_than_its_teacher_has_tokens(fresh_model, teacher_folder):
    teacher = WhisperTeacher(teacher_folder(), fresh_model()[1])
    frames, lens = torch.randn(3, 20, 32), torch.tensor([20, 7, 12])
    wide = teacher.probabilities(frames, lens, TARGETS, 384)
    assert wide.shape[1] == 384
    torch.testing.assert_close(wide[:, :320], teacher.probabilities(frames, lens, TARGETS, 320))
    assert not wide[:, 320:].any()


def test_what_is_too_long_for_the_teacher_is_not_taught(fresh_model, teacher_folder):
    teacher = WhisperTeacher(teacher_folder(), fresh_model()[1])
    frames, lens = torch.randn(2, 20, 32), torch.tensor([20, 20])
    taught = teacher.probabilities(frames, lens, [[40] * 500, [43]], 320).sum(-1)
    assert len(taught) == 501 + 2
    n_taught = int(taught[:501].sum().round())
    assert 440 < n_taught <= 448
    torch.testing.assert_close(taught[:n_taught], torch.ones(n_taught))
    assert not taught[n_taught:501].any()
    torch.testing.assert_close(taught[501:], torch.ones(2))


def test_training_pulls_the_llm_towards_its_teacher(fresh_model, utterances, teacher_folder):
    folder = teacher_folder()
    stage = make_stage(
        fresh_model, utterances, train_llm=True, teacher=folder, teacher_weight=1.0, ctc_weight=0.0
    )
    batch = next(iter(stage.epoch(0, 0, 1).iterate(0)))
    optimiser = torch.optim.AdamW(
        [p for group in stage.parameter_groups() for p in group["params"]], lr=3e-3
    )
    stage.module.train()
    losses = []
    for _ in range(30):
        loss = stage.module(batch)["loss"]
        losses.append(loss.item())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < losses[0] - 0.5
    # Validation asks for the transcript, not for the teacher's opinion.
    assert stage.module.eval()(batch)["loss"].item() != pytest.approx(losses[-1], rel=0.05)


def test_from_a_cache_and_from_audio_the_teacher_says_the_same(
    fresh_model, utterances, teacher_folder, tmp_path
):
    model, processor = fresh_model(max_tokens_per_audio_s=50.0)
    folder = teacher_folder(model)
    write_cache(model, processor, utterances, CachingConfig(precision="fp32"), tmp_path / "cache")
    cached = merge_clips([FeatureCache(tmp_path / "cache", fingerprint(model, processor))])
    losses = []
    for train in (utterances, cached):
        stage = make_stage(fresh_model, train, teacher=folder, teacher_weight=1.0)
        stage.module.train()
        total = {tuple(map(tuple, b["target_ids"])): stage.module(b)["loss"].item()
                 for b in stage.epoch(0, 0, 1).iterate(0)}  # fmt: skip
        losses.append(sum(total.values()) / len(total))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)  # fp16 frames


def test_a_teacher_of_other_tokens_is_refused(fresh_model, utterances, teacher_folder):
    folder = teacher_folder(lines=["Quite another text, with other letters."])
    with pytest.raises(ValueError, match="its tokens are not the LLM's"):
        make_stage(fresh_model, utterances, teacher=folder)


def test_a_teacher_with_another_encoder_than_the_cache_s_is_refused(
    fresh_model, utterances, teacher_folder, tmp_path
):
    model, processor = fresh_model(max_tokens_per_audio_s=50.0)
    write_cache(model, processor, utterances, CachingConfig(precision="fp32"), tmp_path / "cache")
    cached = merge_clips([FeatureCache(tmp_path / "cache", fingerprint(model, processor))])
    with pytest.raises(ValueError, match="its encoder is not the one of the cache"):
        make_stage(fresh_model, cached, teacher=teacher_folder())


def test_a_teacher_in_another_encoder_mode_is_refused(fresh_model, utterances, teacher_folder):
    with pytest.raises(ValueError, match="in mode padded, the speech LLM's in mode trimmed"):
        make_stage(fresh_model, utterances, teacher=teacher_folder(mode="padded"))


def test_a_missing_teacher_is_refused(fresh_model, utterances, tmp_path):
    with pytest.raises((CheckpointError, OSError)):
        make_stage(fresh_model, utterances, teacher=str(tmp_path / "nobody"))
