import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.data.augmentation import (
    MAX_GAP_S,
    AugmentationConfig,
    FeatureAugmentConfig,
    SpecAugmentConfig,
    WaveformAugmenter,
    add_noise,
    concatenate_utterances,
    feature_augment,
    joined_duration_s,
    plan_concatenation,
    spec_augment,
)

RATE_HZ = 16_000
OFF = AugmentationConfig(
    speed_probability=0,
    padding_probability=0,
    equaliser_probability=0,
    reverberation_probability=0,
    noise_probability=0,
    telephone_probability=0,
    gain_probability=0,
)


def tone(seconds=1.0, hz=440.0, amplitude=0.3):
    times = np.arange(int(seconds * RATE_HZ)) / RATE_HZ
    return (amplitude * np.sin(2 * np.pi * hz * times)).astype(np.float32)


def hiss(seconds=1.0, seed=0, amplitude=0.1):
    noise = np.random.default_rng(seed).normal(0, amplitude, int(seconds * RATE_HZ))
    return noise.astype(np.float32)


def rms(waveform):
    return math.sqrt(np.mean(np.square(waveform, dtype=np.float64)))


def augment(waveform, seed=0, noises=(), **always):
    config = dataclasses.replace(OFF, **always)
    return WaveformAugmenter(config, list(noises))(waveform, np.random.default_rng(seed))


def band_energy(waveform, low_hz, high_hz):
    spectrum = np.abs(np.fft.rfft(waveform)) ** 2
    frequencies = np.fft.rfftfreq(len(waveform), 1 / RATE_HZ)
    return spectrum[(frequencies >= low_hz) & (frequencies < high_hz)].sum() / spectrum.sum()


def test_nothing_happens_when_everything_is_off():
    np.testing.assert_array_equal(augment(hiss()), hiss())


