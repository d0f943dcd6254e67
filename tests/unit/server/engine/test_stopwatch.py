import time

import pytest
import torch

from server.engine.stopwatch import Stopwatch

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
def test_laps_of_one_name_add_up(device):
    def work(seconds):
        if device == "cuda":
            torch.cuda._sleep(int(seconds * 1e9))  # cycles, at about a GHz
        else:
            time.sleep(seconds)

    stopwatch = Stopwatch(torch.device(device))
    for seconds, name in ((0.02, "a"), (0.005, "b"), (0.03, "a")):
        work(seconds)
        stopwatch.lap(name)
    taken_s = stopwatch.seconds()
    assert taken_s.keys() == {"a", "b"}
    assert 0.02 < taken_s["a"] < 5
    assert 0.002 < taken_s["b"] < taken_s["a"]


def test_nothing_took_no_time():
    assert Stopwatch(torch.device("cpu")).seconds() == {}
