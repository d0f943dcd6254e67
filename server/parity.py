"""Whether the engine says what transformers' `generate` says, clip by clip.

Each clip is transcribed four ways by one loaded model: by `generate` alone (the yardstick) and in
batches, by the engine alone and with others that come and go. The guard against loops and the gate
for silence are off: they depart from `generate` on purpose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from model.evaluation.scoring import ErrorCounts, count_word_errors, score_text, sum_counts
from server.engine.core import EngineCore
from server.engine.decoding import Decoding
from server.engine.interface import NO_GUARDS, EngineRequest, EngineResult
from server.engine.runner import SpeechRunner
from server.engine.scheduler import ScheduleLimits

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from model.transcription import Transcriber

GENERATE_ALONE = "generate, alone"
GENERATE_BATCHED = "generate, batched"
ENGINE_ALONE = "engine, alone"
ENGINE_BATCHED = "engine, batched"

_SAMPLE_RATE_HZ = 16_000


@dataclass(frozen=True, slots=True)
class ParityClip:
    """A clip to compare on.

    Attributes:
        id: names it in the report.
        waveform: (N,) float32, mono, 16 kHz.
        reference: what is said; None where nobody knows.
        language: chooses the normaliser; None for the basic one.
    """

    id: str
    waveform: NDArray[np.float32]
    reference: str | None = None
    language: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What one way says of one clip."""

    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """One way of transcribing against `generate` alone.

    Attributes:
        name: of the way.
        differing: ids of the clips whose tokens differ.
        token_error_rate: edits between the token sequences, by tokens of the yardstick.
        disagreement: word error rate against the yardstick's texts.
        wer: word error rate against the references; None without any.
        wer_delta: that, less the yardstick's.
    """

    name: str
    differing: tuple[str, ...]
    token_error_rate: float
    disagreement: float
    wer: float | None
    wer_delta: float | None

    def is_within(self, *, max_wer_delta: float, max_disagreement: float) -> bool:
        """Whether the differences are small enough, in either direction."""
        return self.disagreement <= max_disagreement and abs(self.wer_delta or 0.0) <= max_wer_delta


def measure_parity(
    transcriber: Transcriber,
    clips: Sequence[ParityClip],
    batch_size: int,
    num_beams: int = 1,
) -> list[Comparison]:
    """Transcribe clips in every way and compare.

    Args:
        transcriber: the loaded checkpoint.
        clips: at least one, none longer than the model takes.
        batch_size: clips in a batch of `generate`, and that the engine runs together.
        num_beams: of the search; 1 for greedy search.

    Returns:
        One comparison a way, the yardstick's own first.

    Raises:
        ValueError: no clip, one that is too long, or an LLM that the engine cannot serve.
    """
    if not clips:
        raise ValueError("there is no clip to compare on")
    for clip in clips:
        if len(clip.waveform) > transcriber.max_audio_s * _SAMPLE_RATE_HZ:
            raise ValueError(
                f"{clip.id}: longer than the {transcriber.max_audio_s:g} s that the model takes"
            )
    yardstick = _generate(transcriber, clips, 1, num_beams)
    ways: dict[str, Callable[[], list[Answer]]] = {
        GENERATE_ALONE: lambda: yardstick,
        GENERATE_BATCHED: lambda: _generate(transcriber, clips, batch_size, num_beams),
        ENGINE_ALONE: lambda: _serve(transcriber, clips, 1, num_beams),
        ENGINE_BATCHED: lambda: _serve(transcriber, clips, batch_size, num_beams),
    }
    return [_compare(name, clips, yardstick, transcribe()) for name, transcribe in ways.items()]


def _generate(
    transcriber: Transcriber, clips: Sequence[ParityClip], batch_size: int, num_beams: int
) -> list[Answer]:
    answers = []
    for start in range(0, len(clips), batch_size):
        batch = [clip.waveform for clip in clips[start : start + batch_size]]
        answers += [
            Answer(tuple(transcript.token_ids), transcript.text)
            for transcript in transcriber.transcribe(batch, num_beams=num_beams).transcripts
        ]
    return answers


def _serve(
    transcriber: Transcriber, clips: Sequence[ParityClip], batch_size: int, num_beams: int
) -> list[Answer]:
    """Answers of an engine where a clip arrives at every iteration."""
    slots, decoding = batch_size * num_beams, Decoding(num_beams=num_beams)
    core = EngineCore(
        SpeechRunner(transcriber, max_slots=slots),
        ScheduleLimits(slots),
        guards=NO_GUARDS,
    )
    answers: dict[int, Answer] = {}
    arriving = list(enumerate(clips))
    while arriving or core.idle_s() is not None:
        if arriving:
            key, clip = arriving.pop(0)
            duration_s = len(clip.waveform) / _SAMPLE_RATE_HZ
            request = EngineRequest(clip.id, clip.waveform, duration_s, decoding=decoding)
            core.submit(key, request, arrived_s=0.0)
        for key, answer in core.iterate().answers:
            if not isinstance(answer, EngineResult):
                raise answer
            answers[key] = Answer(answer.token_ids, answer.text)
    return [answers[key] for key in range(len(clips))]


def _compare(
    name: str, clips: Sequence[ParityClip], yardstick: Sequence[Answer], answers: Sequence[Answer]
) -> Comparison:
    differing, tokens, words = [], [], []
    for clip, expected, answer in zip(clips, yardstick, answers, strict=True):
        if answer.token_ids != expected.token_ids:
            differing.append(clip.id)
        tokens.append(count_word_errors(_spaced(expected), _spaced(answer)))
        words.append(score_text(expected.text, answer.text, clip.language).word_normalised)
    wer = _wer(clips, answers)
    yardstick_wer = _wer(clips, yardstick)
    return Comparison(
        name=name,
        differing=tuple(differing),
        token_error_rate=_rate(tokens),
        disagreement=_rate(words),
        wer=wer,
        wer_delta=None if wer is None or yardstick_wer is None else wer - yardstick_wer,
    )


def _spaced(answer: Answer) -> str:
    return " ".join(map(str, answer.token_ids))


def _wer(clips: Sequence[ParityClip], answers: Sequence[Answer]) -> float | None:
    scored = [
        score_text(clip.reference, answer.text, clip.language).word_normalised
        for clip, answer in zip(clips, answers, strict=True)
        if clip.reference is not None
    ]
    return _rate(scored) if scored else None


def _rate(counts: Sequence[ErrorCounts]) -> float:
    """Errors by reference length, words on an empty reference included: all are differences."""
    total = sum_counts(counts)
    errors = total.errors + total.inserted_on_empty
    return errors / max(1, total.reference_length)
