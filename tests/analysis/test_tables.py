"""Result folders: written whole, taken once, never shared."""

import pytest

from medseg_ssl.analysis.tables import IDENTITY, claim, write_csv, write_json, write_text
from medseg_ssl.config import ConfigError, UserError


def test_claim_a_new_an_empty_and_the_own_folder(tmp_path):
    identity = {"segmenter": "a", "cases": ("x", "y")}
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        out = tmp_path / name
        assert claim(out, identity, complete="summary.json") is False
        assert claim(out, identity, complete="summary.json") is False
        write_json(out / "summary.json", {})
        assert claim(out, identity, complete="summary.json") is True


def test_claim_refuses_other_results_and_other_files(tmp_path):
    claim(tmp_path / "out", {"a": 1, "b": 2}, complete="summary.json")
    with pytest.raises(ConfigError, match=r"differ in b: b 2 there, 3 here"):
        claim(tmp_path / "out", {"a": 1, "b": 3}, complete="summary.json")
    (tmp_path / "out" / IDENTITY).write_text("{")
    with pytest.raises(ConfigError, match="not readable"):
        claim(tmp_path / "out", {"a": 1}, complete="summary.json")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="something else"):
        claim(tmp_path / "file", {"a": 1}, complete="summary.json")


def test_tables_have_empty_cells_and_short_numbers(tmp_path):
    rows = [{"a": 1 / 3, "b": None}, {"a": float("nan"), "c": "unused"}]
    path = write_csv(tmp_path / "deep" / "t.csv", rows, columns=("a", "b"))
    assert path.read_text() == "a,b\n0.333333,\n,\n"
    assert [f.name for f in path.parent.iterdir()] == ["t.csv"]


def test_a_write_that_fails_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        write_text(tmp_path / "file" / "below", "text")
