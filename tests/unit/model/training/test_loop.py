"""The training loop, on a stage small enough to train in milliseconds."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from model.training.loop import LoopConfig, TrainingLoop, learning_rate_factor

N_BATCHES = 5


class Regression(nn.Module):
    """A line with dropout, so that a step's random state shows in its loss."""

    def __init__(self, dropout):
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch):
        error = self.linear(self.dropout(batch["x"])).squeeze(1) - batch["y"]
        return {"loss": error.square().mean()}


class Batches:
    def __init__(self, stage, epoch, rank, world_size):
        self.stage, self.epoch, self.rank, self.world_size = stage, epoch, rank, world_size

    def __len__(self):
        return self.stage.n_batches

    def iterate(self, start):
        for index in range(start, len(self)):
            place = (self.epoch * len(self) + index) * self.world_size + self.rank
            x = torch.randn(self.stage.size, 3, generator=torch.Generator().manual_seed(place))
            self.stage.seen.append((self.epoch, index))
            self.stage.before_batch(self.epoch, index)
            yield {"x": x, "y": x.sum(1), "audio_s": 1.0}


class RegressionStage:
    def __init__(self, n_batches=N_BATCHES, size=4, dropout=0.3, validates=False):
        torch.manual_seed(0)
        self.module = Regression(dropout)
        self.n_batches, self.size, self.validates, self.seen = n_batches, size, validates, []
        self.before_batch = lambda epoch, index: None

    def parameter_groups(self):
        return [
            {"params": [self.module.linear.weight]},
            {"params": [self.module.linear.bias], "lr_scale": 0.5},
        ]

    def epoch(self, epoch, rank, world_size):
        return Batches(self, epoch, rank, world_size)

    def validate(self, module):
        if not self.validates:  # drawing the curves is what takes long here
            return {}
        return {"loss": float(module({"x": torch.ones(1, 3), "y": torch.ones(1) * 3})["loss"])}

    def save(self, folder):
        save_file(self.module.state_dict(), folder / "model.safetensors")


def make_loop(folder, stage=None, **fields):
    settings = {"epochs": 3, "learning_rate": 0.05, "warmup_steps": 3, "precision": "fp32"}
    config = LoopConfig(**{**settings, "log_every_steps": 2, **fields})
    return TrainingLoop(stage or RegressionStage(), config, folder, {"kind": "regression"})


def curve(folder):
    """What was logged, without the timings."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timings = {"elapsed_s", "audio_s_per_s"}
    return [{k: v for k, v in record.items() if k not in timings} for record in records]


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


class KilledError(Exception):
    pass


def kill_at(stage, epoch, index):
    def before_batch(*place):
        if place == (epoch, index):
            raise KilledError

    stage.before_batch = before_batch


def test_the_loss_falls_and_everything_is_written(tmp_path):
    stage = RegressionStage(dropout=0.0, validates=True)
    assert make_loop(tmp_path, stage, epochs=6, learning_rate=0.2).run()
    records = curve(tmp_path)
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[-1] < losses[0] / 2 > records[-1]["dev_loss"]
    assert {record["epoch"] for record in records if "dev_loss" in record} == set(range(1, 7))
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert json.loads((tmp_path / "run.json").read_text())["loop"]["epochs"] == 6


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_shows_what_the_metrics_file_holds(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra speechllm[tensorboard] is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    make_loop(tmp_path, tensorboard=True).run()
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [event.step for event in shown] == [record["step"] for record in logged]
    assert [event.value for event in shown] == pytest.approx([r["loss"] for r in logged])


def test_log_windows_span_epochs(tmp_path):
    make_loop(tmp_path, log_every_steps=4).run()
    assert [record["step"] for record in curve(tmp_path) if "loss" in record] == [4, 8, 12]


def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_loop(tmp_path / name, seed=seed).run()
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert curve(tmp_path / "a") != curve(tmp_path / "c")


@pytest.mark.parametrize(("place", "accumulation"), [((0, 3), 1), ((1, 1), 2), ((2, 4), 1)])
def test_a_killed_run_resumes_to_the_same_curve_and_weights(tmp_path, place, accumulation):
    fields = {"save_every_s": 1e-9, "grad_accumulation": accumulation}
    make_loop(tmp_path / "whole", **fields).run()
    stage = RegressionStage()
    kill_at(stage, *place)
    with pytest.raises(KilledError):
        make_loop(tmp_path / "killed", stage, **fields).run()
    stage = RegressionStage()
    assert make_loop(tmp_path / "killed", stage, **fields).run()
    assert stage.seen[0] == (place[0], place[1] - place[1] % accumulation)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert curve(tmp_path / "whole") == curve(tmp_path / "killed")


def test_a_kill_before_the_first_state_starts_over(tmp_path):
    stage = RegressionStage()
    kill_at(stage, 0, 3)
    with pytest.raises(KilledError):
        make_loop(tmp_path / "killed", stage).run()
    make_loop(tmp_path / "killed").run()
    make_loop(tmp_path / "whole").run()
    assert curve(tmp_path / "whole") == curve(tmp_path / "killed")


def test_a_kill_during_validation_leaves_no_duplicates(tmp_path):
    fields = {"save_every_s": 1e-9}
    make_loop(tmp_path / "whole", RegressionStage(validates=True), **fields).run()
    loop = make_loop(tmp_path / "killed", RegressionStage(validates=True), **fields)
    saved = loop.save_state

    def killed_once_epoch_2_is_validated():
        if loop.progress.epoch == 2:
            raise KilledError
        saved()

    loop.save_state = killed_once_epoch_2_is_validated
    with pytest.raises(KilledError):
        loop.run()
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1')  # and in the middle of a line
    make_loop(tmp_path / "killed", RegressionStage(validates=True), **fields).run()
    assert curve(tmp_path / "whole") == curve(tmp_path / "killed")


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    make_loop(tmp_path, max_steps=6).run()
    (tmp_path / "state").rename(tmp_path / "state.old")
    assert make_loop(tmp_path).progress.step == 6


def test_max_steps_stops_and_raising_it_goes_on(tmp_path):
    stopped = make_loop(tmp_path / "a", max_steps=7)
    assert not stopped.run()
    assert stopped.progress.step == 7
    assert not make_loop(tmp_path / "a", max_steps=7).run()
    assert not (tmp_path / "a" / "model.safetensors").exists()
    assert make_loop(tmp_path / "a").run()
    make_loop(tmp_path / "b").run()
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert curve(tmp_path / "a") == curve(tmp_path / "b")


def test_a_finished_run_is_written_again_without_training(tmp_path):
    make_loop(tmp_path).run()
    before = weights(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    stage = RegressionStage()
    assert make_loop(tmp_path, stage).run()
    assert stage.seen == []
    assert same(before, weights(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step(tmp_path, number):
    stage = RegressionStage()
    stage.before_batch = lambda *place: place == (1, 2) and os.kill(os.getpid(), number)
    loop = make_loop(tmp_path, stage)
    former = signal.getsignal(number)
    assert not loop.run()
    assert signal.getsignal(number) is former
    assert (loop.progress.epoch, loop.progress.batch) == (1, 3)
    assert make_loop(tmp_path).progress == loop.progress


@pytest.fixture
def interruptible():
    """Give SIGINT Python's own handler, which a process started in the background lacks."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_does_what_it_did_before(tmp_path):
    stage = RegressionStage()
    stage.before_batch = lambda *place: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        make_loop(tmp_path, stage, grad_accumulation=N_BATCHES).run()  # the step is long


