"""`speechllm transcribe`: recordings to text, in this process or at a server."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from functools import partial
from pathlib import Path  # noqa: TC003 - Typer reads annotations at run time
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn, Self

import typer
from tqdm import tqdm

from server.cli.recordings import Recording, check_places, find_recordings
from server.cli.transcribers import (
    BadOptionError,
    TranscriberUnavailableError,
    TranscriptionFailedError,
    at_server,
    in_process,
)
from server.cli.transcripts import (
    JSON_LINES,
    JsonLines,
    StandardOutput,
    TranscriptFiles,
    Transcripts,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractAsyncContextManager

    from server.cli.transcribers import FileTranscriber
    from server.client import Options, ResponseFormat

_FAILED = 1
_BAD_USAGE = 2
_DEFAULT_MODEL = "weights/default"

Format = Literal["text", "json", "verbose_json", "srt", "vtt", "tsv", "jsonl"]


def transcribe(
    files: Annotated[
        list[str],
        typer.Argument(
            help="Recordings in any format that the server takes, folders of them, patterns in "
            "quotes such as 'calls/**/*.wav', or - for standard input."
        ),
    ],
    *,
    server: Annotated[
        str | None,
        typer.Option(help="Address of a server that transcribes, in place of this process."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="The server's; the variable keeps it out of the list of processes.",
            envvar="SPEECHLLM_API_KEY",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint folder or hub id.", show_default=_DEFAULT_MODEL),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or cuda:N.", show_default="auto")
    ] = None,
    form: Annotated[
        Format, typer.Option("--format", help="Of the transcripts; jsonl is an object a line.")
    ] = "text",
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for a file a recording, or for transcripts.jsonl."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write anew what an earlier run has written.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, max=256, help="Recordings at once.")] = 4,
    language: Annotated[str | None, typer.Option(help="ISO 639-1 code of what is spoken.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Replaces the checkpoint's own.")] = None,
    hotwords: Annotated[
        str | None, typer.Option(help="Words that are likely to be said, between commas.")
    ] = None,
    timestamps: Annotated[
        Literal["none", "segment", "word"] | None,
        typer.Option(help="How finely to place json in time."),
    ] = None,
) -> None:
    """Turn recordings into text.

    What --output holds already is skipped, so that a run that was broken off goes on where it was.
    Status: 0, all is well; 1, some failed, each with its reason on standard error; 2, bad usage.
    """  # fmt: skip
    given = {"language": language, "prompt": prompt, "hotwords": hotwords, "timestamps": timestamps}
    options: Options = {name: value for name, value in given.items() if value is not None}  # type: ignore[assignment]  # a TypedDict, of its own keys
    wire_format: ResponseFormat = "json" if form == JSON_LINES else form  # type: ignore[assignment]  # the rest of the forms
    for option, value in (("--model", model), ("--device", device)):
        if server is not None and value is not None:
            _end(f"--server has a {option[2:]} of its own: leave out {option}", _BAD_USAGE)
    try:
        recordings = find_recordings(files)
        transcripts = _transcripts(recordings, form, output, overwrite=overwrite)
    except ValueError as error:
        _end(str(error), _BAD_USAGE)
    except OSError as error:
        _end(f"{error.filename}: {error.strerror}", _BAD_USAGE)
    transcriber = (
        in_process(model, device, wire_format, options, jobs=jobs)
        if server is None
        else at_server(server, api_key, wire_format, options)
    )
    with contextlib.closing(transcripts):
        failures = _run(recordings, transcriber, transcripts, jobs)
    if failures:
        _end(f"{failures} of {len(recordings)} recordings failed", _FAILED)


def _transcripts(
    recordings: Sequence[Recording], form: Format, output: Path | None, *, overwrite: bool
) -> Transcripts:
    if output is None:
        if len(recordings) > 1 and form not in {"text", JSON_LINES}:
            raise ValueError(f"several recordings in {form} need --output, a folder for them")
        return StandardOutput(recordings, form)
    if form == JSON_LINES:
        return JsonLines(output, overwrite=overwrite)
    check_places(recordings)
    return TranscriptFiles(output, form, overwrite=overwrite)


def _run(
    recordings: Sequence[Recording],
    transcriber: AbstractAsyncContextManager[FileTranscriber],
    transcripts: Transcripts,
    jobs: int,
) -> int:
    """Transcribe what is not there yet; return how many have failed."""
    missing = [recording for recording in recordings if not transcripts.has(recording)]
    if len(missing) < len(recordings):
        typer.echo(f"{len(recordings) - len(missing)} recordings are transcribed already", err=True)
    if not missing:
        return 0
    try:
        return asyncio.run(_transcribe_all(missing, transcriber, transcripts, jobs))
    except TranscriberUnavailableError as error:
        _end(str(error), _FAILED)
    except BadOptionError as error:
        _end(str(error), _BAD_USAGE)
    except OSError as error:  # a full disk, say
        _end(str(error), _FAILED)


async def _transcribe_all(
    recordings: Sequence[Recording],
    transcriber: AbstractAsyncContextManager[FileTranscriber],
    transcripts: Transcripts,
    jobs: int,
) -> int:
    waiting = iter(recordings)
    failures = 0

    async def work() -> None:
        nonlocal failures
        for recording in waiting:
            try:
                data = await asyncio.to_thread(_read, recording)
                on_advance = partial(bar.advance, recording)
                text = await transcribe_file(recording.name, data, on_advance)
                transcripts.write(recording, text)
            except TranscriptionFailedError as error:
                failures += 1
                transcripts.fail(recording, error)
                tqdm.write(f"error: {recording.name}: {error}", file=sys.stderr)
            bar.end(recording)

    with _Bar(len(recordings)) as bar:
        async with transcriber as transcribe_file:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(jobs, len(recordings))):
                        group.create_task(work())
            except ExceptionGroup as errors:  # of plain errors: no task starts others
                raise errors.exceptions[0] from errors
    return failures


class _Bar:
    """Draws on standard error how many recordings are done; long ones count as far as they are."""

    def __init__(self, recordings: int) -> None:
        self._done: dict[Recording, float] = {}  # of each that is under way, 0 to 1
        self._bar = tqdm(
            total=recordings,
            unit="file",
            file=sys.stderr,
            disable=None,  # no bar where nobody looks at one
            bar_format="{l_bar}{bar}| {n:.2f}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )

    def advance(self, recording: Recording, processed_s: float, total_s: float | None) -> None:
        self._bar.set_postfix_str(f"{recording.name}: {processed_s:.0f} s", refresh=total_s is None)
        if total_s:
            self._move(recording, min(1.0, processed_s / total_s))

    def end(self, recording: Recording) -> None:
        self._move(recording, 1.0)
        del self._done[recording]

    def _move(self, recording: Recording, done: float) -> None:
        self._bar.update(done - self._done.get(recording, 0.0))
        self._done[recording] = done

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _read(recording: Recording) -> bytes:
    try:
        return sys.stdin.buffer.read() if recording.path is None else recording.path.read_bytes()
    except OSError as error:
        raise TranscriptionFailedError(error.strerror or str(error), "unreadable") from error


def _end(reason: str, status: int) -> NoReturn:
    typer.echo(f"error: {reason}", err=True)
    raise typer.Exit(status)
