"""Commands end in the same way: a number for the shell, and one line for whoever typed them."""

import os
import subprocess
import sys

import pytest

from graft.scripts import build_knowledge_graph, export_generate, merge, query_cost
from graft.scripts.exit_codes import exit_code


def raising(error):
    def work():
        raise error

    return work


def test_what_work_returns_is_the_code_and_nothing_is_success():
    assert exit_code("graft-x", lambda: 143) == 143
    assert exit_code("graft-x", lambda: None) == 0


@pytest.mark.parametrize("error", [ValueError("two\nlines"), OSError("two\nlines"), ImportError("two\nlines")])
def test_a_mistake_is_one_line_and_code_2(capsys, error):
    assert exit_code("graft-x", raising(error)) == 2
    assert capsys.readouterr().err == "graft-x: two lines\n"


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ValueError, match="ours"):
        exit_code("graft-x", raising(ValueError("ours")), (OSError,))


def test_ctrl_c_says_what_is_left(capsys):
    assert exit_code("graft-x", raising(KeyboardInterrupt()), when_interrupted="All is kept.") == 130
    assert capsys.readouterr().err == "\ngraft-x: interrupted. All is kept.\n"


def test_a_reader_who_leaves_gets_no_traceback():
    program = (
        "from graft.scripts.exit_codes import exit_code\n"
        "raise SystemExit(exit_code('graft-x', lambda: [print('line') for _ in range(100_000)] and None))"
    )
    reading, writing = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", program], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    os.read(reading, 10)
    os.close(reading)
    assert (process.stderr.read(), process.wait()) == ("", 141)


@pytest.mark.parametrize(
    ("main", "command"),
    [
        (build_knowledge_graph.main, ["graft-knowledge-graph", "absent", "--out", "out"]),
        (merge.main, ["graft-merge", "absent", "out"]),
        (export_generate.main, ["graft-export-generate", "memory", "setup.cfg"]),
        (query_cost.main, ["graft-query-cost", "absent", "absent.duckdb", "--sql", "SELECT 1"]),
    ],
)
def test_each_command_tells_a_mistake_under_its_own_name(main, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "setup.cfg").touch()
    assert main(command[1:]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{command[0]}: ")
