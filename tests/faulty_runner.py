"""A real runner that fails, or waits, where a test tells it to."""

import threading

import numpy as np

from server.engine.interface import refill

START_POISON = 0.77
STEP_POISON = 0.66
"""First samples of clips that the model fails on, at their start or at their first step."""


def poisoned(waveform, mark):
    waveform = waveform.copy()
    waveform[0] = mark
    return waveform


class FaultyRunner:
    """Hands everything on to a runner; raises on poisoned clips and on broken devices."""

    def __init__(self, runner):
        self._runner = runner
        self._rows = []  # first samples of the running clips, by row
        self.is_broken = False
        self.steps = 0
        self.started = []  # sizes of the batches that were tried
        self.busy = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def __getattr__(self, name):
        return getattr(self._runner, name)

    def start(self, plans):
        self.started.append(len(plans))
        marks = [np.float32(plan.waveform[0]) for plan in plans]
        self._fail_on(marks, START_POISON)
        report = self._runner.start(plans)
        self._rows += marks
        return report

    def step(self, rows):
        self.steps += 1
        self.busy.set()
        assert self.gate.wait(60)
        self._fail_on(self._rows[rows], STEP_POISON)
        return self._runner.step(rows)

    def begin_step(self):
        self._fail_on(self._rows, STEP_POISON)
        self._runner.begin_step()

    def branch(self, rows, parents, token_ids):
        self._runner.branch(rows, parents, token_ids)
        marks = [self._rows[parent] for parent in parents]
        self._rows += marks[: max(0, max(rows) + 1 - len(self._rows))]
        for row, mark in zip(rows, marks, strict=True):
            self._rows[row] = mark

    def release(self, rows, *, failed=()):
        self._runner.release(rows, failed=failed)
        for row, mover in refill(len(self._rows), rows):
            self._rows[row] = self._rows[mover]
        del self._rows[len(self._rows) - len(rows) :]

    def probe(self):
        if self.is_broken:
            raise RuntimeError("the device is gone")
        self._runner.probe()

    def _fail_on(self, marks, poison):
        if self.is_broken:
            raise RuntimeError("the device is gone")
        if np.float32(poison) in marks:
            raise RuntimeError("poisoned")
