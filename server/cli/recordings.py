"""Which recordings a command line means: files, folders, patterns and standard input."""

from __future__ import annotations

import glob
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

STANDARD_INPUT = "-"

# What is taken from folders; a file that is named is taken whatever its name.
_SUFFIXES = {
    ".aac", ".flac", ".m4a", ".m4b", ".mka", ".mp3", ".mp4", ".oga", ".ogg", ".opus", ".wav",
    ".weba", ".webm",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Recording:
    """A recording to transcribe.

    Attributes:
        name: as it is reported.
        path: of the file; None for standard input.
        place: where its transcript goes within the output folder, but for the suffix.
    """

    name: str
    path: Path | None
    place: Path


def find_recordings(arguments: Iterable[str]) -> list[Recording]:
    """Return every recording once, in the arguments' order; folders in that of their names.

    A path that does not exist is kept, so that it is reported with the rest that fails.

    Raises:
        ValueError: a folder or a pattern without recordings, or standard input twice.
    """
    found: dict[Path | None, Recording] = {}
    for argument in arguments:
        if argument == STANDARD_INPUT and None in found:
            raise ValueError("standard input can be read once only")
        for recording in _find(argument):
            key = _resolved(recording.path) if recording.path else None
            found.setdefault(key, recording)
    return _with_distinct_places(list(found.values()))


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a link to itself: reading it says so
        return path.absolute()


def check_places(recordings: Iterable[Recording]) -> None:
    """Raise ValueError if the transcripts of two recordings would go to the same place."""
    places: dict[Path, Recording] = {}
    for recording in recordings:
        other = places.setdefault(recording.place, recording)
        if other is not recording:
            raise ValueError(
                f"the transcripts of {other.name} and {recording.name} would have the same name; "
                "give the folder that holds both"
            )


def _find(argument: str) -> list[Recording]:
    if not argument:
        raise ValueError("an empty argument names no recording")
    path = Path(argument)
    if argument == STANDARD_INPUT:
        return [Recording("stdin", None, Path("stdin"))]
    if path.is_dir():
        recordings = list(_in_folder(path))
        if not recordings:
            raise ValueError(f"{argument}: no recordings in this folder")
        return recordings
    if path.exists() or not glob.has_magic(argument):
        return [Recording(argument, path, Path(path.stem))]
    matches = [Path(match) for match in sorted(glob.glob(argument, recursive=True))]  # noqa: PTH207 - Path.glob takes no absolute pattern
    root = _fixed_part(path)
    files = [match for match in matches if match.is_file()]
    if not files:
        raise ValueError(f"{argument}: no file matches")
    return [_below(root, file) for file in files]


def _in_folder(folder: Path) -> Iterator[Recording]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in _SUFFIXES and path.is_file():
            yield _below(folder, path)


def _below(root: Path, path: Path) -> Recording:
    return Recording(str(path), path, path.relative_to(root).with_suffix(""))


def _fixed_part(pattern: Path) -> Path:
    """The folders of a pattern before its first wildcard."""
    parts = []
    for part in pattern.parent.parts:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts)


def _with_distinct_places(recordings: list[Recording]) -> list[Recording]:
    """Let recordings that differ in their suffix only keep it: a.wav and a.mp3.

    That may be another's place in turn, as with a.wav.mp3, which then keeps its own.
    """
    while True:
        taken = Counter(recording.place for recording in recordings)
        distinct = [
            recording
            if taken[recording.place] == 1 or recording.path is None
            else replace(recording, place=recording.place.with_name(recording.path.name))
            for recording in recordings
        ]
        if distinct == recordings:
            return distinct
        recordings = distinct