def test_the_same_generator_state_gives_the_same_clip_and_another_a_different_one():
    augmenter = WaveformAugmenter(AugmentationConfig(noise_probability=1.0), [hiss(0.3, 1)])
    first, again, other = (augmenter(tone(), np.random.default_rng(seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert len(first) != len(other) or not np.array_equal(first, other)


def test_the_input_is_left_as_it_was():
    waveform = hiss()
    augment(waveform, noise_probability=1.0, gain_probability=1.0)
    np.testing.assert_array_equal(waveform, hiss())


@settings(deadline=None)
@given(
    st.integers(1, 20_000),
    st.sampled_from(["zeros", "hiss", "loud", "spike", "tiny"]),
    st.integers(0, 2**31),
)
def test_result_is_finite_mono_float32_within_full_scale(n_samples, kind, seed):
    waveform = np.zeros(n_samples, dtype=np.float32)
    if kind in {"hiss", "loud", "tiny"}:
        waveform += np.random.default_rng(seed).standard_normal(n_samples, dtype=np.float32)
        waveform *= np.float32({"hiss": 0.1, "loud": 1e30, "tiny": 1e-30}[kind])
    if kind == "spike":
        waveform[n_samples // 2] = 1.0
    config = AugmentationConfig(
        speed_probability=0.7,
        padding_probability=0.7,
        equaliser_probability=0.7,
        reverberation_probability=0.7,
        noise_probability=0.7,
        telephone_probability=0.7,
    )
    result = WaveformAugmenter(config, [hiss(0.05)])(waveform, np.random.default_rng(seed))
    assert result.dtype == np.float32
    assert result.ndim == 1
    assert len(result) > 0
    assert np.isfinite(result).all()
    assert np.abs(result).max() <= 1.0


def test_speed_changes_length_and_pitch_together():
    fast = augment(tone(2.0), speed_probability=1.0, speed_range=(1.25, 1.25))
    assert len(fast) == pytest.approx(2.0 / 1.25 * RATE_HZ, abs=2)
    assert band_energy(fast, 540, 560) > 0.95


@pytest.mark.parametrize("seconds", [9.5, 10.0, 11.0])
def test_a_clip_is_not_slowed_down_beyond_the_longest_duration(seconds):
    config = {"speed_range": (0.5, 1.05), "max_duration_s": 10.0, "speed_probability": 1.0}
    for seed in range(20):
        result = augment(hiss(seconds), seed=seed, **config)
        assert len(result) <= max(seconds, 10.0) * RATE_HZ + 1


def test_padding_leaves_the_clip_whole_in_near_silence():
    speech = tone(1.0)
    padded = augment(speech, padding_probability=1.0, padding_s=(0.5, 0.5), padding_db=(40.0, 40.0))
    assert len(padded) == 2 * RATE_HZ
    np.testing.assert_array_equal(padded[RATE_HZ // 2 : -RATE_HZ // 2], speech)
    for side in (padded[: RATE_HZ // 2], padded[-RATE_HZ // 2 :]):
        assert 0 < rms(side) < rms(speech) / 30


@pytest.mark.parametrize("seconds", [9.5, 10.0, 11.0])
def test_a_clip_is_not_padded_beyond_the_longest_duration(seconds):
    for seed in range(20):
        padded = augment(hiss(seconds), seed, padding_probability=1.0, max_duration_s=10.0)
        assert seconds * RATE_HZ <= len(padded) <= max(seconds, 10.0) * RATE_HZ


def test_an_equaliser_moves_each_frequency_by_no_more_than_was_asked_for():
    noise = hiss(4.0)
    filtered = augment(noise, seed=1, equaliser_probability=1.0, equaliser_db=6.0)
    assert len(filtered) == len(noise)
    bands = np.geomspace(62.5, 8_000, 15)
    before, after = (
        np.array(
            [band_energy(clip, *edges) * rms(clip) ** 2 for edges in itertools.pairwise(bands)]
        )
        for clip in (noise, filtered)
    )
    moved_db = 10 * np.log10(after / before)
    assert np.abs(moved_db).max() < 6.5
    assert np.ptp(moved_db) > 1.0


@pytest.mark.parametrize("snr_db", [0.0, 10.0, 25.0])
def test_noise_is_added_at_the_ratio_that_was_asked_for(snr_db):
    speech, noise = tone(), hiss()
    added = add_noise(speech, noise, snr_db) - speech
    assert 20 * math.log10(rms(speech) / rms(added)) == pytest.approx(snr_db, abs=0.1)


def test_noise_of_a_recording_is_repeated_to_the_clips_length():
    speech = tone(1.0, hz=1_000)
    noisy = augment(
        speech,
        seed=1,
        noises=[tone(0.1, hz=3_000)],
        noise_probability=1.0,
        noise_snr_db=(0.0, 0.0),
    )
    assert len(noisy) == len(speech)
    for part in np.split(noisy, 4):
        assert band_energy(part, 2_900, 3_100) == pytest.approx(0.5, abs=0.05)


def test_silence_becomes_quiet_noise_and_not_nothing():
    noisy = augment(np.zeros(RATE_HZ, np.float32), noise_probability=1.0, noise_snr_db=(0.0, 0.0))
    assert rms(noisy) == pytest.approx(1e-3, rel=0.05)


def test_silent_stretch_of_a_noise_adds_nothing():
    np.testing.assert_array_equal(add_noise(tone(), np.zeros(RATE_HZ, np.float32), 5.0), tone())


def test_reverberation_keeps_length_and_loudness_and_fills_the_pause_after_a_sound():
    waveform = np.concatenate([hiss(0.5), np.zeros(RATE_HZ // 2, np.float32)])
    wet = augment(
        waveform,
        reverberation_probability=1.0,
        reverberation_time_s=(0.4, 0.4),
        direct_to_reverberant_db=(0.0, 0.0),
    )
    assert len(wet) == len(waveform)
    assert rms(wet) == pytest.approx(rms(waveform), rel=0.01)
    levels = [rms(part) for part in np.split(wet[RATE_HZ // 2 :], 10)]
    assert levels[0] > 1e-2
    # T60 is 0.4 s, so 0.1 s (two parts) later the level is 15 dB lower.
    assert 20 * math.log10(levels[1] / levels[3]) == pytest.approx(15, abs=3)
    assert levels[-1] < 1e-4


def test_telephone_removes_what_is_above_4_khz_and_keeps_the_length():
    waveform = hiss(1.00003)
    narrow = augment(waveform, telephone_probability=1.0)
    assert len(narrow) == len(waveform)
    assert band_energy(narrow, 4_100, 8_000) < 1e-3
    assert band_energy(waveform, 4_100, 8_000) > 0.4


def test_gain_is_applied_but_held_back_where_it_would_clip():
    quiet = augment(tone(), gain_probability=1.0, gain_db=(-6.0, -6.0))
    assert rms(quiet) / rms(tone()) == pytest.approx(10 ** (-6 / 20), rel=1e-3)
    loud = augment(tone(), gain_probability=1.0, gain_db=(40.0, 40.0))
    np.testing.assert_allclose(loud, tone() / np.abs(tone()).max(), atol=1e-5)


@pytest.mark.parametrize(
    "waveform",
    [np.zeros(0, np.float32), np.zeros((2, 9), np.float32), np.array([0, np.nan], np.float32)],
)
def test_what_is_no_clip_is_refused_as_waveform_and_as_noise(waveform):
    with pytest.raises(ValueError, match="waveform"):
        augment(waveform)
    with pytest.raises(ValueError, match="noise 0"):
        WaveformAugmenter(OFF, [waveform])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("speed_probability", 1.1),
        ("noise_probability", -0.1),
        ("gain_probability", float("nan")),
        ("speed_range", (0.0, 1.0)),
        ("speed_range", (1.1, 0.9)),
        ("noise_snr_db", (5.0, float("inf"))),
        ("reverberation_time_s", (0.0, 0.1)),
        ("max_duration_s", 0.0),
        ("padding_s", (-0.1, 0.1)),
        ("equaliser_db", -1.0),
    ],
)
def test_configuration_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        AugmentationConfig(**{field: value})


def test_joined_clips_keep_their_samples_order_and_texts_around_pauses():
    clips = [(hiss(0.5, 1), "нэг"), (hiss(0.3, 2), ""), (hiss(0.4, 3), "хоёр")]
    joined, text = concatenate_utterances(clips, np.random.default_rng(0), max_duration_s=30.0)
    assert text == "нэг хоёр"
    assert joined.dtype == np.float32
    spoken = np.concatenate([waveform for waveform, _ in clips])
    np.testing.assert_array_equal(joined[joined != 0], spoken[spoken != 0])
    assert 2 * 0.05 <= len(joined) / RATE_HZ - 1.2 <= 2 * MAX_GAP_S
    np.testing.assert_array_equal(joined[: len(clips[0][0])], clips[0][0])


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=9), st.floats(0.02, 3.0), st.integers(0, 99)
)
def test_joined_audio_and_text_always_belong_together(tenths, max_duration_s, seed):
    clips = [(np.full(n * 160, n, np.float32), str(i)) for i, n in enumerate(tenths)]
    joined, text = concatenate_utterances(clips, np.random.default_rng(seed), max_duration_s)
    kept = [int(word) for word in text.split()]
    assert kept == list(range(len(kept)))
    assert kept
    assert np.count_nonzero(joined) == sum(tenths[i] * 160 for i in kept)
    assert len(kept) == 1 or len(joined) <= max_duration_s * RATE_HZ


def test_joining_nothing_is_refused():
    with pytest.raises(ValueError, match="no utterances"):
        concatenate_utterances([], np.random.default_rng(0), 30.0)


def plan(durations_s, groups=None, seed=0, **options):
    usual = {"probability": 0.5, "max_duration_s": 20.0}
    groups = ["mn"] * len(durations_s) if groups is None else groups
    rng = np.random.default_rng(seed)
    return plan_concatenation(durations_s, groups, **{**usual, **options}, rng=rng)


@given(
    st.lists(
        st.tuples(st.floats(0.1, 25.0), st.sampled_from(["en", "mn", ("mn", "s1")])), max_size=60
    ),
    st.floats(0, 1),
    st.floats(1.0, 30.0),
    st.integers(2, 9),
    st.integers(0, 99),
)
def test_plan_uses_each_utterance_once_within_its_group_and_the_limits(
    utterances, probability, max_duration_s, max_parts, seed
):
    durations_s = [duration for duration, _ in utterances]
    groups = [group for _, group in utterances]
    examples = plan(
        durations_s,
        groups,
        seed,
        probability=probability,
        max_duration_s=max_duration_s,
        max_parts=max_parts,
    )
    assert sorted(i for example in examples for i in example) == list(range(len(utterances)))
    for example in examples:
        assert len({groups[i] for i in example}) == 1
        assert len(example) <= max_parts
        joined_s = joined_duration_s(durations_s[i] for i in example)
        assert len(example) == 1 or joined_s <= max_duration_s


def test_about_the_asked_share_of_long_utterances_is_joined_in_twos_and_threes():
    examples = plan([4.0] * 2_000, probability=0.3)
    joined = [example for example in examples if len(example) > 1]
    assert sum(map(len, joined)) / 2_000 == pytest.approx(0.3, abs=0.05)
    assert {len(example) for example in joined} == {2, 3}


def test_short_words_form_strings_of_every_length_even_at_a_low_probability():
    examples = plan([0.5] * 2_000, probability=0.1)
    sizes = [len(example) for example in examples]
    assert set(sizes) == set(range(1, 9))
    assert sum(size for size in sizes if size > 1) / 2_000 == pytest.approx(0.6, abs=0.05)


def test_plan_is_a_function_of_the_generator():
    durations_s = [1.0, 3.0] * 50
    assert plan(durations_s, seed=1) == plan(durations_s, seed=1)
    assert plan(durations_s, seed=1) != plan(durations_s, seed=2)


def test_probability_zero_joins_nothing_short_words_neither():
    assert plan([0.5, 0.5, 4.0], probability=0) == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"probability": 1.5}, "probability"),
        ({"max_parts": 1}, "max_parts"),
        ({"groups": ["en"]}, "2 durations but 1 groups"),
    ],
)
def test_impossible_plan_is_refused(options, fault):
    with pytest.raises(ValueError, match=fault):
        plan([1.0, 1.0], **options)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def log_mel_batch():
    torch.manual_seed(0)
    return torch.randn(3, 80, 400), torch.tensor([400, 150, 7])


def masked_places(before, after):
    return before != after


def test_spec_augment_masks_whole_bands_and_stretches_with_the_clips_mean():
    log_mel, lens = log_mel_batch()
    masked = spec_augment(log_mel, lens, SpecAugmentConfig(), generator())
    for before, after, length in zip(log_mel, masked, lens.tolist(), strict=True):
        changed = masked_places(before, after)[:, :length]
        bands, stretches = changed.all(dim=1), changed.all(dim=0)
        assert torch.equal(changed, bands[:, None] | stretches[None, :])
        mean = before[:, :length].mean()
        torch.testing.assert_close(after[:, :length][changed], mean.expand(int(changed.sum())))
    assert masked_places(log_mel, masked)[0].any()


def test_spec_augment_leaves_padding_alone_and_stays_within_its_widths():
    log_mel, lens = log_mel_batch()
    config = SpecAugmentConfig(
        frequency_masks=1,
        max_frequency_bins=10,
        time_masks=2,
        max_time_share=0.1,
        max_time_frames=20,
    )
    widest_band = widest_share = 0
    for seed in range(100):
        changed = masked_places(log_mel, spec_augment(log_mel, lens, config, generator(seed)))
        for row, length in zip(changed, lens.tolist(), strict=True):
            assert not row[:, length:].any()
            band = int(row[:, :length].all(dim=1).sum())
            stretch = int(row[:, :length].all(dim=0).sum())
            assert band <= 10
            assert stretch <= 2 * min(0.1 * length, 20)
            widest_band = max(widest_band, band)
            widest_share = max(widest_share, stretch / length)
    assert widest_band == 10
    assert widest_share > 0.1


def test_spec_augment_of_a_clip_does_not_depend_on_its_padding():
    log_mel, lens = log_mel_batch()
    padded = torch.nn.functional.pad(log_mel, (0, 100), value=float("nan"))
    config = SpecAugmentConfig()
    alone = spec_augment(log_mel, lens, config, generator())
    torch.testing.assert_close(spec_augment(padded, lens, config, generator())[..., :400], alone)


def test_masks_switched_off_change_nothing():
    log_mel, lens = log_mel_batch()
    config = SpecAugmentConfig(frequency_masks=0, time_masks=0)
    assert torch.equal(spec_augment(log_mel, lens, config, generator()), log_mel)
    frames = log_mel.transpose(1, 2)
    plain = FeatureAugmentConfig(time_masks=0, dropout=0.0, noise_std=0.0)
    assert torch.equal(feature_augment(frames, lens, plain, generator()), frames)


def test_tensor_augmentation_is_a_function_of_the_generator_and_spares_its_input():
    log_mel, lens = log_mel_batch()
    kept = log_mel.clone()
    frames = log_mel.transpose(1, 2)
    for function, features, config in (
        (spec_augment, log_mel, SpecAugmentConfig()),
        (feature_augment, frames, FeatureAugmentConfig()),
    ):
        first, again, other = (
            function(features, lens, config, generator(seed)) for seed in (1, 1, 2)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        torch.manual_seed(5)
        default = function(features, lens, config)
        torch.manual_seed(5)
        assert torch.equal(function(features, lens, config), default)
    assert torch.equal(log_mel, kept)


def frames_batch(dtype=torch.float32):
    torch.manual_seed(0)
    return (3 * torch.randn(2, 300, 64) + 1).to(dtype), torch.tensor([300, 120])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_feature_noise_is_in_units_of_the_clips_own_deviation(dtype):
    frames, lens = frames_batch(dtype)
    frames[1] *= 10
    config = FeatureAugmentConfig(time_masks=0, dropout=0.0, noise_std=0.2)
    noisy = feature_augment(frames, lens, config, generator())
    assert noisy.dtype == dtype
    for before, after, length in zip(frames, noisy, lens.tolist(), strict=True):
        clean, added = before[:length].float(), (after - before)[:length].float()
        assert added.std() / clean.std() == pytest.approx(0.2, rel=0.1)


def test_an_outlying_dimension_does_not_drown_the_others_in_noise():
    frames, lens = frames_batch()
    frames[:, :, 7] = 1000 * frames[:, :, 7] + 5000
    config = FeatureAugmentConfig(time_masks=0, dropout=0.0, noise_std=0.2)
    added = (feature_augment(frames, lens, config, generator()) - frames)[0]
    ratios = added.std(dim=0) / frames[0].std(dim=0)
    assert ratios.min() > 0.15
    assert ratios.max() < 0.25


def test_feature_dropout_sets_dimensions_to_their_mean_in_a_whole_clip():
    frames, lens = frames_batch()
    config = FeatureAugmentConfig(time_masks=0, dropout=0.25, noise_std=0.0)
    dropped = feature_augment(frames, lens, config, generator())
    for before, after, length in zip(frames, dropped, lens.tolist(), strict=True):
        gone = after[:length].std(dim=0) < 1e-5
        assert 0.05 < gone.float().mean() < 0.5
        torch.testing.assert_close(after[0, gone], before[:length, gone].mean(dim=0))
        torch.testing.assert_close(after[:length, ~gone], before[:length, ~gone])


def test_feature_masks_are_stretches_of_the_mean_and_padding_stays_untouched():
    frames, lens = frames_batch()
    frames[1, 120:] = float("nan")
    config = FeatureAugmentConfig(
        time_masks=2, max_time_share=0.1, max_time_frames=9, dropout=0.0, noise_std=0.0
    )
    augmented = feature_augment(frames, lens, config, generator(1))
    assert torch.isnan(augmented[1, 120:]).all()
    means = torch.stack([row[:n].mean(dim=0) for row, n in zip(frames, lens, strict=True)])
    silent = torch.isclose(augmented, means[:, None], atol=1e-4).all(dim=2)
    assert 0 < int(silent[0].sum()) <= 18
    assert int(silent[1].sum()) <= 18
    assert not torch.isnan(augmented[1, :120]).any()


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (SpecAugmentConfig, "time_masks", -1),
        (SpecAugmentConfig, "max_time_share", 1.5),
        (FeatureAugmentConfig, "dropout", 1.0),
        (FeatureAugmentConfig, "noise_std", -0.1),
        (FeatureAugmentConfig, "noise_std", float("nan")),
        (FeatureAugmentConfig, "max_time_frames", -1),
    ],
)
def test_mask_configuration_out_of_range_is_refused_by_name(config, field, value):
    with pytest.raises(ValueError, match=field):
        config(**{field: value})
