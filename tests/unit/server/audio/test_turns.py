"""Turns in live audio. The detector here hears speech where it is loud."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.audio.turns import (
    TurnBegan,
    TurnEnded,
    TurnFinder,
    TurnGrew,
    TurnPiece,
    VadOptions,
)
from server.audio.vad import FRAME_SAMPLES, SpeechDetector
from tests.recordings import speechlike

RATE = 16_000
NOTHING = np.zeros(0, np.float32)


class LoudnessDetector:
    def push(self, frames):
        return (np.abs(frames).mean(axis=1) > 0.1).astype(np.float32)


def finder(max_s=30.0, growth_s=0.0, detector=None, **options):
    return TurnFinder(
        detector or LoudnessDetector(),
        VadOptions(**options),
        max_samples=int(max_s * RATE),
        growth_samples=int(growth_s * RATE),
    )


def loud(seconds, seed=0):
    """Noise, so that no two samples are alike."""
    samples = np.random.default_rng(seed).uniform(0.3, 0.6, round(seconds * RATE))
    return samples.astype(np.float32)


def quiet(seconds, seed=1):
    return loud(seconds, seed) * np.float32(0.01)


def kinds(events):
    return [type(event) for event in events]


def find(events, kind):
    return [event for event in events if isinstance(event, kind)]


def test_a_turn_begins_with_its_padding_and_ends_after_the_silence():
    samples = np.concatenate([quiet(1.0), loud(1.0), quiet(1.0)])
    events = finder(prefix_padding_ms=320, silence_duration_ms=480).push(samples)
    assert kinds(events) == [TurnBegan, TurnPiece, TurnEnded]
    began, piece, ended = events
    assert began.start / RATE == pytest.approx(1.0 - 0.32, abs=0.04)
    assert ended.end / RATE == pytest.approx(2.0 + 0.256, abs=0.04)
    np.testing.assert_array_equal(piece.waveform, samples[began.start : ended.end])


def test_a_click_is_no_turn():
    samples = np.concatenate([quiet(1.0), loud(0.05), quiet(1.0)])
    assert finder().push(samples) == []


def test_a_pause_shorter_than_the_silence_stays_within_a_turn():
    samples = np.concatenate([loud(1.0), quiet(0.3), loud(1.0), quiet(1.0)])
    assert kinds(finder(silence_duration_ms=500).push(samples)) == [TurnBegan, TurnPiece, TurnEnded]


def test_turns_close_to_each_other_share_no_sample():
    parts = [loud(0.5, 2), quiet(0.25, 3), loud(0.5, 4), quiet(0.5, 5)]
    samples = np.concatenate(parts)
    events = finder(prefix_padding_ms=500, silence_duration_ms=200).push(samples)
    assert kinds(events) == [TurnBegan, TurnPiece, TurnEnded] * 2
    assert find(events, TurnBegan)[1].start >= find(events, TurnEnded)[0].end


def test_a_long_turn_is_cut_at_its_quietest_point_and_loses_nothing():
    samples = np.concatenate([loud(2.5, 6), quiet(0.1, 7), loud(2.0, 8), quiet(1.0, 9)])
    events = finder(max_s=3.0).push(samples)
    pieces = find(events, TurnPiece)
    assert len(pieces) == 2
    assert len(pieces[0].waveform) / RATE == pytest.approx(2.55, abs=0.06)
    begin, end = events[0].start, events[-1].end
    joined = np.concatenate([piece.waveform for piece in pieces])
    np.testing.assert_array_equal(joined, samples[begin:end])


def test_what_is_left_of_a_cut_turn_is_no_piece_if_nobody_speaks_in_it():
    samples = np.concatenate([loud(2.7, 6), quiet(2.0, 7)])
    events = finder(max_s=3.0, silence_duration_ms=1000).push(samples)
    assert kinds(events) == [TurnBegan, TurnPiece, TurnEnded]


def test_a_growing_turn_is_told_at_intervals_of_its_audio():
    events = finder(growth_s=0.5).push(np.concatenate([quiet(1.0), loud(2.0)]))
    lengths = [len(event.waveform) / RATE for event in find(events, TurnGrew)]
    assert lengths == pytest.approx([0.512, 1.024, 1.536, 2.048], abs=1e-6)


def test_a_commit_ends_the_turn_at_the_last_sample():
    found = finder()
    samples = np.concatenate([loud(1.0), loud(0.01, 3)])
    began = found.push(samples[:-40])
    piece, ended = found.commit(samples[-40:])
    assert kinds(began) == [TurnBegan]
    np.testing.assert_array_equal(piece.waveform, samples)
    assert ended == TurnEnded(len(samples))
    assert not found.is_open
    assert found.held_samples == 0
    # What follows is placed behind it.
    (again,) = found.push(loud(1.0))
    assert again.start == len(samples)


def test_a_commit_without_a_turn_does_nothing():
    found = finder()
    assert found.push(quiet(1.0)) == []
    assert found.commit(NOTHING) == []


def test_a_cleared_turn_is_forgotten():
    found = finder()
    found.push(loud(1.0))
    found.clear()
    assert not found.is_open
    events = found.push(np.concatenate([quiet(0.5), loud(1.0), quiet(1.0)]))
    assert kinds(events) == [TurnBegan, TurnPiece, TurnEnded]
    assert events[0].start >= RATE


def test_silence_is_not_held():
    found = finder(prefix_padding_ms=300)
    for _ in range(50):
        found.push(quiet(1.0))
        assert found.held_samples < 0.5 * RATE


def run(samples, cuts):
    found = finder(max_s=2.0, growth_s=0.3, silence_duration_ms=300)
    edges = [0, *sorted(cut % (len(samples) + 1) for cut in cuts), len(samples)]
    pieces = [samples[start:end] for start, end in pairwise(edges)]
    return [event for piece in pieces for event in found.push(piece)] + found.commit(NOTHING)


@given(
    lengths=st.lists(st.tuples(st.booleans(), st.floats(0.02, 1.5)), max_size=8),
    cuts=st.lists(st.integers(0, 10**7), max_size=30),
)
def test_any_split_gives_the_same_turns(lengths, cuts):
    parts = [
        (loud if speaks else quiet)(seconds, seed) for seed, (speaks, seconds) in enumerate(lengths)
    ]
    samples = np.concatenate([NOTHING, *parts])
    whole, split = run(samples, []), run(samples, cuts)
    assert kinds(whole) == kinds(split)
    for one, other in zip(whole, split, strict=True):
        for name in type(one).__slots__:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    check_order_and_audio(whole, samples)


def check_order_and_audio(events, samples):
    """Pieces of a turn lie side by side between its begin and its end; turns do not overlap."""
    position = 0
    for event in events:
        if isinstance(event, TurnBegan):
            assert event.start >= position
            position = event.start
        elif isinstance(event, TurnPiece):
            length = len(event.waveform)
            assert length <= 2.0 * RATE
            np.testing.assert_array_equal(event.waveform, samples[position : position + length])
            position += length
        elif isinstance(event, TurnEnded):
            assert event.end >= position
            position = event.end


def test_the_real_detector_hears_a_voice_and_no_hum():
    hum = 0.05 * np.sin(2 * np.pi * 50 * np.arange(2 * RATE) / RATE).astype(np.float32)
    samples = np.concatenate([hum, speechlike(2.0), hum])
    events = finder(detector=SpeechDetector()).push(samples)
    assert kinds(events) == [TurnBegan, TurnPiece, TurnEnded]
    assert events[0].start / RATE == pytest.approx(1.7, abs=0.3)
    assert events[0].start % FRAME_SAMPLES == 0
