"""The result file: one JSON object a line, one line an utterance."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from model.evaluation.errors import EvaluationError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from model.evaluation.scoring import ScoredUtterance

_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "id": (str,),
    "reference": (str,),
    "hypothesis": (str,),
    "ctc_hypothesis": (str, type(None)),
    "language": (str, type(None)),
    "speaker": (str, type(None)),
    "duration_s": (int, float),
    "finish_reason": (str,),
}


@dataclass(frozen=True, slots=True)
class UtteranceResult:
    """What a model put out for one recording, as raw text.

    Attributes:
        id: of the utterance in its manifest.
        reference: what was said; "" for non-speech.
        hypothesis: what the model put out.
        ctc_hypothesis: greedy text of the CTC head; None where it was not asked for.
        language: tag that chooses the normaliser; None when not known.
        speaker: None when not known.
        duration_s: of the audio as decoded.
        finish_reason: "stop" when the model ended the text itself, "length" when it was cut.
    """

    id: str
    reference: str
    hypothesis: str
    ctc_hypothesis: str | None
    language: str | None
    speaker: str | None
    duration_s: float
    finish_reason: str


def write_results(path: Path, utterances: Iterable[ScoredUtterance]) -> None:
    """Write results with their error counts; the counts are for the reader, not for rescoring."""
    with path.open("w", encoding="utf-8") as file:
        for utterance in utterances:
            row = asdict(utterance.result) | {
                "errors": asdict(utterance.scores),
                "ctc_errors": asdict(utterance.ctc_scores) if utterance.ctc_scores else None,
                "repeats": utterance.repeats,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_results(path: Path) -> list[UtteranceResult]:
    """Read a file that `write_results` wrote.

    Raises:
        EvaluationError: the file is missing, empty, holds an id twice, or a line is not a result.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: cannot be read: {error}") from error
    results = [
        _parse_result(line, f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not results:
        raise EvaluationError(f"{path}: no results in it")
    require_unique_ids((result.id for result in results), str(path))
    return results


def require_unique_ids(ids: Iterable[str], source: str) -> None:
    """Refuse a set of utterances in which two share an id.

    Raises:
        EvaluationError: names the first id that is there twice.
    """
    seen: set[str] = set()
    for utterance_id in ids:
        if utterance_id in seen:
            raise EvaluationError(f"{source}: utterance id {utterance_id!r} is there twice")
        seen.add(utterance_id)


def _parse_result(line: str, place: str) -> UtteranceResult:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{place}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise EvaluationError(f"{place}: not a JSON object")
    for name, types in _FIELD_TYPES.items():
        if name not in row:
            raise EvaluationError(f"{place}: field {name!r} is missing")
        if not isinstance(row[name], types) or isinstance(row[name], bool):
            raise EvaluationError(f"{place}: field {name!r} has the wrong type: {row[name]!r}")
    return UtteranceResult(**{name: row[name] for name in _FIELD_TYPES})
