"""Checks of a data set before anything is trained on it: every recording is decoded once."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from model.data.audio import SAMPLE_RATE_HZ, AudioReadError, EmptyAudioError, load_audio
from model.data.manifest import Utterance

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from model.data.manifest import Candidate

MIN_DURATION_S = 0.1
# An MP3's length depends on whether a tool counts the encoder's padding.
_DURATION_TOLERANCE_S = 0.25
_DURATION_TOLERANCE_SHARE = 0.02
_SILENT_PEAK = 1e-4  # -80 dBFS
_MAX_CHUNK = 32  # files handed to a process at a time


class DropReason(StrEnum):
    """Why an utterance is left out of a checked manifest."""

    MALFORMED = "malformed row"
    DUPLICATE_ID = "duplicate id"
    NO_TEXT = "no text"
    UNREADABLE = "unreadable"
    EMPTY = "empty"
    TOO_SHORT = "too short"
    TOO_LONG = "too long"
    DURATION_MISMATCH = "duration mismatch"


class DecodingCrashError(RuntimeError):
    """A decoding process died, so that the check could not be finished."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """An utterance that was left out, the reason, and what exactly was found."""

    id: str
    reason: DropReason
    detail: str


@dataclass(frozen=True, slots=True)
class CheckedData:
    """What a check kept, in the order it came, and what it dropped."""

    kept: list[Utterance]
    dropped: list[Dropped]


@dataclass(frozen=True, slots=True)
class _Recording:
    """What decoding a file showed; `fault` names a reason to drop it whatever its text."""

    duration_s: float = 0.0
    peak: float = 0.0
    fault: DropReason | None = None
    detail: str = ""


def check_candidates(
    candidates: Sequence[Candidate],
    *,
    max_duration_s: float,
    keep_unlabelled: bool,
    on_progress: Callable[[int, int], None],
) -> CheckedData:
    """Decode every recording, in parallel, and keep what can be trained on.

    Kept utterances carry the duration that was measured. A silent recording is dropped as empty
    unless its text is "", which says that nothing is spoken.

    Args:
        candidates: what the data set claims.
        max_duration_s: a longer recording is dropped.
        keep_unlabelled: keep candidates without a text.
        on_progress: called with the files done and all files to do.

    Raises:
        DecodingCrashError: a decoding process died (out of memory, or a decoder's own fault).
    """
    seen: set[str] = set()
    dropped: list[Dropped] = []
    decodable: list[Candidate] = []
    for candidate in candidates:
        fault = _fault_of_claim(candidate, seen, keep_unlabelled=keep_unlabelled)
        seen.add(candidate.id)
        if fault is None:
            decodable.append(candidate)
        else:
            dropped.append(fault)
    kept: list[Utterance] = []
    recordings = _decode_all([candidate.audio for candidate in decodable], on_progress)
    for candidate, recording in zip(decodable, recordings, strict=True):
        fault = _fault_of_recording(candidate, recording, max_duration_s)
        if fault is None:
            kept.append(_utterance(candidate, recording.duration_s))
        else:
            dropped.append(fault)
    return CheckedData(kept, dropped)


def _fault_of_claim(
    candidate: Candidate, seen: set[str], *, keep_unlabelled: bool
) -> Dropped | None:
    if candidate.id in seen:
        return Dropped(candidate.id, DropReason.DUPLICATE_ID, "an earlier utterance has this id")
    if candidate.text is None:
        if keep_unlabelled:
            return None
        return Dropped(candidate.id, DropReason.NO_TEXT, "the text is missing")
    if candidate.text and not candidate.text.strip():
        return Dropped(candidate.id, DropReason.NO_TEXT, "the text is blank")
    return None


def _fault_of_recording(
    candidate: Candidate, recording: _Recording, max_duration_s: float
) -> Dropped | None:
    duration_s = recording.duration_s
    if recording.fault is not None:
        return Dropped(candidate.id, recording.fault, recording.detail)
    if recording.peak < _SILENT_PEAK and candidate.text != "":
        return Dropped(candidate.id, DropReason.EMPTY, f"{candidate.audio}: is silent")
    if duration_s < MIN_DURATION_S:
        detail = f"{duration_s:.3f} s, less than {MIN_DURATION_S:g} s"
        return Dropped(candidate.id, DropReason.TOO_SHORT, detail)
    if duration_s > max_duration_s:
        detail = f"{duration_s:.3f} s, more than {max_duration_s:g} s"
        return Dropped(candidate.id, DropReason.TOO_LONG, detail)
    claimed_s = candidate.duration
    if claimed_s is not None:
        tolerance_s = max(_DURATION_TOLERANCE_S, _DURATION_TOLERANCE_SHARE * claimed_s)
        if abs(duration_s - claimed_s) > tolerance_s:
            detail = f"{duration_s:.3f} s, where the data set says {claimed_s:.3f} s"
            return Dropped(candidate.id, DropReason.DURATION_MISMATCH, detail)
    return None


def _utterance(candidate: Candidate, duration_s: float) -> Utterance:
    return Utterance(
        id=candidate.id,
        audio=candidate.audio,
        text=candidate.text,
        speaker=candidate.speaker,
        language=candidate.language,
        duration=duration_s,
    )


def _decode_all(paths: Sequence[Path], on_progress: Callable[[int, int], None]) -> list[_Recording]:
    """Decode files in a process per core."""
    if not paths:
        return []
    n_workers = min(len(os.sched_getaffinity(0)), len(paths))
    chunk = max(1, min(_MAX_CHUNK, len(paths) // (4 * n_workers)))
    recordings: list[_Recording] = []
    # Not forked: the caller may run threads (a progress bar).
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(
            n_workers, mp_context=context, initializer=_silence_decoders
        ) as pool:
            for recording in pool.map(_decode, paths, chunksize=chunk):
                recordings.append(recording)
                on_progress(len(recordings), len(paths))
    except BrokenProcessPool as error:
        raise DecodingCrashError(
            f"a decoding process died after {len(recordings)} of {len(paths)} files, at or soon "
            f"after {paths[len(recordings)]}"
        ) from error
    return recordings


def _silence_decoders() -> None:
    """Keep the decoding libraries' own remarks from the terminal; a fault becomes a reason."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)


def _decode(path: Path) -> _Recording:
    try:
        waveform = load_audio(path)
    except EmptyAudioError as error:
        return _Recording(fault=DropReason.EMPTY, detail=str(error))
    except AudioReadError as error:
        return _Recording(fault=DropReason.UNREADABLE, detail=str(error))
    return _Recording(duration_s=len(waveform) / SAMPLE_RATE_HZ, peak=float(np.abs(waveform).max()))
