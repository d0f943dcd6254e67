import pytest

from benchmarks.decode_step import WAYS, measure, plot, tabulate
from model.transcription import Transcriber


@pytest.fixture(scope="module")
def times(tiny_checkpoint):
    transcriber = Transcriber.from_pretrained(tiny_checkpoint, device="cpu")
    return measure(transcriber, 2, generating=transcriber, steps=2, rounds=3, clip_s=1.0)


def test_every_way_is_timed_in_every_round(times) -> None:
    assert times.keys() == set(WAYS)
    assert all(len(each.wall_s) == len(each.cpu_s) == 3 for each in times.values())
    assert all(each.wall_ms > 0 for name, each in times.items() if name != "generate")


def test_the_table_and_the_plot_hold_every_way(times) -> None:
    assert all(f"2 · {name}" in tabulate({2: times}) for name in WAYS)
    assert len(plot({2: times}, "title").axes[0].lines) == len(WAYS)
