import io
import json
import os
import sys
from pathlib import Path

import pytest

from server.cli.recordings import Recording
from server.cli.transcribers import TranscriptionFailedError
from server.cli.transcripts import JsonLines, StandardOutput, TranscriptFiles

A, B, C = (Recording(f"calls/{name}.wav", Path(f"{name}.wav"), Path(name)) for name in "abc")
FAILED = TranscriptionFailedError("the file is not audio", "audio_unrecognised")


def test_a_file_appears_whole_where_its_recording_lies(tmp_path):
    deep = Recording("calls/1/a.b.wav", Path("a.b.wav"), Path("1/a.b"))
    files = TranscriptFiles(tmp_path, "srt", overwrite=False)
    assert not files.has(deep)
    files.write(deep, "1\n")
    assert files.has(deep)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")] == ["1/a.b.srt"]
    assert not TranscriptFiles(tmp_path, "srt", overwrite=True).has(deep)
    assert not TranscriptFiles(tmp_path, "vtt", overwrite=False).has(deep)


def test_a_name_as_long_as_may_be_is_written(tmp_path):
    name = "a" * 240
    long = Recording(name, tmp_path / name, Path(name))
    TranscriptFiles(tmp_path, "text", overwrite=False).write(long, "words")
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.txt"]


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(OSError, match="directory"):
        TranscriptFiles(tmp_path, "text", overwrite=False).write(A, "words")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    with pytest.raises(OSError, match="exists"):
        TranscriptFiles(Path(__file__), "text", overwrite=False)


def test_standard_input_and_another_format_are_not_taken_for_done(tmp_path):
    stdin = Recording("stdin", None, Path("stdin"))
    for each in (
        TranscriptFiles(tmp_path, "json", overwrite=False),
        JsonLines(tmp_path, overwrite=False),
    ):
        each.write(stdin, '{"text": "words"}')
        each.write(A, '{"text": "words"}')
        each.close()
    files = TranscriptFiles(tmp_path, "json", overwrite=False)
    assert (files.has(A), files.has(stdin)) == (True, False)
    assert not TranscriptFiles(tmp_path, "verbose_json", overwrite=False).has(A)
    lines = JsonLines(tmp_path, overwrite=False)
    assert (lines.has(A), lines.has(stdin)) == (True, False)
    lines.close()


def test_names_that_standard_output_cannot_hold_do_not_end_the_run(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii"))
    odd = Recording(os.fsdecode(b"m\xff.wav"), Path("m"), Path("m"))
    output = StandardOutput([odd, A], "text")
    output.write(odd, "Өнөөдөр")
    output.write(A, "words")
    sys.stdout.flush()
    assert written.getvalue().endswith(b"calls/a.wav: words\n")


def lines_of(folder):
    text = (folder / "transcripts.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_a_name_that_is_not_utf_8_is_kept(tmp_path):
    name = os.fsdecode(b"caf\xe9.wav")
    odd = Recording(name, tmp_path / name, Path(name))
    lines = JsonLines(tmp_path, overwrite=False)
    lines.fail(odd, FAILED)
    lines.write(odd, '{"text": "words"}')
    lines.close()
    assert lines_of(tmp_path)[-1] == {"file": name, "text": "words"}
    again = JsonLines(tmp_path, overwrite=False)
    assert again.has(odd)
    again.close()


def test_lines_go_on_after_a_run_that_was_broken_off(tmp_path):
    first = JsonLines(tmp_path, overwrite=False)
    first.write(A, '{"text": "Өнөөдөр"}')
    first.fail(B, FAILED)
    first.close()
    with (tmp_path / "transcripts.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"file": "calls/c.wav", "te')
    again = JsonLines(tmp_path, overwrite=False)
    assert [again.has(each) for each in (A, B, C)] == [True, False, False]
    again.write(B, '{"text": "better"}')
    again.close()
    assert lines_of(tmp_path) == [
        {"file": "calls/a.wav", "text": "Өнөөдөр"},
        {"file": "calls/b.wav", "text": "better"},
    ]


def test_a_line_of_an_error_says_why(tmp_path):
    lines = JsonLines(tmp_path, overwrite=False)
    lines.fail(A, FAILED)
    lines.close()
    (line,) = lines_of(tmp_path)
    assert line["error"] == {"message": "the file is not audio", "code": "audio_unrecognised"}


def test_a_file_of_something_else_is_left_as_it_is(tmp_path):
    (tmp_path / "transcripts.jsonl").write_text("my notes\n")
    with pytest.raises(ValueError, match="line 1 is no transcript"):
        JsonLines(tmp_path, overwrite=False)
    assert (tmp_path / "transcripts.jsonl").read_text() == "my notes\n"


def test_transcripts_are_printed_in_order_however_they_come(capsys):
    output = StandardOutput([A, B, C], "text")
    output.write(C, "third\n")
    output.fail(B, FAILED)
    assert capsys.readouterr().out == ""
    output.write(A, "first")
    assert capsys.readouterr().out == "calls/a.wav: first\ncalls/c.wav: third\n"


def test_a_single_transcript_is_printed_as_it_is(capsys):
    StandardOutput([A], "srt").write(A, "1\n00:00:00,000 --> 00:00:01,000\nHi\n\n")
    assert capsys.readouterr().out.endswith("\nHi\n\n")
