"""The example's short form: three tiny databases, a few queries, two epochs."""

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "query_cost.py"
SHORT = ["--databases", "2", "--queries", "12", "--largest", "1000", "--epochs", "2", "--few", "4"]


def test_the_example_estimates_a_database_it_never_saw_and_draws_one_plan(tmp_path, capsys):
    pytest.importorskip("duckdb")
    assert runpy.run_path(str(EXAMPLE))["main"](["--run", str(tmp_path), *SHORT]) == 0
    printed = capsys.readouterr().out
    assert "24 plans of 2 databases" in printed
    assert all(part in printed for part in ("scaled on the other", "zero-shot", "after 4 queries", "measured"))
    for picture in ("plan.png", "errors.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "model" / "config.json").exists()


def test_there_must_be_queries_left_to_estimate(tmp_path, capsys):
    pytest.importorskip("duckdb")
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLE))["main"](["--run", str(tmp_path), *SHORT, "--few", "12"])
    assert "--few must lie in [1, 11]" in capsys.readouterr().err
