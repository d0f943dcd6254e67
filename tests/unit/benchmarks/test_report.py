import json

from matplotlib.figure import Figure

from benchmarks.report import describe_machine, markdown_table, write_report


def test_a_table_is_markdown() -> None:
    assert markdown_table(["", "ms"], [["a", 1]]) == "|  | ms |\n| --- | ---: |\n| a | 1 |"


def test_a_report_is_written_with_the_machine_it_was_made_on(tmp_path) -> None:
    write_report(tmp_path / "new" / "step", {"rows": 3}, "text", Figure())
    data = json.loads((tmp_path / "new" / "step.json").read_text())
    assert data["rows"] == 3
    assert data["machine"].keys() == describe_machine().keys()
    assert "cores" in (tmp_path / "new" / "step.md").read_text()
    assert (tmp_path / "new" / "step.png").read_bytes().startswith(b"\x89PNG")
