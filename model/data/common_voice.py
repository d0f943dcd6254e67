"""Mozilla Common Voice releases, read as they are distributed.

A release's language folder holds `train.tsv`, `dev.tsv`, `test.tsv`, `validated.tsv`,
`other.tsv`, the recordings in `clips/`, and in newer releases `clip_durations.tsv`. Columns have
been added over the years; only `client_id`, `path` and `sentence` are needed.
"""

from __future__ import annotations

import csv
import unicodedata
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from model.data.checking import Dropped, DropReason
from model.data.manifest import Candidate

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

# `validated` contains train, dev and test, so it comes after them.
SPLITS = ("train", "dev", "test", "validated", "other")
_COLUMNS = ("client_id", "path", "sentence")
_DURATION_COLUMNS = ("clip", "duration[ms]")


class CommonVoiceError(ValueError):
    """A folder is no usable Common Voice release; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Split:
    """One split: its clips, and the rows of its table that name none."""

    name: str
    candidates: list[Candidate]
    malformed: list[Dropped]


def read_common_voice(folder: Path, splits: Sequence[str] | None, language: str) -> list[Split]:
    """Read the tables of a release; the clips themselves are not opened.

    Sentences are taken as they are, but NFC-normalised and with runs of white space collapsed.

    Args:
        folder: the release's root or its language folder.
        splits: names out of `SPLITS`; None is every one the release has.
        language: the release's code of the language, such as "mn".

    Raises:
        CommonVoiceError: there is no such release, language, split or column, a table is not
            UTF-8, or a table is of another language.
    """
    release = _find_language_folder(folder, language)
    present = [name for name in SPLITS if (release / f"{name}.tsv").is_file()]
    wanted = present if splits is None else list(dict.fromkeys(splits))
    missing = [name for name in wanted if name not in present]
    if missing:
        raise CommonVoiceError(
            f"{release}: has no {', '.join(missing)} split, only {', '.join(present)}"
        )
    durations_s = _read_durations(release)
    return [_read_split(release, name, language, durations_s) for name in wanted]


def _find_language_folder(folder: Path, language: str) -> Path:
    if not folder.is_dir():
        raise CommonVoiceError(f"{folder}: no such folder")
    for candidate in (folder, folder / language):
        if any((candidate / f"{name}.tsv").is_file() for name in SPLITS):
            if not (candidate / "clips").is_dir():
                raise CommonVoiceError(f"{candidate}: the folder clips is missing")
            return candidate
    raise CommonVoiceError(
        f"{folder}: no Common Voice release: neither it nor {folder / language} holds a table "
        f"such as {SPLITS[0]}.tsv"
    )


def _read_split(release: Path, name: str, language: str, durations_s: dict[str, float]) -> Split:
    table = release / f"{name}.tsv"
    candidates: list[Candidate] = []
    malformed: list[Dropped] = []
    for number, row in _read_table(table, _COLUMNS):
        if row is None or not row["path"]:
            detail = "names no clip" if row else "has another number of columns than the header"
            malformed.append(Dropped(f"{table.name}:{number}", DropReason.MALFORMED, detail))
            continue
        locale = row.get("locale") or language
        if locale != language:
            raise CommonVoiceError(f"{table}, line {number}: is {locale!r}, not {language!r}")
        clip = PurePosixPath(row["path"])
        if not clip.suffix:  # the first releases left it out
            clip = clip.with_suffix(".mp3")
        candidates.append(
            Candidate(
                id=clip.stem,
                audio=release / "clips" / clip,
                text=" ".join(unicodedata.normalize("NFC", row["sentence"]).split()) or None,
                speaker=row["client_id"] or None,
                language=language,
                duration=durations_s.get(clip.name),
            )
        )
    return Split(name, candidates, malformed)


def _read_durations(release: Path) -> dict[str, float]:
    """Seconds by file name, where the release has them."""
    table = release / "clip_durations.tsv"
    if not table.is_file():
        return {}
    durations_s: dict[str, float] = {}
    clip, milliseconds = _DURATION_COLUMNS
    for number, row in _read_table(table, _DURATION_COLUMNS):
        try:
            if row is not None:
                durations_s[row[clip]] = float(row[milliseconds]) / 1000
        except ValueError:
            raise CommonVoiceError(
                f"{table}, line {number}: {row and row[milliseconds]!r} is no duration"
            ) from None
    return durations_s


def _read_table(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str] | None]]:
    """Yield each row's line number and cells; None for a row that does not fit the header."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            # The tables are not quoted: a quotation mark is part of the sentence.
            rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            header = next(rows, [])
            missing = [column for column in columns if column not in header]
            if missing:
                raise CommonVoiceError(f"{path}: the column {', '.join(missing)} is missing")
            for row in rows:
                fits = len(row) == len(header)
                if row:
                    cells = dict(zip(header, row, strict=True)) if fits else None
                    yield rows.line_num, cells
    except UnicodeDecodeError as error:
        raise CommonVoiceError(f"{path}: is not UTF-8 text ({error.reason})") from error
    except csv.Error as error:
        raise CommonVoiceError(f"{path}, line {rows.line_num}: {error}") from error
    except OSError as error:
        raise CommonVoiceError(f"{path}: cannot be read: {error.strerror}") from error
