"""Errors of an evaluation, for the command line to show as one line.

EvaluationError
└── UnreadableClipError
"""

from __future__ import annotations


class EvaluationError(ValueError):
    """The evaluation cannot be done with this input; the message says why."""


class UnreadableClipError(EvaluationError):
    """One recording cannot be transcribed; the others can."""
