"""`speechllm transcribe`: files to text, in this process."""

from __future__ import annotations

import json
from pathlib import Path  # noqa: TC003 - Typer reads annotations at run time
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.failures import user_errors

if TYPE_CHECKING:
    from model.transcription import Transcriber

_FAILED = 1


@user_errors
def transcribe(
    files: Annotated[list[Path], typer.Argument(help="Recordings in any format the server takes.")],
    *,
    model: Annotated[str, typer.Option(help="Checkpoint folder or hub id.")] = "weights/default",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    prompt: Annotated[str | None, typer.Option(help="Replaces the checkpoint's own.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line, in place of plain text.")
    ] = False,
) -> None:
    """Print what recordings say; status 1 if any of them failed."""
    from model.transcription import Transcriber
    from server.errors import AudioError

    transcriber = Transcriber.from_pretrained(model, device)
    has_failed = False
    for file in files:
        try:
            line = _transcribe_file(transcriber, file, prompt)
        except (AudioError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            typer.echo(f"error: {file}: {reason}", err=True)
            has_failed = True
            continue
        if as_json:
            typer.echo(json.dumps(line, ensure_ascii=False))
        else:
            typer.echo(f"{file}: {line['text']}" if len(files) > 1 else line["text"])
    if has_failed:
        raise typer.Exit(_FAILED)


def _transcribe_file(transcriber: Transcriber, file: Path, prompt: str | None) -> dict[str, object]:
    from server.audio.decode import decode
    from server.audio.limits import AudioLimits

    clip = decode(file.read_bytes(), AudioLimits(max_audio_s=transcriber.max_audio_s))
    (transcript,) = transcriber.transcribe([clip.waveform], prompt=prompt).transcripts
    return {
        "file": str(file),
        "text": transcript.text,
        "language": transcript.language,
        "duration": clip.duration_s,
        "finish_reason": transcript.finish_reason,
    }
