"""Transcribing clips without a server: the engine, batched `generate`, faster-whisper."""

from __future__ import annotations

import math
import os
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING

from server.engine.core import EngineCore
from server.engine.interface import NO_GUARDS, EngineRequest
from server.engine.scheduler import ScheduleLimits

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from faster_whisper import WhisperModel

    from benchmarks.load import Clip, Measurement
    from model.transcription import Transcriber
    from server.engine.interface import Runner


def run_engine(runner: Runner, clips: Sequence[Clip], measurement: Measurement) -> None:
    """Give the engine all clips at once and iterate until they are done."""
    started_s = time.monotonic()
    core = EngineCore(runner, ScheduleLimits(runner.n_slots), guards=NO_GUARDS)
    for key, clip in enumerate(clips):
        core.submit(key, EngineRequest(str(key), clip.waveform, clip.audio_s), started_s)
    while core.idle_s() is not None:  # a step that runs ahead is finished, too
        answers = core.iterate().answers
        measurement.latencies_s += [time.monotonic() - started_s] * len(answers)
    _count(measurement, clips, time.monotonic() - started_s)


def run_generate(
    transcriber: Transcriber, clips: Sequence[Clip], batch_size: int, measurement: Measurement
) -> None:
    """Transcribe batches of clips of similar length, which suits `generate` best."""
    in_order = sorted(clips, key=lambda clip: clip.audio_s)
    started_s = time.monotonic()
    for start in range(0, len(in_order), batch_size):
        batch = in_order[start : start + batch_size]
        transcriber.transcribe([clip.waveform for clip in batch])
        measurement.latencies_s += [time.monotonic() - started_s] * len(batch)
    _count(measurement, clips, time.monotonic() - started_s)


def _count(measurement: Measurement, clips: Sequence[Clip], wall_s: float) -> None:
    measurement.wall_s += wall_s
    measurement.audio_s += sum(clip.audio_s for clip in clips)


def missing_faster_whisper() -> str | None:
    """Why faster-whisper cannot run here; None if it can."""
    if find_spec("faster_whisper") is None:
        return "faster-whisper is not installed: pip install -c constraints.txt -e '.[bench]'"
    return None


def convert_whisper(source: Path, target: Path, dtype: str, threads: int) -> WhisperModel:
    """Convert a Whisper checkpoint of transformers for CTranslate2 and load it on the CPU.

    Args:
        source: its folder, tokenizer.json included.
        target: folder to write.
        dtype: fp32 or bf16; CTranslate2 takes what the processor has.
        threads: that it computes with; 0 for all cores.
    """
    from ctranslate2.converters import TransformersConverter  # noqa: PLC0415 - optional
    from faster_whisper import WhisperModel  # noqa: PLC0415 - optional

    names = {"fp32": "float32", "bf16": "bfloat16"}
    copied = ["tokenizer.json", "preprocessor_config.json"]
    TransformersConverter(str(source), copy_files=copied).convert(str(target))
    return WhisperModel(
        str(target),
        device="cpu",
        compute_type=names.get(dtype, "float32"),
        cpu_threads=threads or os.cpu_count() or 1,
    )


def run_faster_whisper(
    whisper: WhisperModel,
    clips: Sequence[Clip],
    measurement: Measurement,
    tokens_per_audio_s: float,
) -> None:
    """Transcribe one clip after another, greedily, with as many tokens as are asked for.

    Args:
        whisper: of random weights, which does not end by itself.
        clips: what to transcribe.
        measurement: where to count.
        tokens_per_audio_s: that it says of each second.
    """
    for clip in clips:
        n_tokens = math.ceil(tokens_per_audio_s * clip.audio_s)
        started_s = time.monotonic()
        segments, _ = whisper.transcribe(
            clip.waveform,
            language="en",
            beam_size=1,
            temperature=0.0,
            without_timestamps=True,
            condition_on_previous_text=False,
            # CTranslate2 halves what prompt (4) and answer may take, and counts the end.
            max_new_tokens=max(1, 2 * n_tokens - 2),
            compression_ratio_threshold=None,
            log_prob_threshold=None,
            no_speech_threshold=None,
        )
        said = sum(len(segment.tokens) for segment in segments)  # it transcribes meanwhile
        if said != n_tokens:
            raise RuntimeError(f"faster-whisper said {said} tokens, not {n_tokens}")
        wall_s = time.monotonic() - started_s
        measurement.latencies_s.append(wall_s)
        _count(measurement, [clip], wall_s)
