"""What an evaluation leaves behind: result file, summary, Markdown report and figures."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from model.evaluation.bootstrap import REPLICATES, SEED
from model.evaluation.plots import plot_wer_by_duration, plot_wer_distribution
from model.evaluation.results import write_results
from model.evaluation.summary import group_by_language, summarise
from model.transcription import pick_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from model.evaluation.comparison import Comparison
    from model.evaluation.decoding import Decoding
    from model.evaluation.scoring import ScoredUtterance
    from model.evaluation.summary import CorpusRate, GroupSummary

_WORST_SHOWN = 20
_MAX_TEXT_SHOWN = 300
_METRIC_TITLES = {
    "word_raw": "WER raw",
    "word_normalised": "WER normalised",
    "char_raw": "CER raw",
    "char_normalised": "CER normalised",
}
_TOTAL = "total"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A finished evaluation.

    Attributes:
        model: checkpoint as the user named it.
        manifest: as the user named it.
        settings: of the decoding, by name.
        environment: versions and hardware, by name.
        decoding: results, failures and timings.
        utterances: the results, scored.
        unlabelled: utterances of the manifest left out because they have no reference.
    """

    model: str
    manifest: str
    settings: dict[str, str | int | float | bool | None]
    environment: dict[str, str]
    decoding: Decoding
    utterances: Sequence[ScoredUtterance]
    unlabelled: int


def describe_environment(device: torch.device, dtype: str) -> dict[str, str]:
    """Name what may change a figure or a speed: versions, device, threads."""
    hardware = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    packages = ("torch", "transformers", "jiwer", "whisper-normalizer")
    return {
        "device": f"{device.type} ({hardware})",
        "dtype": str(pick_dtype(dtype, device)).removeprefix("torch."),
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
    }


