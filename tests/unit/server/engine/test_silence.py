import numpy as np
import pytest

from server.engine.silence import is_silent
from tests.speech_models import noise


def tone(dbfs, seconds=1.0):
    """A sine whose root mean square is `dbfs`."""
    times_s = np.arange(round(16_000 * seconds)) / 16_000
    amplitude = np.sqrt(2) * 10 ** (dbfs / 20)
    return (amplitude * np.sin(2 * np.pi * 400 * times_s)).astype(np.float32)


def test_digital_silence_is_silent():
    assert is_silent(np.zeros(16_000, np.float32))


@pytest.mark.parametrize(("dbfs", "silent"), [(-61.0, True), (-59.0, False), (-20.0, False)])
def test_the_threshold_is_60_db_below_full_scale(dbfs, silent):
    assert is_silent(tone(dbfs)) is silent


@pytest.mark.parametrize("start", [0, 8_000, 15_360 - 240, 48_000 - 480])
def test_one_frame_of_sound_anywhere_is_no_silence(start):
    clip = np.zeros(48_000, np.float32)
    clip[start : start + 480] = noise(0.03) / 10
    assert not is_silent(clip)


@pytest.mark.parametrize("samples", [1, 479, 481])
def test_a_last_frame_that_is_short_counts_as_it_is(samples):
    assert is_silent(np.zeros(samples, np.float32))
    clip = np.zeros(samples, np.float32)
    clip[-1] = 0.5
    assert not is_silent(clip)


def test_nan_is_left_for_the_model_to_fail_on():
    assert not is_silent(np.full(1_000, np.nan, np.float32))
