"""Clips in shared memory: nobody's samples are another's, and all of the room comes back."""

import os
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.shared_samples import SharedSamples

ROOM = 40_000


def shared():
    """The same samples as the front end and as the engine's process sees them."""
    engines = SharedSamples.create(ROOM)
    front_ends = SharedSamples(engines.file)
    os.close(engines.file)
    return front_ends, engines


@given(
    st.lists(st.tuples(st.integers(1, 15_000), st.integers(0, 5)), max_size=40),
    st.randoms(use_true_random=False),
)
def test_what_is_put_is_seen_unchanged_until_it_is_given_back(clips, random):
    front_ends, engines = shared()
    held = []
    for number, (size, leaving) in enumerate(clips):
        waveform = np.full(size, number, np.float32)
        place = front_ends.put(waveform)
        if place is None:
            assert held
        else:
            held.append((place, waveform))
        for _ in range(min(leaving, len(held))):
            front_ends.give_back(held.pop(random.randrange(len(held)))[0])
        for each, expected in held:
            np.testing.assert_array_equal(engines.view(each), expected)
    for place, _ in held:
        front_ends.give_back(place)
    assert front_ends.put(np.zeros(ROOM, np.float32)) is not None


def test_a_waveform_for_which_there_is_no_room_changes_nothing():
    front_ends, engines = shared()
    first = front_ends.put(np.ones(30_000, np.float32))
    assert front_ends.put(np.zeros(20_000, np.float32)) is None
    assert engines.view(first).min() == 1
    front_ends.give_back(first)
    assert front_ends.put(np.zeros(20_000, np.float32)) is not None


@given(st.lists(st.tuples(st.integers(1, 15_000), st.booleans()), max_size=40))
def test_no_waveform_lies_in_two_chunks(clips):
    with mock.patch("server.engine.shared_samples.CHUNK_SAMPLES", 16_384):
        front_ends, _ = shared()
        held = []
        for size, leaves in clips:
            place = front_ends.put(np.zeros(size, np.float32))
            if place is not None:
                assert place.first // 16_384 == (place.first + size - 1) // 16_384
                held.append(place)
            if leaves and held:
                front_ends.give_back(held.pop(0))
        for place in held:
            front_ends.give_back(place)
        for _ in range(ROOM // 16_384):  # what is free of a chunk is in one piece again
            assert front_ends.put(np.zeros(16_384, np.float32)) is not None


@pytest.mark.parametrize("order", [1, -1])
def test_chunks_that_are_given_back_whole_are_not_joined(order):
    with mock.patch("server.engine.shared_samples.CHUNK_SAMPLES", 16_384):
        front_ends, _ = shared()
        whole = [front_ends.put(np.zeros(16_384, np.float32)) for _ in range(2)]
        for place in whole[::order]:
            front_ends.give_back(place)
        firsts = [front_ends.put(np.zeros(10_000, np.float32)).first for _ in range(2)]
        assert firsts == [0, 16_384]


def test_samples_that_are_no_float32_or_not_in_a_row_are_copied_as_such():
    front_ends, engines = shared()
    waveform = np.arange(2_000, dtype=np.float64)[::2]
    np.testing.assert_array_equal(engines.view(front_ends.put(waveform)), waveform)
