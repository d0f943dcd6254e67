"""`speechllm data`: check data sets and write the manifests that training reads."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from model.data.checking import CheckedData, Dropped
    from model.data.common_voice import Split
    from model.data.manifest import Candidate

_FAILED = 1
_BAD_USAGE = 2

app = typer.Typer(
    help="Check a data set and write the manifest that training reads.", no_args_is_help=True
)


class SplitChoice(StrEnum):
    """Splits of a Common Voice release that can be asked for."""

    TRAIN = "train"
    DEV = "dev"
    TEST = "test"
    VALIDATED = "validated"
    OTHER = "other"
    ALL = "all"


Output = Annotated[
    Path, typer.Option(help="Manifest to write (.jsonl); its report goes beside it.")
]
MaxDuration = Annotated[float, typer.Option(min=0.1, help="Longest recording to keep, in seconds.")]


@app.command("common-voice")
def common_voice(
    folder: Annotated[Path, typer.Argument(help="Root or language folder of the release.")],
    split: Annotated[
        list[SplitChoice],
        typer.Option(
            help="Split to read; repeat for several. validated contains train, dev, test."
        ),
    ],
    language: Annotated[str, typer.Option(help="Code of the language, such as mn.")],
    output: Output,
    max_duration: MaxDuration = 30.0,
) -> None:
    """Check an official Common Voice release and write a manifest of it.

    Every clip is decoded. What cannot be used is left out and listed in the report.
    """
    from model.data.common_voice import CommonVoiceError, read_common_voice

    _require_file_name(output)
    wanted = None if SplitChoice.ALL in split else [choice.value for choice in split]
    try:
        splits = read_common_voice(folder, wanted, language)
    except CommonVoiceError as error:
        _fail(str(error), _BAD_USAGE)
    checked = _check(
        [candidate for part in splits for candidate in part.candidates],
        [dropped for part in splits for dropped in part.malformed],
        max_duration,
        keep_unlabelled=False,
    )
    _write(checked, folder, output, _ids_by_split(splits))


@app.command("manifest")
def manifest(
    source: Annotated[Path, typer.Argument(help="JSONL manifest to check.")],
    output: Output,
    audio_root: Annotated[
        Path | None,
        typer.Option(help="Folder that audio paths are relative to; default the manifest's."),
    ] = None,
    max_duration: MaxDuration = 30.0,
    keep_unlabelled: Annotated[
        bool, typer.Option("--keep-unlabelled", help="Keep utterances whose text is null.")
    ] = False,
) -> None:
    """Check a JSONL manifest and write it anew.

    Every recording is decoded. What cannot be used is left out and listed in the report.
    """
    from model.data.manifest import ManifestError, read_candidates

    _require_file_name(output)
    if output.resolve() == source.resolve():
        _fail(f"{output}: the manifest to check would be overwritten", _BAD_USAGE)
    try:
        candidates = read_candidates(source, audio_root)
    except ManifestError as error:
        _fail(str(error), _BAD_USAGE)
    checked = _check(candidates, [], max_duration, keep_unlabelled=keep_unlabelled)
    _write(checked, source, output, {})


def _check(
    candidates: Sequence[Candidate],
    malformed: Sequence[Dropped],
    max_duration_s: float,
    *,
    keep_unlabelled: bool,
) -> CheckedData:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    from model.data.checking import CheckedData, DecodingCrashError, check_candidates

    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        task = progress.add_task("Decoding", total=None)
        try:
            checked = check_candidates(
                candidates,
                max_duration_s=max_duration_s,
                keep_unlabelled=keep_unlabelled,
                on_progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
        except DecodingCrashError as error:
            _fail(str(error), _FAILED)
    return CheckedData(checked.kept, [*malformed, *checked.dropped])


def _ids_by_split(splits: Sequence[Split]) -> dict[str, set[str]]:
    """Ids of each split that no split before it has: where the check keeps the clip from."""
    seen: set[str] = set()
    ids_by_split: dict[str, set[str]] = {}
    for split in splits:
        ids = {candidate.id for candidate in split.candidates}
        ids_by_split[split.name] = ids - seen
        seen |= ids
    return ids_by_split


def _write(
    checked: CheckedData, source: Path, output: Path, ids_by_split: Mapping[str, set[str]]
) -> None:
    from model.data.manifest import write_manifest
    from model.data.report import make_report, render_report, write_report

    report = make_report(checked, source, output, ids_by_split)
    report_path = output.with_suffix(".report.json")
    try:
        if checked.kept:
            write_manifest(output, checked.kept)
        write_report(report_path, report)
    except OSError as error:
        _fail(f"{error.filename}: cannot be written: {error.strerror}", _FAILED)
    typer.echo(render_report(report))
    typer.echo(f"Report: {report_path}")
    if not checked.kept:
        first = report.dropped_utterances[0] if report.dropped_utterances else None
        why = f"; the first one: {first['reason']}, {first['detail']}" if first else ""
        _fail(f"{source}: no utterance is usable, so no manifest is written{why}", _FAILED)
    typer.echo(f"Manifest: {output}")


def _require_file_name(output: Path) -> None:
    if output.is_dir():
        _fail(f"{output}: is a folder, not a manifest's file name", _BAD_USAGE)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)
