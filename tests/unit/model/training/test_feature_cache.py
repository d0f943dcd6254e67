"""Caches: what they hold, what they refuse, and how an interrupted one goes on."""

import dataclasses
import json

import pytest
import torch

from model.checkpoint import CheckpointError
from model.data.audio import load_audio
from model.training import feature_cache
from model.training.caching import CachingConfig, write_cache
from model.training.feature_cache import FeatureCache, fingerprint, merge_clips

CONFIG = CachingConfig(max_batch_audio_s=2.0, precision="fp32")


@pytest.fixture
def cached(fresh_model, utterances, tmp_path):
    model, processor = fresh_model()
    folder = tmp_path / "cache"
    assert write_cache(model, processor, utterances, CONFIG, folder) == len(utterances)
    return model, processor, folder


def test_a_clip_is_what_the_encoder_makes_of_it_alone(cached, utterances):
    model, processor, folder = cached
    cache = FeatureCache(folder, fingerprint(model, processor))
    assert {clip.id for clip in cache.clips} == {f"{number}-0" for number in range(8)}
    for clip in cache.clips:
        utterance = utterances[int(clip.id[0])]
        frames, token_ids = cache[clip]
        waveform = load_audio(utterance.audio)
        with torch.no_grad():
            expected, lens = model.encode(*processor.features([waveform]))
        assert frames.dtype == torch.float16
        assert len(frames) == clip.n_frames == int(lens[0])
        torch.testing.assert_close(frames.float(), expected[0, : lens[0]], atol=4e-3, rtol=2e-3)
        assert token_ids == processor.text_ids(utterance.text)
        assert (clip.text, clip.duration) == (utterance.text, utterance.duration)


def test_augmented_copies_differ_from_the_plain_one_and_repeat(fresh_model, utterances, tmp_path):
    model, processor = fresh_model()
    config = CachingConfig(augmented_copies=1, seed=3)
    caches = []
    for name in ("a", "b"):
        assert write_cache(model, processor, utterances[:3], config, tmp_path / name) == 6
        caches.append(FeatureCache(tmp_path / name, fingerprint(model, processor)))
    clips = {clip.id: clip for clip in caches[0].clips}
    frames = {name: caches[0][clip][0] for name, clip in clips.items()}
    again = {clip.id: caches[1][clip][0] for clip in caches[1].clips}
    for number in range(3):
        plain, varied = frames[f"{number}-0"], frames[f"{number}-1"]
        assert plain.shape != varied.shape or not torch.allclose(plain, varied, atol=1e-3)
        torch.testing.assert_close(varied, again[f"{number}-1"], atol=1e-2, rtol=1e-2)


def test_copies_may_be_played_faster_or_slower_throughout(fresh_model, utterances, tmp_path):
    model, processor = fresh_model()
    frames = {}
    for name, speeds in (("slow", (0.5, 0.5)), ("fast", (2.0, 2.0))):
        config = CachingConfig(
            plain_copies=0, augmented_copies=1, speed_share=1.0, speed_range=speeds
        )
        write_cache(model, processor, utterances[:1], config, tmp_path / name)
        (clip,) = FeatureCache(tmp_path / name, fingerprint(model, processor)).clips
        frames[name] = clip.n_frames
    assert frames["slow"] > 2 * frames["fast"]


@pytest.mark.parametrize("what", ["encoder", "encoder_mode", "tokenizer"])
def test_a_cache_of_another_maker_is_refused_by_name(cached, fresh_model, utterances, what):
    model, processor, folder = cached
    if what == "encoder":
        model.encoder.conv1.weight.data[0, 0, 0] += 1e-3
    elif what == "encoder_mode":
        model, processor = fresh_model(encoder_mode="padded")
    else:
        processor.tokenizer.add_tokens(["новый"])
    with pytest.raises(CheckpointError, match=f"made with another {what}; make it again"):
        FeatureCache(folder, fingerprint(model, processor))
    with pytest.raises(CheckpointError, match=f"made with another {what}"):
        write_cache(model, processor, utterances, CONFIG, folder)


