"""Transcriptions as the bodies of answers."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastapi import Response

from server import formats
from server.api.schemas import (
    HypothesisBody,
    OpenAIBody,
    SegmentBody,
    Timings,
    TranscriptionBody,
    VerboseBody,
    WordBody,
    logprob_body,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from server.api.schemas import LogprobBody
    from server.transcription import Segment, Timestamps, Transcription, Word

FILE_FORMATS: dict[str, tuple[Callable[[Transcription], str], str]] = {
    "text": (formats.to_text, "text/plain"),
    "srt": (formats.to_srt, "application/x-subrip"),
    "vtt": (formats.to_vtt, "text/vtt"),
    "tsv": (formats.to_tsv, "text/tab-separated-values"),
}
"""Writer and media type of each format that is no JSON."""


def file_response(transcription: Transcription, form: str) -> Response:
    """Answer with a file in one of FILE_FORMATS."""
    write, media_type = FILE_FORMATS[form]
    return Response(write(transcription), media_type=f"{media_type}; charset=utf-8")


def own_json(
    transcription: Transcription,
    *,
    timestamps: Timestamps,
    hypotheses: bool,
    logprobs: bool,
) -> dict[str, Any]:
    """Return `/transcribe`'s `json`; what was not asked for is absent."""
    body = TranscriptionBody(
        text=transcription.text,
        language=transcription.language,
        duration=transcription.duration_s,
        timings=_timings(transcription),
    )
    if timestamps != "none" or hypotheses:
        body.alignment = transcription.alignment
        body.segments = [
            _segment(segment, words=timestamps == "word", hypotheses=hypotheses)
            for segment in transcription.segments
        ]
    if logprobs:
        body.logprobs = _logprobs(transcription)
    return body.model_dump(exclude_unset=True)


def own_verbose_json(
    transcription: Transcription, *, temperature: float, words: bool
) -> dict[str, Any]:
    """Return `/transcribe`'s `verbose_json`."""
    body = VerboseBody(
        **formats.to_verbose_json(transcription, temperature=temperature, words=words),
        timings=_timings(transcription),
    )
    return body.model_dump(exclude_unset=True)


def openai_json(transcription: Transcription, *, logprobs: bool) -> dict[str, Any]:
    """Return OpenAI's `json`."""
    body = OpenAIBody.model_validate(
        {"text": transcription.text, "usage": formats.usage(transcription)}
    )
    if logprobs:
        body.logprobs = _logprobs(transcription)
    return body.model_dump(exclude_unset=True)


def openai_verbose_json(
    transcription: Transcription, *, temperature: float, segments: bool, words: bool
) -> dict[str, Any]:
    """Return OpenAI's `verbose_json`."""
    body = formats.to_verbose_json(
        transcription, temperature=temperature, segments=segments, words=words
    )
    return VerboseBody(**body).model_dump(exclude_unset=True)


def _timings(transcription: Transcription) -> Timings:
    return Timings(**{k: round(v, 6) for k, v in asdict(transcription.timings).items()})


def _segment(segment: Segment, *, words: bool, hypotheses: bool) -> SegmentBody:
    body = SegmentBody(
        start=round(segment.start_s, 3),
        end=round(segment.end_s, 3),
        text=segment.text,
        finish_reason=segment.finish_reason,
    )
    if words:
        body.words = None if segment.words is None else [_word(word) for word in segment.words]
    if hypotheses:
        body.hypotheses = [
            HypothesisBody(text=each.text, score=each.score) for each in segment.hypotheses
        ]
    return body


def _word(word: Word) -> WordBody:
    return WordBody(word=word.text, start=round(word.start_s, 3), end=round(word.end_s, 3))


def _logprobs(transcription: Transcription) -> list[LogprobBody]:
    answers = []
    for segment in transcription.segments:
        spelt = zip(segment.token_bytes or (), segment.logprobs or (), strict=False)
        answers += [
            logprob_body(piece, logprob)
            for piece, logprob in spelt
            if piece  # special tokens are no text
        ]
    return answers
