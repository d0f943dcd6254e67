"""What we write, read back by others' parsers."""

import html
import io
import itertools
import json
from unicodedata import category

import pytest
import srt
import webvtt
from hypothesis import given
from hypothesis import strategies as st

from server import formats
from server.transcription import Segment, StageTimings, Transcription, Word

TIMINGS = StageTimings(0.0, 0.0, 0.0, 0.0, 0.0)
HOUR_S = 3600.0


def transcription(*segments):
    return Transcription(
        text=" ".join(segment.text for segment in segments),
        language="en",
        duration_s=max((segment.end_s for segment in segments), default=1.0),
        segments=segments,
        alignment="segment",
        timings=TIMINGS,
    )


def segment(start_s, end_s, text, words=None, logprobs=None):
    return Segment(start_s, end_s, text, words, (5, 6), logprobs, "stop")


def spaced(text, step_s=0.4, start_s=0.0):
    """A segment whose words follow each other at equal steps."""
    words = tuple(
        Word(word, start_s + i * step_s, start_s + (i + 1) * step_s)
        for i, word in enumerate(text.split())
    )
    return segment(start_s, words[-1].end_s, text, words)


# Surrogates cannot be in a transcript: it goes out as UTF-8.
TEXTS = st.text(st.characters(codec="utf-8"), max_size=60) | st.sampled_from(
    ["--> x", "1\n\n2\n00:00:01,000 --> 00:00:02,000\nfake", "a\tb", "<b>&amp;</b>", "---->",
     "NOTE x", "STYLE", "WEBVTT", "12", "00:00.000 --> 00:01.000", "\x00", "a\u2028b\x85c", "<v A>"]
)  # fmt: skip


@st.composite
def transcriptions(draw):
    segments = []
    at_s = draw(st.floats(0, 200 * HOUR_S))
    for text in draw(st.lists(TEXTS, max_size=4)):
        end_s = at_s + draw(st.floats(0.01, 30.0))
        segments.append(segment(at_s, end_s, text))
        at_s = end_s
    return transcription(*segments)


def shown(text):
    controls = {"Cc", "Cs", "Zl", "Zp"}
    return " ".join("".join(" " if category(c) in controls else c for c in text).split())


def test_joiners_are_part_of_words():
    persian, mongolian, family = "می\u200cخواهم", "ᠠᠨ\u180eᠠ", "👩\u200d👧"
    text = f"{persian} {mongolian} {family}"
    written = transcription(segment(0.0, 2.0, text))
    assert [cue.text for cue in formats.cues(written)] == [text]
    assert text in formats.to_vtt(written)


def test_a_cue_ends_at_a_pause():
    words = (Word("one", 0.0, 0.4), Word("two", 0.6, 1.0), Word("three", 2.5, 3.0))
    written = transcription(segment(0.0, 3.0, "one two three", words))
    assert [(cue.text, cue.start_ms, cue.end_ms) for cue in formats.cues(written)] == [
        ("one two", 0, 1000), ("three", 2500, 3000),
    ]  # fmt: skip


@given(transcriptions())
def test_srt_is_read_back_as_it_was_written(written):
    read = list(srt.parse(formats.to_srt(written)))
    cues = list(formats.cues(written))
    assert [each.index for each in read] == list(range(1, len(cues) + 1))
    for each, cue in zip(read, cues, strict=True):
        assert each.start.total_seconds() * 1000 == pytest.approx(cue.start_ms, abs=0.01)
        assert each.end.total_seconds() * 1000 == pytest.approx(cue.end_ms, abs=0.01)
        assert "-->" not in each.content
        assert each.content.replace("->", "") == _without_arrows(cue.text)


def _without_arrows(text):
    while "-->" in text:
        text = text.replace("-->", "->")
    return text.replace("->", "")


@given(transcriptions())
def test_webvtt_is_read_back_as_it_was_written(written):
    text = formats.to_vtt(written)
    assert text.startswith("WEBVTT\n")
    read = webvtt.from_buffer(io.StringIO(text)).captions
    cues = list(formats.cues(written))
    assert len(read) == len(cues)
    for each, cue in zip(read, cues, strict=True):
        start = each.start_time
        seconds = (start.hours * 60 + start.minutes) * 60 + start.seconds
        assert seconds * 1000 + start.milliseconds == cue.start_ms
        assert html.unescape(each.raw_text) == cue.text


