"""The connector stage: what it trains, from audio and from caches."""

import shutil

import pytest
import torch

from model.checkpoint import load_model, load_processor
from model.lexicon import Lexicon
from model.training.caching import CachingConfig, write_cache
from model.training.connector import ConnectorStage, ConnectorStageConfig, LoraSettings
from model.training.feature_cache import FeatureCache, fingerprint, merge_clips
from model.training.loop import LoopConfig, TrainingLoop
from model.training.speech_data import SpeechDataConfig
from model.transcription import Transcriber
from tests.speech_models import cover_only

PLAIN = {"feature_augment": False, "spec_augment": False, "stored_dtype": "fp32"}
DATA = SpeechDataConfig(max_batch_audio_s=2.5, workers=0)


def make_stage(fresh_model, train, dev=(), data=DATA, **fields):
    # Tones are short for their texts.
    model, processor = fresh_model(max_tokens_per_audio_s=50.0)
    config = ConnectorStageConfig(**{**PLAIN, **fields}, data=data)
    return ConnectorStage(model, processor, config, train, list(dev), 0)


def train(stage, folder, **fields):
    settings = {"epochs": 1, "learning_rate": 1e-2, "warmup_steps": 0, "precision": "fp32"}
    loop = TrainingLoop(stage, LoopConfig(**{**settings, **fields}), folder, {})
    assert loop.run()
    return loop


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def moved(before, module):
    return {name for name, tensor in module.state_dict().items() if name not in before
            or not torch.equal(tensor, before[name])}  # fmt: skip


def losses_of(stage):
    stage.module.eval()
    with torch.no_grad():
        return [
            (sorted(map(tuple, batch["target_ids"])), float(stage.module(batch)["loss"]))
            for batch in stage.epoch(0, 0, 1).iterate(0)
        ]


def test_cached_and_uncached_losses_are_equal_without_augmentation(
    fresh_model, utterances, tmp_path
):
    model, processor = fresh_model()
    write_cache(model, processor, utterances, CachingConfig(precision="fp32"), tmp_path / "cache")
    cache = FeatureCache(tmp_path / "cache", fingerprint(model, processor))
    one_clip = SpeechDataConfig(max_batch_audio_s=0.1, workers=0)
    from_audio = losses_of(make_stage(fresh_model, utterances, data=one_clip))
    cached = losses_of(make_stage(fresh_model, merge_clips([cache]), data=one_clip))
    assert len(cached) == len(utterances)
    for (targets, loss), (same_targets, same_loss) in zip(
        sorted(from_audio), sorted(cached), strict=True
    ):
        assert targets == same_targets
        assert same_loss == pytest.approx(loss, rel=5e-3)


def test_only_the_connector_and_the_ctc_head_move(fresh_model, utterances, tmp_path):
    stage = make_stage(fresh_model, utterances)
    before = state_of(stage.model)
    train(stage, tmp_path / "run")
    changed = moved(before, stage.model)
    assert changed == {n for n in before if n.startswith(("connector.", "ctc_head."))}


def test_the_ctc_loss_of_some_tokens_leaves_the_others_out(fresh_model, utterances):
    stage = make_stage(fresh_model, utterances)
    objective, head = stage.module, stage.model.ctc_head
    batch = next(iter(stage.epoch(0, 0, 1).iterate(0)))
    tokens = sorted({token for ids in batch["target_ids"] for token in ids})
    never = [token for token in range(head.vocab_size) if token not in {*tokens, head.blank}]
    objective.eval()
    with torch.no_grad():
        head.bias[never] = -1e4
        expected = objective(batch)["ctc_loss"]
        cover_only(stage.model, tokens)
        torch.testing.assert_close(objective(batch)["ctc_loss"], expected)
        cover_only(fewer := make_stage(fresh_model, utterances).model, tokens[1:])
        assert fewer.ctc_head.out_features == len(tokens)
        others = [[token for token in ids if token != tokens[0]] for ids in batch["target_ids"]]
        stage.model.ctc_head = fewer.ctc_head
        outside = objective(batch)["ctc_loss"]
        assert outside == objective({**batch, "target_ids": others})["ctc_loss"]


