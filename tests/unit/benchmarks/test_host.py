import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.host import CLIP_S, TOKENS_PER_AUDIO_S, TimedRunner, transcribe
from benchmarks.shapes import make_checkpoint
from benchmarks.stand_in import StandInGPU, make_runner

ROOT = Path(__file__).resolve().parents[3]


def test_a_stand_in_works_off_what_is_launched_one_after_another():
    gpu = StandInGPU()
    began_s = time.perf_counter()
    gpu.run(("step", 256, 1024))
    gpu.run(("prefill", 1024))
    gpu.run((8, 800))
    busy_ms = (0.57 + 0.004 * 256) + (0.45 + 0.0015 * 1024) + (0.4 + 0.000055 * 8 * 800)
    assert gpu.free_s - began_s == pytest.approx(busy_ms / 1000, abs=1e-3)


def test_an_engine_waits_for_its_stand_in_and_says_as_much_as_it_is_asked_for(tmp_path):
    checkpoint = make_checkpoint("thin", tmp_path / "thin", TOKENS_PER_AUDIO_S)
    runner = make_runner(checkpoint, slots=4, clip_s=CLIP_S)
    runner.warm_up()
    timed = TimedRunner(runner)
    measured = transcribe(timed, 9)
    steps = 3 * CLIP_S * TOKENS_PER_AUDIO_S  # three rounds, nearly: nine clips in four slots
    assert 1 / measured.clips_per_s * 9 >= 0.57e-3 * steps
    assert 0 < sum(timed.seconds.values()) < measured.device_ms * 9 / 1000
    again = transcribe(timed, 4)  # nothing is left behind
    assert again.device_ms > 0


@pytest.mark.slow
def test_the_command_tells_of_the_engine_alone_and_behind_front_ends():
    command = [sys.executable, "-m", "benchmarks.host", "--clips", "33", "--slots", "4"]
    done = subprocess.run(
        [*command, "--rounds", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    for name in ("engine alone", "behind front ends"):
        row = re.search(rf"^\| {name} \|(.*)\|$", done.stdout, re.MULTILINE)
        device_ms, others_ms, clips_per_s, _rtfx = (float(each) for each in row[1].split("|"))
        assert device_ms > 0
        assert (others_ms > 0) == (name == "behind front ends")
        assert clips_per_s > 0
    parts = dict(re.findall(r"^\| ([a-z ,]+) \| ([\d.]+) \|$", done.stdout, re.MULTILINE))
    total = float(parts.pop("all"))
    assert sum(map(float, parts.values())) == pytest.approx(total, abs=0.01)
