"""Where transcripts go: standard output, a file for each recording, or lines of JSON."""

from __future__ import annotations

import io
import json
import os
import sys
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from server.cli.recordings import Recording
    from server.cli.transcribers import TranscriptionFailedError

JSON_LINES = "jsonl"
JSON_LINES_NAME = "transcripts.jsonl"

SUFFIXES = {
    "json": ".json",
    "verbose_json": ".verbose.json",
    "text": ".txt",
    "srt": ".srt",
    "vtt": ".vtt",
    "tsv": ".tsv",
}
"""Of a recording's file, by format."""


class Transcripts(Protocol):
    """Takes transcripts as they come, in any order."""

    def has(self, recording: Recording) -> bool:
        """Whether an earlier run has written this one."""

    def write(self, recording: Recording, transcript: str) -> None:
        """Take a transcript, as the server writes it."""

    def fail(self, recording: Recording, error: TranscriptionFailedError) -> None:
        """Take notice of a recording that has none."""

    def close(self) -> None:
        """No more come."""


class TranscriptFiles:
    """A file for each recording, in folders like theirs."""

    def __init__(self, folder: Path, form: str, *, overwrite: bool) -> None:
        """Write below `folder`, one of SUFFIXES' formats; `overwrite` writes what is there anew.

        Raises:
            OSError: there cannot be such a folder.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._suffix = SUFFIXES[form]
        self._overwrite = overwrite

    def has(self, recording: Recording) -> bool:
        """Whether its file is there; files appear only when they are complete."""
        # What comes by standard input may be another recording each time.
        is_kept = not self._overwrite and recording.path is not None
        return is_kept and self._path(recording).is_file()

    def write(self, recording: Recording, transcript: str) -> None:
        """Write its file."""
        path = self._path(recording)
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, _with_line_end(transcript))

    def fail(self, recording: Recording, error: TranscriptionFailedError) -> None:
        """Leave it without a file, so that the next run tries it again."""

    def close(self) -> None:
        """Everything is written already."""

    def _path(self, recording: Recording) -> Path:
        return self._folder / recording.place.with_name(recording.place.name + self._suffix)


class JsonLines:
    """A file with a JSON object a line: a transcript, or an error, and whose it is."""

    def __init__(self, folder: Path, *, overwrite: bool) -> None:
        """Go on with the file that is there; lines of errors leave it, to be tried again."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / JSON_LINES_NAME
        kept = {} if overwrite or not path.is_file() else _transcribed_lines(path)
        self._done = set(kept)
        _replace(path, "".join(kept.values()))
        # A name that is not UTF-8 is written in JSON's own escapes.
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace")

    def has(self, recording: Recording) -> bool:
        """Whether there is a line of its transcript."""
        return recording.path is not None and recording.name in self._done

    def write(self, recording: Recording, transcript: str) -> None:
        """Write its line."""
        self._write(transcript_line(recording, transcript))

    def fail(self, recording: Recording, error: TranscriptionFailedError) -> None:
        """Write the line of its error."""
        self._write(error_line(recording, error))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, line: str) -> None:
        self._file.write(line)
        self._file.flush()  # a run that is broken off loses nothing


class StandardOutput:
    """Prints transcripts in the recordings' order."""

    def __init__(self, recordings: Sequence[Recording], form: str) -> None:
        """Begin; of several recordings, each line of text says whose it is."""
        self._form = form
        if isinstance(sys.stdout, io.TextIOWrapper):
            # Names and texts that the terminal's encoding does not have must not end the run.
            sys.stdout.reconfigure(errors="backslashreplace")
        self._is_single = len(recordings) == 1
        self._waiting = deque(recordings)
        self._ready: dict[Recording, str] = {}

    def has(self, _recording: Recording) -> bool:
        """Nothing is kept from earlier runs."""
        return False

    def write(self, recording: Recording, transcript: str) -> None:
        """Print it once those before it are."""
        if self._form == JSON_LINES:
            text = transcript_line(recording, transcript)
        elif self._is_single:
            text = _with_line_end(transcript)
        else:
            text = f"{recording.name}: {_with_line_end(transcript)}"
        self._print(recording, text)

    def fail(self, recording: Recording, error: TranscriptionFailedError) -> None:
        """Print the line of its error, in the format that has such lines."""
        is_lines = self._form == JSON_LINES
        self._print(recording, error_line(recording, error) if is_lines else "")

    def close(self) -> None:
        """Everything is printed already."""

    def _print(self, recording: Recording, text: str) -> None:
        self._ready[recording] = text
        while self._waiting and self._waiting[0] in self._ready:
            text = self._ready.pop(self._waiting.popleft())
            if text:
                tqdm.write(text, file=sys.stdout, end="")


def transcript_line(recording: Recording, transcript: str) -> str:
    """Return the line of a transcript in the server's `json`."""
    return _line({"file": recording.name, **json.loads(transcript)})


def error_line(recording: Recording, error: TranscriptionFailedError) -> str:
    """Return the line of a recording that has no transcript."""
    reason = {"message": str(error), "code": error.code}
    return _line({"file": recording.name, "error": reason})


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _with_line_end(text: str) -> str:
    return text if text.endswith("\n") or not text else f"{text}\n"


def _transcribed_lines(path: Path) -> dict[str, str]:
    """The whole lines of transcripts, by recording.

    Raises:
        ValueError: the file holds something else, and is not ours to change.
    """
    lines = {}
    *whole, _torn = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(whole, start=1):
        try:
            value = json.loads(line)
            name, has_failed = value["file"], "error" in value
            if not isinstance(name, str):
                raise TypeError("a file's name is a text")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is no transcript; --overwrite replaces the file"
            ) from error
        if not has_failed:
            lines[name] = f"{line}\n"
    return lines


def _replace(path: Path, text: str) -> None:
    """Write a file at once: whoever looks, or a crash, finds the old one or the new one."""
    part = path.with_name(f".{os.getpid()}.part")  # short, since the name itself may be long
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
