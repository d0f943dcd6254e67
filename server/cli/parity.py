"""`speechllm parity`: the gate before a deployment."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path  # noqa: TC003 - Typer reads annotations at run time
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.failures import user_errors

if TYPE_CHECKING:
    from server.parity import Comparison, ParityClip

_APART = 1
_NOT_MEASURED = 2


@partial(user_errors, status=_NOT_MEASURED)
def parity(
    *,
    model: Annotated[str, typer.Option(help="Checkpoint folder or hub id.")] = "weights/default",
    manifest: Annotated[Path, typer.Option(help="JSONL manifest; texts are optional.")],
    audio_root: Annotated[
        Path | None,
        typer.Option(help="Folder that audio paths are relative to; default the manifest's."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bf16, fp16 or fp32.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=2, help="Clips that run together.")] = 8,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many utterances.")
    ] = None,
    num_beams: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=8,
            help="Beams of the search; 1 is greedy search.",
            show_default="the checkpoint's generation_config.json",
        ),
    ] = None,
    max_wer_delta: Annotated[
        float,
        typer.Option(min=0.0, help="Largest difference of the engine's word error rate."),
    ] = 0.001,
    max_disagreement: Annotated[
        float,
        typer.Option(min=0.0, help="Largest word error rate of the engine against generate."),
    ] = 0.005,
    as_json: Annotated[bool, typer.Option("--json", help="JSON in place of a table.")] = False,
) -> None:
    """Compare what is served with transformers' generate; 1 if they lie apart, 2 if unknown."""
    from model.transcription import Transcriber
    from server.engine.decoding import MAX_BEAMS
    from server.parity import measure_parity

    clips = _read_clips(manifest, audio_root, limit)
    transcriber = Transcriber.from_pretrained(model, device, dtype)
    beams = num_beams or min(transcriber.num_beams, MAX_BEAMS)
    comparisons = measure_parity(transcriber, clips, batch_size, beams)
    # The yardstick has nothing to differ from, and batches of generate are not what is served.
    apart = [
        each
        for each in comparisons
        if each.name.startswith("engine")
        and not each.is_within(max_wer_delta=max_wer_delta, max_disagreement=max_disagreement)
    ]
    if as_json:
        typer.echo(json.dumps(_as_json(comparisons, len(clips)), indent=2))
    else:
        _print(comparisons, len(clips))
    for each in apart:
        typer.echo(f"error: {each.name}: further from generate than allowed", err=True)
    if apart:
        raise typer.Exit(_APART)


def _read_clips(manifest: Path, audio_root: Path | None, limit: int | None) -> list[ParityClip]:
    from model.data.audio import load_audio
    from model.data.manifest import read_manifest
    from server.parity import ParityClip

    clips = []
    for utterance in read_manifest(manifest, audio_root)[:limit]:
        try:
            waveform = load_audio(utterance.audio)
        except (OSError, ValueError, RuntimeError) as error:  # libsndfile's are RuntimeErrors
            raise ValueError(f"{utterance.id}: {error}") from error
        clips.append(ParityClip(utterance.id, waveform, utterance.text, utterance.language))
    return clips


def _as_json(comparisons: list[Comparison], clips: int) -> dict[str, object]:
    from dataclasses import asdict

    return {"clips": clips, "ways": [asdict(each) for each in comparisons]}


def _print(comparisons: list[Comparison], clips: int) -> None:
    typer.echo(f"{clips} clips; differences are from the first row")
    header = ("", "differing", "token edits", "disagreement", "WER", "WER delta")
    rows = [
        (
            each.name,
            str(len(each.differing)),
            f"{each.token_error_rate:.3%}",
            f"{each.disagreement:.3%}",
            "-" if each.wer is None else f"{each.wer:.3%}",
            "-" if each.wer_delta is None else f"{each.wer_delta:+.3%}",
        )
        for each in comparisons
    ]
    for row in [header, *rows]:
        typer.echo(f"{row[0]:<18}" + "".join(f"{cell:>14}" for cell in row[1:]))
    for each in comparisons:
        if each.differing:
            more = " …" if len(each.differing) > 5 else ""  # noqa: PLR2004 - as many as a line holds
            typer.echo(f"{each.name} differs on: {' '.join(each.differing[:5])}{more}")
