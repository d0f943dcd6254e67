import json

import pytest

from model.evaluation.errors import EvaluationError
from model.evaluation.results import UtteranceResult, read_results, write_results
from model.evaluation.scoring import score_utterance

RESULTS = [
    UtteranceResult("a", "Сайн уу?", "Сайн\nуу", "сайн", "mn", "s1", 1.5, "stop"),
    UtteranceResult("b", "", "\u2028 “x”", None, None, None, 0.25, "length"),
]


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def valid_row(**changes):
    row = {
        "id": "a",
        "reference": "x",
        "hypothesis": "y",
        "ctc_hypothesis": None,
        "language": "en",
        "speaker": None,
        "duration_s": 1.0,
        "finish_reason": "stop",
    }
    return row | changes


def test_results_survive_writing_and_reading(tmp_path):
    path = tmp_path / "results.jsonl"
    write_results(path, [score_utterance(result) for result in RESULTS])
    assert read_results(path) == RESULTS


def test_written_line_has_the_error_counts(tmp_path):
    path = tmp_path / "results.jsonl"
    write_results(path, [score_utterance(RESULTS[0])])
    row = json.loads(path.read_text(encoding="utf-8"))
    assert row["errors"]["word_raw"]["substitutions"] == 1
    assert row["errors"]["word_normalised"]["hits"] == 2
    assert row["ctc_errors"]["word_normalised"]["deletions"] == 1
    assert row["repeats"] is False


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([], "no results"),
        ([valid_row(), valid_row()], "'a' is there twice"),
        ([["a"]], "line 1: not a JSON object"),
        ([valid_row(), {"id": "b"}], "line 2: field 'reference' is missing"),
        ([valid_row(duration_s="long")], "field 'duration_s' has the wrong type"),
        ([valid_row(duration_s=True)], "field 'duration_s' has the wrong type"),
        ([valid_row(hypothesis=None)], "field 'hypothesis' has the wrong type"),
    ],
)
def test_file_that_is_no_result_file_is_refused_with_the_reason(tmp_path, rows, reason):
    path = tmp_path / "results.jsonl"
    write_lines(path, *rows)
    with pytest.raises(EvaluationError, match=reason):
        read_results(path)


def test_broken_json_missing_file_and_binary_file_are_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_results(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_results(path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(EvaluationError, match="line 1: not JSON"):
        read_results(path)