def test_cached_features_with_augmentation_and_joined_clips_train(
    fresh_model, utterances, tmp_path
):
    model, processor = fresh_model()
    write_cache(model, processor, utterances, CachingConfig(precision="fp32"), tmp_path / "cache")
    cache = FeatureCache(tmp_path / "cache", fingerprint(model, processor))
    data = DATA.model_copy(update={"concatenation": 0.9})
    stage = make_stage(fresh_model, merge_clips([cache]), data=data, feature_augment=True)
    batches = list(stage.epoch(0, 0, 1).iterate(0))
    assert 0 < sum(len(batch["target_ids"]) for batch in batches) < len(utterances)
    n_frames = sum(int(batch["frame_lens"].sum()) for batch in batches)
    assert n_frames == sum(clip.n_frames for clip in cache.clips)
    stage.module.train()
    noisy = [float(stage.module(batches[0])["loss"].detach()) for _ in range(2)]
    assert noisy[0] != noisy[1]
    train(stage, tmp_path / "run")


def test_audio_with_every_augmentation_trains_the_encoder_and_the_llm(
    fresh_model, utterances, tmp_path
):
    data = DATA.model_copy(update={"augment": True, "concatenation": 0.5})
    stage = make_stage(
        fresh_model, utterances, utterances[:2], data=data, spec_augment=True,
        train_encoder=True, train_llm=True,
    )  # fmt: skip
    before = state_of(stage.model)
    train(stage, tmp_path / "run", precision="bf16")
    parts = {name.split(".")[0] for name in moved(before, stage.model)}
    assert parts == {"encoder", "connector", "ctc_head", "llm"}
    assert all(p.dtype == torch.float32 for p in stage.model.parameters())
    assert load_model(tmp_path / "run").config.llm == "llm"


