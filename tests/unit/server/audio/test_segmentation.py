import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.audio import segmentation
from server.audio.clip import Excerpt, Progress
from server.audio.segmentation import Hysteresis, Segmenter, excerpts
from server.audio.vad import FRAME_SAMPLES
from tests.recordings import speechlike

MAX_FRAMES = 60


class ScriptedDetector:
    """Says of each frame what its first sample says."""

    def push(self, frames):
        return frames[:, 0]


def recording(probabilities, tail, seed=0):
    """Samples of which each frame's first is its probability; the last frame may be short."""
    frames = np.random.default_rng(seed).normal(0, 0.1, (len(probabilities), FRAME_SAMPLES))
    frames[:, 0] = probabilities
    samples = frames.astype(np.float32).reshape(-1)
    return samples[: len(samples) - tail]


def cut(samples, blocks, detector):
    segmenter = Segmenter(MAX_FRAMES * FRAME_SAMPLES, detector)
    edges = [0, *sorted(min(each, len(samples)) for each in blocks), len(samples)]
    found = []
    for start, stop in itertools.pairwise(edges):
        found += segmenter.push(samples[start:stop])
        assert len(segmenter._samples) <= (MAX_FRAMES + 1) * FRAME_SAMPLES + (stop - start)
    return [*found, *segmenter.finish()]


speaking = st.lists(
    st.tuples(st.sampled_from([0.0, 0.4, 1.0]), st.integers(1, 90)), min_size=1, max_size=12
).map(lambda runs: [value for value, length in runs for _ in range(length)])


def spoken(probabilities):
    """Frames of speech that has to be transcribed: what no pause parts from enough speech."""
    is_speech = Hysteresis()
    frames = [i for i, value in enumerate(probabilities) if is_speech.push(value)]
    groups = []
    for frame in frames:
        if groups and frame - groups[-1][-1] <= segmentation._PAUSE_FRAMES:
            groups[-1].append(frame)
        else:
            groups.append([frame])
    return [f for group in groups if len(group) >= segmentation._MIN_SPEECH_FRAMES for f in group]


@given(
    speaking,
    st.integers(0, FRAME_SAMPLES - 1),
    st.lists(st.integers(0, 300_000), max_size=9),
    st.booleans(),
)
def test_every_sample_of_speech_is_in_exactly_one_excerpt_at_its_place(
    probabilities, tail, blocks, finds_speech
):
    samples = recording(probabilities, tail)
    found = cut(samples, blocks, ScriptedDetector() if finds_speech else None)
    times_given = np.zeros(len(samples), int)
    for each in found:
        stop = each.start + len(each.waveform)
        np.testing.assert_array_equal(each.waveform, samples[each.start : stop])
        assert 0 < len(each.waveform) <= MAX_FRAMES * FRAME_SAMPLES
        assert each.start <= each.speech_start < each.speech_end <= stop
        times_given[each.start : stop] += 1
    assert times_given.max(initial=0) <= 1
    wanted = spoken(probabilities) if finds_speech else range(len(probabilities))
    for frame in wanted:
        assert times_given[frame * FRAME_SAMPLES : (frame + 1) * FRAME_SAMPLES].all()
    if finds_speech and not wanted:
        assert not found


@given(speaking, st.lists(st.integers(0, 300_000), max_size=9))
def test_excerpts_do_not_depend_on_the_blocks_the_recording_comes_in(probabilities, blocks):
    samples = recording(probabilities, 100)
    whole, parts = (cut(samples, edges, ScriptedDetector()) for edges in ([], blocks))
    assert [(e.start, len(e.waveform)) for e in whole] == [
        (e.start, len(e.waveform)) for e in parts
    ]


def test_a_speaker_who_does_not_pause_is_cut_at_the_quietest_point():
    samples = recording([1.0] * (MAX_FRAMES + 30), 0)
    samples = samples.reshape(-1, FRAME_SAMPLES)
    samples[[44, 45], 1:] *= 0.01
    first, second = cut(samples.reshape(-1), [], None)
    assert len(first.waveform) == second.start == 45 * FRAME_SAMPLES


