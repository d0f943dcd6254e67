import json

import pytest
import torch
from PIL import Image

from model.evaluation.comparison import compare_results
from model.evaluation.decoding import Decoding, FailedClip
from model.evaluation.errors import EvaluationError
from model.evaluation.report import (
    Evaluation,
    describe_environment,
    render_comparison,
    write_evaluation,
)
from model.evaluation.results import UtteranceResult, read_results
from model.evaluation.scoring import score_utterance

RESULTS = [
    UtteranceResult("a", "the cat sat", "the cat sat", "the cat", "en", "s1", 1.0, "stop"),
    UtteranceResult("b", "сайн байна", "саин | <b>байна</b>", "сайн", "mn", "s2", 5.0, "stop"),
    UtteranceResult("c", "", "", "", "mn", None, 40.0, "length"),
]


def make_evaluation(results, failed=()):
    decoding = Decoding(list(results), list(failed), audio_s=46.0, transcribe_s=2.0)
    return Evaluation(
        model="checkpoint",
        manifest="test.jsonl",
        settings={"batch_size": 4},
        environment=describe_environment(torch.device("cpu"), "fp32"),
        decoding=decoding,
        utterances=[score_utterance(result) for result in results],
        unlabelled=3,
    )


def table_row(report, *cells):
    start = "| " + " | ".join(cells) + " |"
    return next(line for line in report.splitlines() if line.startswith(start))


def test_folder_holds_results_summary_report_and_figures(tmp_path):
    folder = tmp_path / "new" / "run"
    write_evaluation(folder, make_evaluation(RESULTS))
    assert read_results(folder / "results.jsonl") == RESULTS
    for name in ("wer_by_duration.png", "wer_distribution.png"):
        with Image.open(folder / name) as figure:
            assert figure.size == (960, 540)
            assert len(figure.getcolors(maxcolors=1 << 20)) > 10


def test_summary_has_the_figures_by_language_and_in_total(tmp_path):
    write_evaluation(tmp_path, make_evaluation(RESULTS, [FailedClip("d", "no audio stream")]))
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["total"]["metrics"]["word_normalised"]["rate"] == pytest.approx(3 / 5)
    assert summary["languages"]["en"]["metrics"]["word_raw"]["rate"] == 0
    assert summary["languages"]["en"]["ctc_metrics"]["word_raw"]["counts"]["deletions"] == 1
    assert summary["languages"]["mn"]["non_empty_rate"] == 0
    assert summary["speed"]["rtfx"] == 23.0
    assert summary["failed"] == [{"id": "d", "reason": "no audio stream"}]
    assert summary["unlabelled_utterances"] == 3
    assert summary["environment"]["torch"] == torch.__version__


def test_report_has_every_table(tmp_path):
    write_evaluation(tmp_path, make_evaluation(RESULTS, [FailedClip("d", "no audio stream")]))
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "3 utterances, 46.0 s of audio, transcribed in 2.0 s (RTFx 23.0)" in report
    assert "**Failed utterances: 1**" in report
    assert "Utterances without a reference, left out: 3." in report
    row = table_row(report, "total", "WER normalised", "60.00")
    assert row.endswith("| 1 | 0 | 2 | 5 | 0 |")
    assert "## Error rates of the CTC head" in report
    assert table_row(report, "mn", "2", "45.0", "0.00", "50.00", "0.00", "1", "0.00")
    assert table_row(report, "d", "no audio stream")
    assert table_row(report, "batch_size", "4")


def test_text_cannot_break_the_table(tmp_path):
    write_evaluation(tmp_path, make_evaluation(RESULTS))
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    worst = table_row(report, "b", "3", "150.00")
    assert worst.count(" | ") == 5
    assert "саин \\| \\<b\\>байна\\</b\\>" in worst


def test_report_without_errors_says_so_and_leaves_out_empty_sections(tmp_path):
    perfect = UtteranceResult("a", "one", "one", None, "en", None, 1.0, "stop")
    write_evaluation(tmp_path, make_evaluation([perfect]))
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "No utterance has an error after normalisation." in report
    assert "Failed utterances" not in report
    assert "CTC" not in report


def test_non_speech_alone_can_be_reported(tmp_path):
    write_evaluation(tmp_path, make_evaluation(RESULTS[2:]))
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert table_row(report, "total", "WER normalised", "n/a", "n/a")


def test_nothing_transcribed_is_refused_and_writes_nothing(tmp_path):
    with pytest.raises(EvaluationError, match="nothing to score"):
        write_evaluation(tmp_path / "run", make_evaluation([]))
    assert not (tmp_path / "run").exists()


def test_comparison_is_a_table_of_both_systems():
    better = [
        UtteranceResult(r.id, r.reference, r.reference, None, r.language, None, 1.0, "stop")
        for r in RESULTS
    ]
    table = render_comparison(compare_results(RESULTS, better))
    assert table_row(table, "WER normalised", "60.00", "0.00", "-60.00")
    assert "Paired bootstrap by utterance, 2000 replicates." in table
