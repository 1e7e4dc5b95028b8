"""The table of docs/scale.md is the one that its script prints."""

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    return runpy.run_path(str(ROOT / "benchmarks" / "scale_table.py"))


def test_the_page_has_the_table_of_the_measured_rates(script):
    result = json.loads((ROOT / "benchmarks" / "results" / "retro_prepare-avx512.json").read_text())
    assert script["scale_table"](result) in (ROOT / "docs" / "scale.md").read_text()


def test_bytes_and_times_are_what_the_formats_say(script):
    assert [script["bytes_text"](count) for count in (72, 128e6, 1.5e12, 2.4e15)] == [
        "72 B",
        "128 MB",
        "1.5 TB",
        "2,400 TB",
    ]
    assert [script["time_text"](s) for s in (0.5, 90, 5400, 4e5, 1e12)] == [
        "0.5 s",
        "1.5 min",
        "1.5 h",
        "4.6 days",
        "no",
    ]
    assert [script["neighbour_bytes"](count) for count in (2**31 - 1, 2**31)] == [24, 40]
    rows = [{"stage": "tokenize", "path": "ours: all", "per processor second": 1000.0}]
    rows += [{"stage": "embed", "path": "ours, 1 workers, x", "per processor second": 10.0}]
    rows += [
        {"stage": "neighbours", "path": f"ours: {kind}", "per processor second": 100.0} for kind in ("exact", "ivf")
    ]
    table = script["time_rows"]({"rows": rows, "settings": {"chunks": 10_000}})
    assert table[0][2] == "17 min"
    assert table[2][2] == "12 days"  # 10^6 / 100 seconds, a hundred times as many to search
    assert table[3][2] == "1.2 days"  # ten times, the root of it