def test_speech_soon_after_a_cut_in_a_silence_takes_nothing_from_before_the_cut():
    samples = recording([1.0] * (MAX_FRAMES - 5) + [0.0] * 5 + [1.0] * 20, 0)
    samples = samples.reshape(-1, FRAME_SAMPLES)
    samples[[57, 58], 1:] *= 0.01
    first, second = cut(samples.reshape(-1), [], ScriptedDetector())
    assert first.start + len(first.waveform) == 58 * FRAME_SAMPLES == second.start
    assert second.speech_start == MAX_FRAMES * FRAME_SAMPLES


def test_silence_is_left_out_and_a_pause_parts_excerpts():
    pause = segmentation._PAUSE_FRAMES
    samples = recording([0.0] * 100 + [1.0] * 20 + [0.0] * pause + [1.0] * 20 + [0.0] * 100, 0)
    first, second = cut(samples, [], ScriptedDetector())
    assert first.speech_start == 100 * FRAME_SAMPLES
    assert first.speech_end == 120 * FRAME_SAMPLES
    assert first.start == (100 - segmentation._PADDING_FRAMES) * FRAME_SAMPLES
    assert second.speech_start == (120 + pause) * FRAME_SAMPLES


def test_what_fits_stays_in_one_piece():
    samples = np.concatenate([np.zeros(8000, np.float32), speechlike(3.0), np.zeros(8000, "f4")])
    found = list(
        excerpts(
            [samples[:20_000], samples[20_000:]], whole_samples=len(samples), max_samples=80_000
        )
    )
    (excerpt,) = [each for each in found if isinstance(each, Excerpt)]
    np.testing.assert_array_equal(excerpt.waveform, samples)
    assert excerpt.start == 0
    assert excerpt.speech_start == pytest.approx(8000, abs=4000)
    assert excerpt.speech_end == pytest.approx(len(samples) - 8000, abs=16_000)
    assert found[-1] == Progress(len(samples) / 16_000, is_long=False, is_done=True)


def test_where_speech_need_not_be_placed_it_is_looked_for_no_longer_than_until_it_is_found():
    looked_at = []

    class CountingDetector(ScriptedDetector):
        def push(self, frames):
            looked_at.append(len(frames))
            return super().push(frames)

    samples = recording([0.0] * 40 + [1.0] * 200, 0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(segmentation, "SpeechDetector", CountingDetector)
        found = excerpts(
            [samples], whole_samples=len(samples), max_samples=80_000, places_speech=False
        )
        (excerpt, _) = list(found)
    assert (excerpt.start, excerpt.speech_start, excerpt.speech_end) == (0, 0, len(samples))
    np.testing.assert_array_equal(excerpt.waveform, samples)
    found_at = 40 + segmentation._MIN_SPEECH_FRAMES
    assert found_at <= sum(looked_at) < found_at + segmentation._GLANCE_FRAMES


def test_single_words_that_begin_at_once_are_found(shared_data):
    from model.data.audio import load_audio
    from model.data.manifest import read_manifest

    digits = read_manifest(shared_data / "manifests" / "fsdd_test.jsonl", shared_data)
    heard = [
        any(
            isinstance(each, Excerpt)
            for each in excerpts(
                [load_audio(digit.audio)], whole_samples=80_000, max_samples=80_000
            )
        )
        for digit in digits
    ]
    assert len(heard) > 100
    assert np.mean(heard) > 0.98


@pytest.mark.parametrize("places_speech", [True, False])
@pytest.mark.parametrize("seconds", [1.0, 9.0])
def test_where_nobody_speaks_there_is_no_excerpt(seconds, places_speech):
    rng = np.random.default_rng(0)
    samples = rng.normal(0, 0.2, round(seconds * 16_000)).astype(np.float32)
    found = list(
        excerpts([samples], whole_samples=80_000, max_samples=80_000, places_speech=places_speech)
    )
    assert all(isinstance(each, Progress) for each in found)
    assert found[-1].is_done
    assert found[-1].decoded_s == seconds
    everything = list(
        excerpts([samples], whole_samples=80_000, max_samples=80_000, finds_speech=False)
    )
    lengths = [len(each.waveform) for each in everything if isinstance(each, Excerpt)]
    assert sum(lengths) == len(samples)


def test_a_long_recording_says_so_before_it_is_cut():
    blocks = [speechlike(1.0, seed) for seed in range(12)]
    found = list(excerpts(blocks, whole_samples=80_000, max_samples=64_000))
    assert found[0] == Progress(6.0, is_long=True)
    assert found[-1] == Progress(12.0, is_long=True, is_done=True)
    assert len([each for each in found if isinstance(each, Excerpt)]) >= 2
