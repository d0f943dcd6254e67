"""What a data check kept and dropped: a JSON file for machines, a short table for people."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from model.data.checking import CheckedData
    from model.data.manifest import Utterance


@dataclass(frozen=True, slots=True)
class Amount:
    """How much speech: utterances, hours, and speakers where they are known."""

    utterances: int
    hours: float
    speakers: int


@dataclass(frozen=True, slots=True)
class DataReport:
    """A check's outcome.

    Attributes:
        source: what was checked.
        manifest: what was written; None where nothing was left.
        kept: all that was kept.
        splits: what was kept of each split, if the source has splits.
        dropped: number of utterances by reason.
        dropped_utterances: id, reason and detail of each.
        warnings: what the user should know before training on it.
    """

    source: str
    manifest: str | None
    kept: Amount
    splits: dict[str, Amount]
    dropped: dict[str, int]
    dropped_utterances: list[dict[str, str]]
    warnings: list[str]


def make_report(
    checked: CheckedData, source: Path, manifest: Path, ids_by_split: Mapping[str, set[str]]
) -> DataReport:
    """Summarise a check.

    Args:
        checked: what was kept and dropped.
        source: folder or manifest that was checked.
        manifest: where the kept utterances go.
        ids_by_split: ids that each split brought first; empty without splits.
    """
    kept_by_split = {
        name: [utterance for utterance in checked.kept if utterance.id in ids]
        for name, ids in ids_by_split.items()
    }
    counts = Counter(dropped.reason.value for dropped in checked.dropped)
    return DataReport(
        source=str(source),
        manifest=str(manifest) if checked.kept else None,
        kept=_amount(checked.kept),
        splits={name: _amount(utterances) for name, utterances in kept_by_split.items()},
        dropped=dict(counts.most_common()),
        dropped_utterances=[asdict(dropped) for dropped in checked.dropped],
        warnings=_shared_speakers(kept_by_split),
    )


def write_report(path: Path, report: DataReport) -> None:
    """Write a report as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.new")
    content = json.dumps(asdict(report), ensure_ascii=False, indent=2)
    fresh.write_text(content + "\n", encoding="utf-8")
    fresh.replace(path)


def render_report(report: DataReport) -> str:
    """Lay a report out as a short table in plain text."""
    rows = [("", "utterances", "hours", "speakers")]
    rows += [_row(f"kept of {name}", amount) for name, amount in report.splits.items()]
    rows.append(_row("kept", report.kept))
    rows += [(f"dropped: {reason}", str(count), "", "") for reason, count in report.dropped.items()]
    width = max(len(row[0]) for row in rows)
    lines = [f"{row[0]:<{width}}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in rows]
    lines += [f"warning: {warning}" for warning in report.warnings]
    return "\n".join(line.rstrip() for line in lines)


def _row(label: str, amount: Amount) -> tuple[str, str, str, str]:
    return label, str(amount.utterances), f"{amount.hours:.2f}", str(amount.speakers)


def _amount(utterances: Sequence[Utterance]) -> Amount:
    speakers = {utterance.speaker for utterance in utterances} - {None}
    seconds = sum(utterance.duration for utterance in utterances)
    return Amount(len(utterances), round(seconds / 3600, 4), len(speakers))


def _shared_speakers(kept_by_split: Mapping[str, Sequence[Utterance]]) -> list[str]:
    speakers = {
        name: {utterance.speaker for utterance in utterances} - {None}
        for name, utterances in kept_by_split.items()
    }
    warnings = []
    for first, second in combinations(speakers, 2):
        shared = len(speakers[first] & speakers[second])
        if shared:
            people = "speaker is" if shared == 1 else "speakers are"
            warnings.append(f"{shared} {people} in both {first} and {second}")
    return warnings
