from pathlib import Path

import pytest

from ssast.benchmarks import rows, tables


def test_documents_show_what_the_rows_give(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_a_changed_figure_is_noticed():
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    start = text.index("<!-- table: demo -->") + len("<!-- table: demo -->\n")
    forged = text[:start] + "| 99% |" + text[start:]
    assert tables.render(forged) == text


def test_rows_keep_their_columns(tmp_path):
    file = tmp_path / "results" / "x.csv"
    rows.append_row(file, {"a": 1, "b": "one, two"})
    rows.append_row(file, {"b": "three", "a": 2})
    assert rows.read_rows(file) == [{"a": "1", "b": "one, two"}, {"a": "2", "b": "three"}]
    with pytest.raises(ValueError, match="columns"):
        rows.append_row(file, {"a": 3})


def test_environment_is_said():
    columns = rows.environment_columns()
    assert columns["torch"] and columns["device"] and columns["cores"] >= 1 and len(columns["date"]) == 10
