"""What the suite makes of its measurements; a run of it is `make bench`."""

from benchmarks.shapes import make_checkpoint
from benchmarks.suite import OFFLINE_GENERATE, OURS, Scenario, plot, tabulate
from model.transcription import Transcriber
from tests.speech_models import noise


def measured() -> Scenario:
    scenario = Scenario("small", 3.0, left_out={"LitServe": "it is not installed"})
    for way, clients, rtfx in (
        (OURS, 1, 10.0), (OURS, 4, 40.0), ("sequential generate", 1, 5.0),
        ("sequential generate", 4, 5.0), (OFFLINE_GENERATE, 0, 20.0),
    ):  # fmt: skip
        each = scenario.of(way, clients)
        each.audio_s, each.wall_s, each.latencies_s = rtfx, 1.0, [0.1, 0.1]
    scenario.of(OURS, 4).health_s = [0.002, 0.002]
    return scenario


def test_ratios_are_to_our_server_under_as_many_clients_or_to_its_best() -> None:
    lines = tabulate(measured()).splitlines()
    rows = {
        line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in lines if "|" in line
    }
    assert rows["server, 4 clients"][:2] == ["40.0", ""]
    assert rows["server, 4 clients"][5] == "2.0"
    assert rows["sequential generate, 1 client"][1] == "2.00"
    assert rows["sequential generate, 4 clients"][1] == "8.00"
    assert rows[OFFLINE_GENERATE][1] == "2.00"
    assert lines[-1] == "Left out: LitServe: it is not installed."


def test_every_scenario_is_plotted() -> None:
    assert len(plot([measured(), measured()]).axes) == 2


def test_a_random_checkpoint_says_as_many_tokens_as_it_is_asked_for(tmp_path) -> None:
    path = make_checkpoint("small", tmp_path / "model", tokens_per_audio_s=8.0)
    transcriber = Transcriber.from_pretrained(path, device="cpu")
    clips = [noise(1.0), noise(2.5)]
    said = [transcriber.transcribe([clip]).transcripts[0] for clip in clips]
    assert [each.finish_reason for each in said] == ["length", "length"]
    assert [len(each.token_ids) for each in said] == [9, 21]
