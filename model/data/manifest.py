"""Manifests: one JSON object a line, one utterance an object.

Keys: `audio` (path; relative to the audio root), `text` (reference; "" is non-speech, null or
absent is unlabelled), `speaker`, `language`, `duration` (seconds) and `id` (default: the audio
path as it is written). Other keys are ignored.
"""

from __future__ import annotations

import json
import math
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path


class ManifestError(ValueError):
    """A manifest cannot be used; the message names the file, the line and the fault."""


@dataclass(frozen=True, slots=True)
class Utterance:
    """One recording and what is said in it.

    Attributes:
        id: unique within its manifest.
        audio: the recording.
        text: NFC-normalised reference; "" is non-speech, None is unlabelled.
        speaker: who speaks, where known.
        language: ISO 639 code, where known.
        duration: seconds.
    """

    id: str
    audio: Path
    text: str | None
    speaker: str | None
    language: str | None
    duration: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """An utterance whose recording nobody has looked at yet; see `Utterance` for the fields.

    Attributes:
        duration: seconds, as the data set claims; None where it claims nothing.
    """

    id: str
    audio: Path
    text: str | None
    speaker: str | None
    language: str | None
    duration: float | None


def read_manifest(path: Path, audio_root: Path | None = None) -> list[Utterance]:
    """Read a manifest; the recordings themselves are not opened.

    Args:
        path: the JSONL file.
        audio_root: folder that relative audio paths start from; default the manifest's own.

    Raises:
        ManifestError: the file cannot be read, a line is not a valid utterance, two lines share
            an id, or there is no line at all.
    """
    lines_of_ids: dict[str, int] = {}
    utterances = []
    for number, candidate in _read_lines(path, audio_root):
        if candidate.duration is None:
            raise ManifestError(
                f"{path}, line {number}: duration is missing; `speechllm data manifest` measures it"
            )
        first = lines_of_ids.setdefault(candidate.id, number)
        if first != number:
            raise ManifestError(
                f"{path}, line {number}: id {candidate.id!r} is taken by line {first}"
            )
        utterances.append(
            Utterance(
                id=candidate.id,
                audio=candidate.audio,
                text=candidate.text,
                speaker=candidate.speaker,
                language=candidate.language,
                duration=candidate.duration,
            )
        )
    if not utterances:
        raise ManifestError(f"{path}: holds no utterances")
    return utterances


def read_candidates(path: Path, audio_root: Path | None = None) -> list[Candidate]:
    """Read a manifest that is still to be checked: durations may be missing, ids may repeat.

    Args:
        path: the JSONL file.
        audio_root: folder that relative audio paths start from; default the manifest's own.

    Raises:
        ManifestError: the file cannot be read, or a line is malformed.
    """
    return [candidate for _, candidate in _read_lines(path, audio_root)]


def write_manifest(path: Path, utterances: Iterable[Utterance]) -> None:
    """Write a manifest, whole or not at all.

    Audio paths are written relative to the manifest's folder where they lie below it, so that
    the two can be moved together, and absolute elsewhere.
    """
    folder = path.parent.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.new")
    with fresh.open("w", encoding="utf-8", newline="\n") as file:
        for utterance in utterances:
            audio = utterance.audio.resolve()
            record = {
                "id": utterance.id,
                "audio": (
                    audio.relative_to(folder) if audio.is_relative_to(folder) else audio
                ).as_posix(),
                "text": utterance.text,
                "speaker": utterance.speaker,
                "language": utterance.language,
                "duration": round(utterance.duration, 4),
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    fresh.replace(path)


def _read_lines(path: Path, audio_root: Path | None) -> Iterator[tuple[int, Candidate]]:
    root = path.parent if audio_root is None else audio_root
    try:
        # Not str.splitlines: U+2028 and its like may stand in a text.
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        yield number, _parse(line, root)
                    except ManifestError as error:
                        raise ManifestError(f"{path}, line {number}: {error}") from None
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: is not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error.strerror}") from error


def _parse(line: str, audio_root: Path) -> Candidate:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ManifestError(f"is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ManifestError(f"is a JSON {type(record).__name__}, not an object")
    audio = _string(record, "audio")
    if not audio:
        raise ManifestError("audio is empty or missing")
    utterance_id = _string(record, "id")
    if utterance_id == "":
        raise ManifestError("id is empty")
    text = _string(record, "text")
    return Candidate(
        id=audio if utterance_id is None else utterance_id,
        audio=audio_root / audio,
        text=None if text is None else unicodedata.normalize("NFC", text),
        speaker=_string(record, "speaker"),
        language=_string(record, "language"),
        duration=_duration(record),
    )


def _string(record: dict[str, Any], key: str) -> str | None:
    value = record.get(key)
    if value is None or isinstance(value, str):
        return value
    raise ManifestError(f"{key} must be a string, not {value!r:.80}")


def _duration(record: dict[str, Any]) -> float | None:
    value = record.get("duration")
    if value is None:
        return None
    # bool is a subclass of int.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ManifestError(f"duration must be a number of seconds, not {value!r:.80}")
    if not (math.isfinite(value) and value > 0):
        raise ManifestError(f"duration must be above 0 s, not {value!r:.80}")
    return float(value)