def test_half_batches_accumulated_equal_whole_batches(tmp_path):
    class Halves(RegressionStage):
        def epoch(self, epoch, rank, world_size):
            return HalfBatches(self, epoch, rank, world_size)

    class HalfBatches(Batches):
        def __len__(self):
            return 2 * self.stage.n_batches

        def iterate(self, start):
            assert start == 0
            whole = Batches(self.stage, self.epoch, self.rank, self.world_size)
            for batch in whole.iterate(0):
                for half in (slice(0, 2), slice(2, 4)):
                    yield {"x": batch["x"][half], "y": batch["y"][half], "audio_s": 0.5}

    fields = {"warmup_steps": 0, "final_lr_ratio": 1.0}  # the schedule sees half-batches
    make_loop(tmp_path / "whole", RegressionStage(dropout=0.0), **fields).run()
    make_loop(tmp_path / "halves", Halves(dropout=0.0), grad_accumulation=2, **fields).run()
    whole, halves = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    for name in whole:
        torch.testing.assert_close(whole[name], halves[name])
    for one, other in zip(curve(tmp_path / "whole"), curve(tmp_path / "halves"), strict=True):
        assert one["step"] == other["step"]
        for name in ("loss", "grad_norm"):
            assert one.get(name) == pytest.approx(other.get(name), rel=1e-4)


def test_a_short_last_window_is_the_mean_of_what_it_has(tmp_path):
    """3 batches, 2 a step: the second step must be that of its single batch."""
    stage = RegressionStage(n_batches=3, dropout=0.0)
    loop = make_loop(tmp_path, stage, epochs=1, grad_accumulation=2, log_every_steps=1)
    gradients = []
    clip = loop.accelerator.clip_grad_norm_

    def recording_clip(parameters, limit):
        gradients.append([parameter.grad.clone() for parameter in stage.module.parameters()])
        return clip(parameters, limit)

    loop.accelerator.clip_grad_norm_ = recording_clip
    before_last = {}
    stage.before_batch = lambda *place: before_last.update(
        {k: v.clone() for k, v in stage.module.state_dict().items()}
    )
    loop.run()
    alone = RegressionStage(n_batches=3, dropout=0.0)
    alone.module.load_state_dict(before_last)
    last = next(iter(alone.epoch(0, 0, 1).iterate(2)))
    alone.module(last)["loss"].backward()
    assert len(gradients) == 2
    for found, parameter in zip(gradients[1], alone.module.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad)