def test_an_interrupted_cache_goes_on_after_its_last_whole_shard(
    fresh_model, utterances, tmp_path, monkeypatch
):
    monkeypatch.setattr(feature_cache, "SHARD_BYTES", 1)  # a shard a clip
    model, processor = fresh_model()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    write_cache(model, processor, utterances, CONFIG, whole)

    encoded = []
    encode = model.encode

    def encode_until_killed(features, lens):
        encoded.append(len(features))
        if len(encoded) == 3:
            raise KeyboardInterrupt
        return encode(features, lens)

    model.encode = encode_until_killed
    with pytest.raises(KeyboardInterrupt):
        write_cache(model, processor, utterances, CONFIG, killed)
    n_done = sum(encoded[:2])
    unfinished = FeatureCache(killed, fingerprint(model, processor))
    assert len(unfinished.clips) == n_done
    with pytest.raises(CheckpointError, match="this cache is not finished; repeat"):
        merge_clips([unfinished])
    orphan = killed / f"frames-{n_done:05d}.safetensors"
    orphan.write_bytes(b"half a shard")
    encoded[:] = [0] * 3
    write_cache(model, processor, utterances, CONFIG, killed)
    assert sum(encoded) == len(utterances) - n_done
    found = FeatureCache(killed, fingerprint(model, processor))
    expected = FeatureCache(whole, fingerprint(model, processor))
    assert len(merge_clips([found])) == len(utterances)
    assert len({clip.shard for clip in found.clips}) == len(utterances)
    rows = {clip.id: found[clip] for clip in found.clips}
    for clip in expected.clips:
        frames, token_ids = expected[clip]
        torch.testing.assert_close(rows[clip.id][0], frames, atol=4e-3, rtol=2e-3)
        assert rows[clip.id][1] == token_ids


@pytest.mark.parametrize("change", ["order", "text", "seed"])
def test_a_cache_does_not_go_on_with_another_source(cached, utterances, change):
    model, processor, folder = cached
    config, others = CONFIG, list(utterances)
    if change == "order":
        others.reverse()
    elif change == "text":
        others[0] = dataclasses.replace(others[0], text="other words")
    else:
        config = CONFIG.model_copy(update={"seed": 7})
    with pytest.raises(CheckpointError, match="another manifest, seed or noise"):
        write_cache(model, processor, others, config, folder)


def test_more_copies_are_added_to_a_cache(cached, utterances):
    model, processor, folder = cached
    config = CONFIG.model_copy(update={"augmented_copies": 1})
    assert write_cache(model, processor, utterances, config, folder) == 16


def test_damage_is_named(cached, tmp_path):
    model, processor, folder = cached
    identity = fingerprint(model, processor)
    with pytest.raises(CheckpointError, match="holds no feature cache"):
        FeatureCache(tmp_path, identity)
    (folder / "frames-00000.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"names frames-00000\.safetensors, which is not"):
        FeatureCache(folder, identity)
    (folder / "index.json").write_text('{"clips": [')
    with pytest.raises(CheckpointError, match=r"index\.json: not the index of a feature cache"):
        FeatureCache(folder, identity)
    (folder / "index.json").write_text(json.dumps({"clips": [{"id": "0-0"}]}))
    with pytest.raises(CheckpointError, match="not the index"):
        FeatureCache(folder, identity)


def test_several_caches_are_one(cached):
    model, processor, folder = cached
    cache = FeatureCache(folder, fingerprint(model, processor))
    assert len(merge_clips([cache, cache])) == 2 * len(cache.clips)


def test_nothing_to_cache_is_refused(fresh_model, utterances, tmp_path):
    model, processor = fresh_model()
    unlabelled = [dataclasses.replace(u, text=None) for u in utterances]
    with pytest.raises(ValueError, match="none of 8 utterances has a text and fits"):
        write_cache(model, processor, unlabelled, CONFIG, tmp_path / "cache")