def write_evaluation(folder: Path, evaluation: Evaluation) -> GroupSummary:
    """Write results.jsonl, summary.json, report.md and the figures into a folder.

    Returns:
        The summary of all utterances.

    Raises:
        EvaluationError: nothing was transcribed.
        OSError: the folder cannot be written.
    """
    total = summarise(evaluation.utterances)
    languages = {
        language: summarise(group)
        for language, group in group_by_language(evaluation.utterances).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_results(folder / "results.jsonl", evaluation.utterances)
    summary = summary_json(evaluation, total, languages)
    (folder / "summary.json").write_text(
        json.dumps(summary, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
    )
    (folder / "report.md").write_text(render_report(evaluation, total, languages), encoding="utf-8")
    plot_wer_by_duration(folder / "wer_by_duration.png", evaluation.utterances)
    plot_wer_distribution(folder / "wer_distribution.png", evaluation.utterances)
    return total


def summary_json(
    evaluation: Evaluation, total: GroupSummary, languages: dict[str, GroupSummary]
) -> dict[str, Any]:
    """Lay out the figures for other programs; rates are fractions."""
    decoding = evaluation.decoding
    return {
        "model": evaluation.model,
        "manifest": evaluation.manifest,
        "settings": evaluation.settings,
        "environment": evaluation.environment,
        "bootstrap": {"replicates": REPLICATES, "seed": SEED, "confidence": 0.95},
        "total": _group_json(total),
        "languages": {language: _group_json(group) for language, group in languages.items()},
        "speed": {
            "audio_s": decoding.audio_s,
            "transcribe_s": decoding.transcribe_s,
            "encode_s": decoding.encode_s,
            "generate_s": decoding.generate_s,
            "rtfx": decoding.rtfx,
        },
        "unlabelled_utterances": evaluation.unlabelled,
        "failed": [asdict(failed) for failed in decoding.failed],
    }


def render_report(
    evaluation: Evaluation, total: GroupSummary, languages: dict[str, GroupSummary]
) -> str:
    """Render the Markdown report."""
    groups = {**languages, _TOTAL: total}
    sections = [
        f"# Evaluation of {_cell(evaluation.model)}",
        _overview(evaluation, total),
        "## Error rates\n\n" + _error_table(groups, ctc=False),
    ]
    if total.ctc_metrics:
        sections.append("## Error rates of the CTC head\n\n" + _error_table(groups, ctc=True))
    sections += [
        "## Behaviour\n\n" + _behaviour_table(groups),
        "## Figures\n\n![WER by clip duration](wer_by_duration.png)\n\n"
        "![WER of single utterances](wer_distribution.png)",
        "## Worst utterances\n\n" + _worst_table(evaluation.utterances),
    ]
    if evaluation.decoding.failed:
        sections.append("## Failed utterances\n\n" + _failed_table(evaluation))
    sections.append("## Environment\n\n" + _environment_table(evaluation))
    return "\n\n".join(sections) + "\n"


def render_comparison(comparisons: Sequence[Comparison]) -> str:
    """Render a paired comparison as a Markdown table; B against A."""
    rows = [
        (
            _METRIC_TITLES[c.metric],
            _percent(c.rate_a),
            _percent(c.rate_b),
            f"{c.difference * 100:+.2f}",
            f"{c.interval.low * 100:+.2f} … {c.interval.high * 100:+.2f}" if c.interval else "n/a",
            _percent(c.probability_of_improvement),
        )
        for c in comparisons
    ]
    table = _table(("Metric", "A %", "B %", "B − A", "95 % CI", "P(B better) %"), rows)
    unit = comparisons[0].resampling_unit
    return f"{table}\n\nPaired bootstrap by {unit}, {REPLICATES} replicates."


def _overview(evaluation: Evaluation, total: GroupSummary) -> str:
    decoding = evaluation.decoding
    lines = [
        f"Manifest {_cell(evaluation.manifest)}: {total.utterances} utterances, "
        f"{total.duration_s:.1f} s of audio, transcribed in {decoding.transcribe_s:.1f} s "
        f"(RTFx {decoding.rtfx:.1f}).",
    ]
    if decoding.failed:
        lines.append(
            f"**Failed utterances: {len(decoding.failed)}**, in none of the figures, listed below."
        )
    if evaluation.unlabelled:
        lines.append(f"Utterances without a reference, left out: {evaluation.unlabelled}.")
    lines.append(
        f"Intervals: 95 %, bootstrap by {total.resampling_unit}, {REPLICATES} replicates. "
        "Rates are of the whole corpus, in percent. Normalised: Whisper's normaliser for English; "
        "else lower case without punctuation, all letters and diacritics kept."
    )
    return "\n\n".join(lines)


def _error_table(groups: dict[str, GroupSummary], *, ctc: bool) -> str:
    rows = []
    for name, group in groups.items():
        metrics = group.ctc_metrics if ctc else group.metrics
        for metric, rate in (metrics or {}).items():
            counts = rate.counts
            rows.append(
                (
                    _cell(name),
                    _METRIC_TITLES[metric],
                    _percent(rate.rate),
                    _interval(rate),
                    str(counts.substitutions),
                    str(counts.deletions),
                    str(counts.insertions),
                    str(counts.reference_length),
                    str(counts.inserted_on_empty),
                )
            )
    return _table(
        ("Language", "Metric", "%", "95 % CI", "S", "D", "I", "Reference", "On empty reference"),
        rows,
    )


def _behaviour_table(groups: dict[str, GroupSummary]) -> str:
    rows = [
        (
            _cell(name),
            str(group.utterances),
            f"{group.duration_s:.1f}",
            _percent(group.deletion_rate),
            _percent(group.eos_rate),
            _percent(group.repetition_rate),
            str(group.non_speech_utterances),
            _percent(group.non_empty_rate),
        )
        for name, group in groups.items()
    ]
    return _table(
        (
            "Language",
            "Utterances",
            "Audio, s",
            "Deletions %",
            "EOS reached %",
            "Repetition %",
            "Non-speech",
            "Non-empty on non-speech %",
        ),
        rows,
    )


def _worst_table(utterances: Sequence[ScoredUtterance]) -> str:
    ranked = sorted(utterances, key=_badness)[:_WORST_SHOWN]
    rows = [
        (
            _cell(u.result.id),
            str(_word_errors(u)),
            _percent(u.scores.word_normalised.rate),
            _cell(u.result.reference),
            _cell(u.result.hypothesis),
            u.result.finish_reason,
        )
        for u in ranked
        if _word_errors(u)
    ]
    if not rows:
        return "No utterance has an error after normalisation."
    return _table(("Id", "Word errors", "WER %", "Reference", "Hypothesis", "End"), rows)


def _badness(utterance: ScoredUtterance) -> tuple[int, float, str]:
    rate = utterance.scores.word_normalised.rate
    return -_word_errors(utterance), -(rate or 0.0), utterance.result.id


def _word_errors(utterance: ScoredUtterance) -> int:
    counts = utterance.scores.word_normalised
    return counts.errors + counts.inserted_on_empty


def _failed_table(evaluation: Evaluation) -> str:
    rows = [(_cell(failed.id), _cell(failed.reason)) for failed in evaluation.decoding.failed]
    return _table(("Id", "Reason"), rows)


def _environment_table(evaluation: Evaluation) -> str:
    facts = {**evaluation.environment, **evaluation.settings}
    return _table(("What", "Value"), [(name, _cell(str(facts[name]))) for name in facts])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Make any text safe within a Markdown table, on one line and of bounded length."""
    flat = " ".join(text.split())
    if len(flat) > _MAX_TEXT_SHOWN:
        flat = flat[: _MAX_TEXT_SHOWN - 1] + "…"
    for char in "\\|`*_<>[]":
        flat = flat.replace(char, f"\\{char}")
    return flat


def _percent(rate: float | None) -> str:
    return "n/a" if rate is None else f"{rate * 100:.2f}"


def _interval(rate: CorpusRate) -> str:
    if rate.interval is None:
        return "n/a"
    return f"{rate.interval.low * 100:.2f} … {rate.interval.high * 100:.2f}"


def _group_json(group: GroupSummary) -> dict[str, Any]:
    fields = asdict(group)
    fields["non_empty_rate"] = group.non_empty_rate
    return fields