def test_groups_train_at_their_share_of_the_rate(tmp_path):
    loop = make_loop(tmp_path)
    loop.run()
    rates = [group["lr"] for group in loop.optimiser.param_groups]
    assert rates[1] == pytest.approx(rates[0] / 2)


def test_a_group_that_starts_late_keeps_its_weights_until_then_and_warms_up_after(tmp_path):
    class LateStage(RegressionStage):
        def parameter_groups(self):
            weight, bias = super().parameter_groups()
            return [{**weight, "frozen_steps": 2}, bias]

    stage = LateStage()
    first = stage.module.linear.weight.detach().clone()
    make_loop(tmp_path, stage, max_steps=2).run()
    assert torch.equal(stage.module.linear.weight, first)
    loop = make_loop(tmp_path, stage, max_steps=3)
    loop.run()
    assert not torch.equal(stage.module.linear.weight, first)
    late, early = (group["lr"] for group in loop.optimiser.param_groups)
    assert late == pytest.approx(early * 2 / 3)  # its first of three steps of warm-up, at scale 0.5


def test_warm_up_and_cosine_decay():
    config = LoopConfig(warmup_steps=4, final_lr_ratio=0.1)
    assert learning_rate_factor(config, 0, 0.0) == 0.25
    assert learning_rate_factor(config, 3, 0.0) == 1.0
    assert learning_rate_factor(config, 99, 0.5) == pytest.approx(0.55)
    assert learning_rate_factor(config, 99, 1.0) == pytest.approx(0.1)


def test_a_warm_up_of_most_of_the_run_is_warned_of(tmp_path, capsys):
    assert make_loop(tmp_path / "short", warmup_steps=1).run()
    assert "warning" not in capsys.readouterr().out
    assert make_loop(tmp_path / "long", warmup_steps=1000, grad_accumulation=2).run()
    assert "warning: 1000 steps of warm-up in about 9;" in capsys.readouterr().out


def test_other_settings_are_refused_by_name(tmp_path):
    make_loop(tmp_path, max_steps=1).run()
    with pytest.raises(ValueError, match=r"other settings \(loop.learning_rate, loop.seed\)"):
        make_loop(tmp_path, learning_rate=0.1, seed=9)
    assert make_loop(tmp_path, max_steps=2, save_every_s=9, log_every_steps=1).progress.step == 1


def test_a_damaged_state_is_refused_by_name(tmp_path):
    make_loop(tmp_path, max_steps=1).run()
    path = tmp_path / "state" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"state is damaged"):
        make_loop(tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    stage = RegressionStage()
    stage.before_batch = lambda epoch, index: (
        index == 2 and stage.module.linear.bias.data.fill_(math.nan)
    )
    with pytest.raises(FloatingPointError, match="the loss is nan at epoch 0, batch 2"):
        make_loop(tmp_path, stage).run()


def test_two_processes_train_one_run(tmp_path):
    """Same weights on both, as from batches of both; one of them writes the run folder."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            from pathlib import Path
            from safetensors.torch import save_file
            from tests.unit.model.training.test_loop import RegressionStage, make_loop

            folder = Path(sys.argv[1])
            stage = RegressionStage(dropout=0.0)
            loop = make_loop(folder / "run", stage, max_steps=int(sys.argv[2]) or None)
            rank = loop.accelerator.process_index
            loop.run()
            save_file(stage.module.state_dict(), folder / f"rank{rank}.safetensors")
            """
        )
    )
    for max_steps in (7, 0):  # stopped, and resumed
        done = subprocess.run(
            [
                sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", "2", str(script), str(tmp_path), str(max_steps),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
                 "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        ranks = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2)]
        assert same(*ranks)
    assert same(ranks[0], weights(tmp_path / "run"))
    steps = [record["step"] for record in curve(tmp_path / "run") if "loss" in record]
    assert steps == [2, 4, 6, 8, 10, 12, 14]

    class BothRanks(RegressionStage):
        """One process that sees what the two saw: a batch of both halves."""

        def epoch(self, epoch, rank, world_size):
            halves = [Batches(self, epoch, number, 2) for number in range(2)]
            return JoinedBatches(halves)

    class JoinedBatches:
        def __init__(self, halves):
            self.halves = halves

        def __len__(self):
            return len(self.halves[0])

        def iterate(self, start):
            for one, other in zip(*(half.iterate(start) for half in self.halves), strict=True):
                joined = {name: torch.cat([one[name], other[name]]) for name in ("x", "y")}
                yield {**joined, "audio_s": 2.0}

    make_loop(tmp_path / "single", BothRanks(dropout=0.0)).run()
    single = weights(tmp_path / "single")
    for name, tensor in ranks[0].items():
        torch.testing.assert_close(tensor, single[name])
    expected = curve(tmp_path / "single")
    for record, wanted in zip(curve(tmp_path / "run"), expected, strict=True):
        assert record.get("loss") == pytest.approx(wanted.get("loss"), rel=1e-4)