def test_lora_trains_the_adapter_alone_and_merges_to_the_same_logits(
    fresh_model, utterances, tmp_path
):
    stage = make_stage(fresh_model, utterances, lora=LoraSettings(r=4, dropout=0.1))
    before = state_of(stage.model)
    train(stage, tmp_path / "run")
    changed = {name for name in moved(before, stage.model) if name.startswith("llm.")}
    assert changed
    assert all(".lora_" in name for name in changed)
    merged, adapted = load_model(tmp_path / "run"), load_model(tmp_path / "run", merge_lora=False)
    assert (tmp_path / "run" / "lora" / "adapter_model.safetensors").exists()
    base, _ = fresh_model(max_tokens_per_audio_s=50.0)
    for name, tensor in load_model(tmp_path / "run", merge_lora=False).llm.state_dict().items():
        if ".lora_" not in name:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(tensor, base.llm.state_dict()[plain]), name
    batch = next(stage.epoch(0, 0, 1).iterate(0))
    with torch.no_grad():
        features = load_processor(tmp_path / "run")(
            [batch["waveforms"][0].numpy()], [batch["texts"][0]]
        )
        trained = stage.model.eval()(**features).logits
        torch.testing.assert_close(merged(**features).logits, trained, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(adapted(**features).logits, trained, atol=1e-4, rtol=1e-4)


def test_the_adapter_starts_from_the_seed(fresh_model, utterances):
    stages = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        stages.append(make_stage(fresh_model, utterances, lora=LoraSettings()))
    assert not moved(state_of(stages[0].model), stages[1].model)


def test_a_frozen_part_keeps_out_of_dropout(fresh_model, utterances):
    stage = make_stage(fresh_model, utterances)
    stage.module.train()
    assert stage.model.connector.training
    assert not stage.model.encoder.training
    assert not stage.model.llm.training
    trained = make_stage(fresh_model, utterances, train_llm=True)
    trained.module.train()
    assert trained.model.llm.training


def test_an_overfit_model_says_the_text_and_then_stops(fresh_model, utterances, tmp_path):
    few = [utterances[1], utterances[4], utterances[7]]
    data = SpeechDataConfig(max_batch_audio_s=30.0, workers=0)
    stage = make_stage(fresh_model, few, data=data, train_llm=True, llm_lr_scale=1.0)
    train(stage, tmp_path / "run", epochs=40, learning_rate=5e-3)
    clips = [batch["waveforms"][i, :n].numpy() for batch in stage.epoch(0, 0, 1).iterate(0)
             for i, n in enumerate(batch["sample_lens"])]  # fmt: skip
    texts = [text for batch in stage.epoch(0, 0, 1).iterate(0) for text in batch["texts"]]
    answers = Transcriber.from_pretrained(tmp_path / "run", "cpu").transcribe(clips)
    found = [(answer.text, answer.finish_reason) for answer in answers.transcripts]
    assert found == [(text, "stop") for text in texts]


def test_contradicting_options_are_refused(fresh_model, utterances, tmp_path):
    with pytest.raises(ValueError, match="lora and train_llm exclude each other"):
        make_stage(fresh_model, utterances, lora=LoraSettings(), train_llm=True)
    model, processor = fresh_model()
    write_cache(model, processor, utterances, CachingConfig(precision="fp32"), tmp_path / "cache")
    cache = FeatureCache(tmp_path / "cache", fingerprint(model, processor))
    with pytest.raises(ValueError, match="cannot be trained from cached"):
        make_stage(fresh_model, merge_clips([cache]), train_encoder=True)
    for name in ("hotwords", "previous_text"):
        with pytest.raises(ValueError, match=f"{name} before the audio is learnt by the LLM"):
            make_stage(fresh_model, utterances, **{f"{name}_share": 0.2})


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_layers_train_to_the_same_losses(fresh_model, utterances):
    losses = []
    for compiled in (False, True):
        stage = make_stage(fresh_model, utterances, train_llm=True, compile_layers=compiled)
        batches = list(stage.epoch(0, 0, 1).iterate(0))
        losses.append([stage.module(batch)["loss"].item() for batch in batches])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_label_smoothing_raises_the_training_loss_and_leaves_validation_alone(
    fresh_model, utterances
):
    losses = {}
    for smoothing in (0.0, 0.2):
        stage = make_stage(fresh_model, utterances, label_smoothing=smoothing)
        batch = next(iter(stage.epoch(0, 0, 1).iterate(0)))
        for training in (True, False):
            stage.module.train(training)
            losses[smoothing, training] = stage.module(batch)["loss"].item()
    assert losses[0.2, False] == losses[0.0, False]
    assert losses[0.2, True] != losses[0.0, True]


def test_the_checkpoint_keeps_how_much_its_ctc_head_counts(fresh_model, utterances, tmp_path):
    stage = make_stage(fresh_model, utterances, ctc_decoding_weight=0.9)
    stage.save(tmp_path / "joint")
    assert load_model(tmp_path / "joint").config.ctc_decoding_weight == pytest.approx(0.9)
    joint = fresh_model(ctc_decoding_weight=0.8)
    kept = ConnectorStage(*joint, ConnectorStageConfig(), utterances, [], 0)
    assert kept.model.config.ctc_decoding_weight == pytest.approx(0.8)
    model, processor = fresh_model(ctc_decoding_weight=0.8, lexicon_penalty=2.0)
    model.lexicon = Lexicon(["zero"], 2.0, [b"zero"])
    alone = ConnectorStageConfig(ctc_decoding_weight=0.0)
    ConnectorStage(model, processor, alone, utterances, [], 0).save(tmp_path / "alone")
    assert load_model(tmp_path / "alone").lexicon is None  # which only counts jointly
    with pytest.raises(ValueError, match="the model has none"):
        ConnectorStage(
            *fresh_model(ctc="none"),
            ConnectorStageConfig(ctc_decoding_weight=0.9),
            utterances,
            [],
            0,
        )