@given(transcriptions())
def test_tsv_has_three_columns_whatever_is_said(written):
    head, *rows = formats.to_tsv(written).split("\n")[:-1]
    assert head == "start\tend\ttext"
    assert [(int(a), int(b), c) for a, b, c in (row.split("\t") for row in rows)] == [
        (cue.start_ms, cue.end_ms, cue.text) for cue in formats.cues(written)
    ]


@given(transcriptions())
def test_cues_are_the_segments_that_say_something(written):
    said = [shown(each.text) for each in written.segments]
    assert [cue.text for cue in formats.cues(written)] == [text for text in said if text]
    assert all(0 <= cue.start_ms <= cue.end_ms for cue in formats.cues(written))


@given(transcriptions())
def test_verbose_json_is_json(written):
    body = json.loads(json.dumps(formats.to_verbose_json(written, temperature=0.0, words=True)))
    assert isinstance(body["duration"], float)
    assert [each["id"] for each in body["segments"]] == list(range(len(written.segments)))


def test_nothing_said_is_a_valid_file_of_every_kind():
    silence = transcription()
    assert formats.to_text(silence) == "\n"
    assert list(srt.parse(formats.to_srt(silence))) == []
    assert formats.to_vtt(silence) == "WEBVTT\n"
    assert webvtt.from_buffer(io.StringIO(formats.to_vtt(silence))).captions == []
    assert formats.to_tsv(silence) == "start\tend\ttext\n"
    body = formats.to_verbose_json(silence, temperature=0.0, words=True)
    assert (body["text"], body["segments"], body["words"]) == ("", [], [])


def test_hours_beyond_99_are_written_out():
    late = transcription(segment(100 * HOUR_S + 61.5, 100 * HOUR_S + 62.25, "late"))
    assert "100:01:01,500 --> 100:01:02,250" in formats.to_srt(late)
    assert "100:01:01.500 --> 100:01:02.250" in formats.to_vtt(late)


def test_placed_words_make_short_cues_that_lose_none():
    text = " ".join(f"word{i}" for i in range(60)) + " the end"
    spoken = transcription(spaced(text))
    cues = list(formats.cues(spoken))
    assert " ".join(cue.text for cue in cues) == text
    assert all(len(cue.text) <= 84 for cue in cues)
    assert all(cue.end_ms - cue.start_ms <= 7000 for cue in cues)
    assert (cues[0].start_ms, cues[-1].end_ms) == (0, (62 * 400))
    assert all(a.end_ms <= b.start_ms for a, b in itertools.pairwise(cues))


def test_slow_speech_makes_cues_of_few_words():
    cues = list(formats.cues(transcription(spaced("one two three four five", step_s=2.5))))
    assert [cue.text for cue in cues] == ["one two", "three four", "five"]


def test_a_cue_does_not_end_before_it_begins():
    (cue,) = formats.cues(transcription(segment(2.0, 1.5, "backwards")))
    assert (cue.start_ms, cue.end_ms) == (2000, 2000)


def test_a_cue_ends_with_its_sentence():
    spoken = transcription(spaced("This is a sentence of some length. And this, another one."))
    assert [cue.text for cue in formats.cues(spoken)] == [
        "This is a sentence of some length.", "And this, another one."
    ]  # fmt: skip


def test_words_that_are_not_in_the_text_leave_the_segment_whole():
    odd = segment(0.0, 9.0, "three point five", (Word("3.5", 0.0, 9.0),))
    assert [cue.text for cue in formats.cues(transcription(odd))] == ["three point five"]


def test_verbose_json_tells_what_is_known_and_null_for_the_rest():
    said = transcription(segment(1.5, 2.0, "hello", logprobs=(-1.0, -2.0)))
    (found,) = formats.to_verbose_json(said, temperature=0.2)["segments"]
    assert found["avg_logprob"] == -1.5
    assert found["no_speech_prob"] is None
    assert (found["seek"], found["start"], found["end"]) == (150, 1.5, 2.0)
    assert found["temperature"] == 0.2


def test_words_are_null_where_the_checkpoint_cannot_place_them():
    unplaced = transcription(segment(0.0, 1.0, "hello"))
    assert formats.to_verbose_json(unplaced, temperature=0.0, words=True)["words"] is None
    placed = transcription(spaced("hello there"), segment(2.0, 3.0, "a text that did not fit"))
    body = formats.to_verbose_json(placed, temperature=0.0, words=True, segments=False)
    assert [each["word"] for each in body["words"]] == ["hello", "there"]
    assert "segments" not in body
