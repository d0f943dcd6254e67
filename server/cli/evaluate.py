"""`speechllm evaluate` and `speechllm compare`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path  # noqa: TC003 - Typer reads annotations at run time
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from model.data.manifest import Utterance
    from model.evaluation.decoding import BatchLimits, Clip, Decoding, SpeechTranscriber
    from model.evaluation.summary import GroupSummary

_FAILED = 1
_BAD_USAGE = 2


def evaluate(
    *,
    model: Annotated[
        Path, typer.Option(help="Checkpoint folder: a speech LLM or a plain Whisper model.")
    ],
    manifest: Annotated[Path, typer.Option(help="JSONL manifest with references.")],
    output: Annotated[Path, typer.Option(help="Folder for results, report and figures.")],
    audio_root: Annotated[
        Path | None,
        typer.Option(help="Folder that audio paths are relative to; default the manifest's."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Most clips in a batch.")] = 16,
    max_batch_audio_s: Annotated[
        float, typer.Option(min=1.0, help="Most seconds of audio in a batch, padding included.")
    ] = 240.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, as it is served; bf16, fp16 or fp32.")] = "auto",
    language: Annotated[
        str | None,
        typer.Option(help="Language of utterances for which the manifest names none."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many utterances.")
    ] = None,
    with_ctc: Annotated[
        bool, typer.Option("--with-ctc", help="Also score the CTC head's greedy text.")
    ] = False,
    num_beams: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Beams of a speech LLM's search; 1 is greedy search.",
            show_default="the checkpoint's generation_config.json",
        ),
    ] = None,
) -> None:
    """Transcribe a manifest and report word and character error rates."""
    # Imported here, as in all commands, so that --help does not wait for torch.
    from model.evaluation.decoding import BatchLimits, load_transcriber
    from model.evaluation.report import Evaluation, describe_environment, write_evaluation
    from model.evaluation.scoring import score_utterance

    try:
        clips, unlabelled = _read_clips(manifest, audio_root, language, limit)
        output.mkdir(parents=True, exist_ok=True)
        transcriber = load_transcriber(model, device, dtype)
    except (OSError, ValueError) as error:
        _fail(str(error), _BAD_USAGE)
    num_beams = num_beams or transcriber.num_beams
    decoding = _transcribe_with_progress(
        transcriber,
        clips,
        BatchLimits(batch_size, max_batch_audio_s),
        with_ctc=with_ctc,
        num_beams=num_beams,
    )
    for failed in decoding.failed:
        typer.echo(f"failed: {failed.id}: {failed.reason}", err=True)
    evaluation = Evaluation(
        model=str(model),
        manifest=str(manifest),
        settings={
            "batch_size": batch_size,
            "max_batch_audio_s": max_batch_audio_s,
            "with_ctc": with_ctc,
            "num_beams": num_beams,
            "language": language,
            "limit": limit,
        },
        environment=describe_environment(transcriber.device, dtype),
        decoding=decoding,
        utterances=[score_utterance(result) for result in decoding.results],
        unlabelled=unlabelled,
    )
    try:
        total = write_evaluation(output, evaluation)
    except (OSError, ValueError) as error:
        _fail(str(error), _FAILED)
    _print_totals(total, decoding, unlabelled, output)
    if decoding.failed:
        _fail(f"{len(decoding.failed)} of {len(clips)} utterances failed", _FAILED)


def compare(
    results_a: Annotated[Path, typer.Argument(help="results.jsonl of the first system.")],
    results_b: Annotated[Path, typer.Argument(help="results.jsonl of the second system.")],
) -> None:
    """Compare two evaluations of the same utterances with a paired bootstrap."""
    from model.evaluation.comparison import compare_results
    from model.evaluation.report import render_comparison
    from model.evaluation.results import read_results

    try:
        comparisons = compare_results(read_results(results_a), read_results(results_b))
    except ValueError as error:
        _fail(str(error), _BAD_USAGE)
    typer.echo(f"A: {results_a}\nB: {results_b}\n\n{render_comparison(comparisons)}")


def _read_clips(
    manifest: Path, audio_root: Path | None, language: str | None, limit: int | None
) -> tuple[list[Clip], int]:
    """Read the labelled utterances, and count those without a reference."""
    from model.data.manifest import read_manifest
    from model.evaluation.decoding import Clip
    from model.evaluation.errors import EvaluationError
    from model.evaluation.results import require_unique_ids

    utterances = read_manifest(manifest, audio_root)[:limit]
    require_unique_ids((utterance.id for utterance in utterances), str(manifest))
    clips = [
        Clip(
            id=utterance.id,
            reference=utterance.text,
            language=utterance.language or language,
            speaker=utterance.speaker,
            duration_s=utterance.duration,
            load=partial(_load_waveform, utterance),
        )
        for utterance in utterances
        if utterance.text is not None
    ]
    if not clips:
        raise EvaluationError(f"{manifest}: no utterance has a text to score against")
    return clips, len(utterances) - len(clips)


def _load_waveform(utterance: Utterance) -> NDArray[np.float32]:
    from model.data.audio import load_audio
    from model.evaluation.errors import UnreadableClipError

    try:
        return load_audio(utterance.audio)
    except (OSError, ValueError, RuntimeError) as error:  # libsndfile's are RuntimeErrors
        raise UnreadableClipError(str(error)) from error


def _transcribe_with_progress(
    transcriber: SpeechTranscriber,
    clips: Sequence[Clip],
    limits: BatchLimits,
    *,
    with_ctc: bool,
    num_beams: int,
) -> Decoding:
    import torch
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    from model.evaluation.decoding import transcribe_clips

    columns = (*Progress.get_default_columns(), TextColumn("RTFx {task.fields[rtfx]:.1f}"))
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        task = progress.add_task("Transcribing", total=len(clips), rtfx=0.0)

        def show(done: int, so_far: Decoding) -> None:
            progress.update(task, completed=done, rtfx=so_far.rtfx)

        try:
            return transcribe_clips(
                transcriber,
                clips,
                limits,
                with_ctc=with_ctc,
                num_beams=num_beams,
                on_progress=show,
            )
        except ValueError as error:  # no CTC head, or no beam search
            _fail(str(error), _BAD_USAGE)
        except torch.OutOfMemoryError:
            _fail(
                "out of device memory: lower --batch-size or --max-batch-audio-s "
                f"(now {limits.max_clips} and {limits.max_audio_s:g})",
                _FAILED,
            )


def _print_totals(total: GroupSummary, decoding: Decoding, unlabelled: int, output: Path) -> None:
    echo: Callable[[str], None] = typer.echo
    for label, metrics in (("", total.metrics), ("CTC ", total.ctc_metrics)):
        for name, metric in (("WER", "word_normalised"), ("CER", "char_normalised")):
            rate = metrics[metric] if metrics else None
            if rate is None or rate.rate is None:
                continue
            interval = rate.interval
            span = f" (95 % CI {interval.low:.2%} … {interval.high:.2%})" if interval else ""
            echo(f"{label}{name} normalised {rate.rate:.2%}{span}")
    echo(f"{total.utterances} utterances, {total.duration_s:.1f} s, RTFx {decoding.rtfx:.1f}")
    if unlabelled:
        echo(f"Utterances without a reference, left out: {unlabelled}")
    echo(f"Report: {output / 'report.md'}")


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)
