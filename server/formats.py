"""A transcription as a file: plain text, SRT, WebVTT, TSV and OpenAI's verbose JSON.

Subtitles need short cues. Where words are placed in time, a long segment becomes several cues;
elsewhere a segment is a cue, since any cut within it would be a guess.

Sources: SubRip has no standard, its parsers agree on `HH:MM:SS,mmm --> HH:MM:SS,mmm`; WebVTT is
the W3C's (section 4); TSV is what openai/whisper writes.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from server.transcription import Segment, Transcription, Word

_MAX_CUE_CHARACTERS = 84  # two lines of 42, the usual limit for subtitles
_MAX_CUE_S = 7.0
_PAUSE_S = 0.8  # between two words, where one cue ends and another begins
_SEEK_PER_S = 100  # Whisper counts in frames of 10 ms
# Ends of sentences after which a cue may end early; a cue of fewer characters goes on.
_SENTENCE_ENDS = (".", "!", "?", "…", "。", "！", "？")
_MIN_SENTENCE_CHARACTERS = 24


@dataclass(frozen=True, slots=True)
class Cue:
    """A subtitle: a line of text, never empty, and when it is shown, milliseconds."""

    start_ms: int
    end_ms: int
    text: str


def to_text(transcription: Transcription) -> str:
    """Return the bare text and a line end."""
    return f"{transcription.text}\n"


def to_srt(transcription: Transcription) -> str:
    """Return SubRip subtitles; nothing where nothing was said."""
    return "".join(
        f"{number}\n{_clock(cue.start_ms, ',')} --> {_clock(cue.end_ms, ',')}\n"
        f"{_without_arrows(cue.text)}\n\n"
        for number, cue in enumerate(cues(transcription), start=1)
    )


def to_vtt(transcription: Transcription) -> str:
    """Return WebVTT subtitles."""
    blocks = [
        f"{_clock(cue.start_ms, '.')} --> {_clock(cue.end_ms, '.')}\n{_escape(cue.text)}\n"
        for cue in cues(transcription)
    ]
    return "\n".join(["WEBVTT\n", *blocks])


def to_tsv(transcription: Transcription) -> str:
    """Return a table of start and end, milliseconds, and text, with a head."""
    rows = [f"{cue.start_ms}\t{cue.end_ms}\t{cue.text}\n" for cue in cues(transcription)]
    return "".join(["start\tend\ttext\n", *rows])


def to_verbose_json(
    transcription: Transcription, *, temperature: float, segments: bool = True, words: bool = False
) -> dict[str, Any]:
    """Return OpenAI's `verbose_json`, and where its times come from.

    Args:
        transcription: to write.
        temperature: that it was decoded with.
        segments: whether to list segments.
        words: whether to list words; null where the checkpoint cannot place them.
    """
    body: dict[str, Any] = {
        "task": "transcribe",
        "language": transcription.language,
        "duration": transcription.duration_s,
        "text": transcription.text,
        "alignment": transcription.alignment,
        "usage": usage(transcription),
    }
    if segments:
        body["segments"] = [
            _verbose_segment(number, segment, temperature)
            for number, segment in enumerate(transcription.segments)
        ]
    if words:
        body["words"] = _words(transcription)
    return body


def usage(transcription: Transcription) -> dict[str, Any]:
    """Return what OpenAI's API bills by."""
    return {"type": "duration", "seconds": transcription.duration_s}


def cues(transcription: Transcription) -> Iterator[Cue]:
    """Yield the subtitles in order."""
    for segment in transcription.segments:
        for start_s, end_s, text in _cut(segment):
            # One line each: a blank one would end a cue, and some controls are line ends to some.
            line = " ".join("".join(" " if _ends_lines(c) else c for c in text).split())
            start_ms = max(0, round(1000 * start_s))
            if line:
                yield Cue(start_ms, max(start_ms, round(1000 * end_s)), line)


def _ends_lines(character: str) -> bool:
    """Whether it is a control, or a separator of lines; joiners are part of words."""
    return unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"}


def _cut(segment: Segment) -> Iterator[tuple[float, float, str]]:
    """A segment's start, end and text, or those of its parts if its words are placed."""
    places = _places(segment)
    if not places:
        yield segment.start_s, segment.end_s, segment.text
        return
    first = 0
    for i, (word, begin, end) in enumerate(places):
        first_word, first_begin, _ = places[first]
        length, lasts_s = end - first_begin, word.end_s - first_word.start_s
        pause_s = word.start_s - places[i - 1][0].end_s if i > first else 0.0
        is_full = length > _MAX_CUE_CHARACTERS or lasts_s > _MAX_CUE_S
        if i > first and (is_full or pause_s > _PAUSE_S):
            yield first_word.start_s, places[i - 1][0].end_s, segment.text[first_begin:begin]
            first = i
        elif _ends_sentence(segment.text[first_begin:end]) and i + 1 < len(places):
            yield first_word.start_s, word.end_s, segment.text[first_begin : places[i + 1][1]]
            first = i + 1
    first_word, first_begin, _ = places[first]
    yield first_word.start_s, places[-1][0].end_s, segment.text[first_begin:]


def _ends_sentence(text: str) -> bool:
    return len(text) >= _MIN_SENTENCE_CHARACTERS and text.endswith(_SENTENCE_ENDS)


def _places(segment: Segment) -> list[tuple[Word, int, int]]:
    """Each word with its place in the segment's text; empty where one of them is not in it."""
    places: list[tuple[Word, int, int]] = []
    position = 0
    for word in segment.words or ():
        begin = segment.text.find(word.text, position)
        if begin < 0:
            return []
        position = begin + len(word.text)
        # The first cue begins with the text, whatever stands before its first word.
        places.append((word, begin if places else 0, position))
    return places


def _clock(milliseconds: int, separator: str) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    hours, seconds = divmod(seconds, 3600)
    return f"{hours:02}:{seconds // 60:02}:{seconds % 60:02}{separator}{rest:03}"


def _without_arrows(text: str) -> str:
    """SRT has no escapes: a parser would take `-->` for times."""
    return re.sub("-{2,}>", "->", text)


def _escape(text: str) -> str:
    """As WebVTT prescribes; `>` too, which keeps `-->` out."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _verbose_segment(number: int, segment: Segment, temperature: float) -> dict[str, Any]:
    encoded = segment.text.encode()
    logprobs = segment.logprobs
    return {
        "id": number,
        "seek": round(_SEEK_PER_S * segment.start_s),
        "start": round(segment.start_s, 3),
        "end": round(segment.end_s, 3),
        "text": segment.text,
        "tokens": list(segment.token_ids),
        "temperature": temperature,
        "avg_logprob": sum(logprobs) / len(logprobs) if logprobs else None,
        "compression_ratio": len(encoded) / len(zlib.compress(encoded)),
        "no_speech_prob": None,  # Whisper's decoder has a token for it, this one has not
        "finish_reason": segment.finish_reason,
    }


def _words(transcription: Transcription) -> list[dict[str, Any]] | None:
    """All that are placed; None where something was said and nothing of it could be placed."""
    segments = transcription.segments
    if segments and all(segment.words is None for segment in segments):
        return None
    return [
        {"word": word.text, "start": round(word.start_s, 3), "end": round(word.end_s, 3)}
        for segment in segments
        for word in segment.words or ()
    ]
