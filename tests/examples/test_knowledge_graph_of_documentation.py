"""The example's short form: a few files of one package, capitalised names only."""

import json
import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "knowledge_graph_of_documentation.py"


def test_the_example_finds_things_and_shows_where_they_stand(tmp_path, capsys):
    pytest.importorskip("networkx")
    main = runpy.run_path(str(EXAMPLE))["main"]
    arguments = ["--run", str(tmp_path), "--packages", "peft", "--characters", "40000", "--extractor", "capitalised"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(part in printed for part in ("Entities of highest PageRank", "times, ", "% of all pairs are joined"))
    page = (tmp_path / "graph.html").read_text(encoding="utf-8")
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert any("LoRA" in node["name"] for node in data["nodes"])
    assert data["edges"]
    for picture in ("graph.png", "chunk_weights.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_only_prose_is_read():
    no_prose = runpy.run_path(str(EXAMPLE))["NO_PROSE"]
    kept = no_prose.sub(
        "",
        "Reads a file.\n\nParameters\n----------\npath : str, optional\n    Where it lies.\nArgs:\n"
        "    name (`str`, *optional*):\n        Its name.\n    size (`int`): Its size.\n```py\nx = 1\n```\n>>> f(1)\n",
    )
    assert kept.split() == ["Reads", "a", "file.", "Where", "it", "lies.", "Its", "name.", "Its", "size."]


def test_a_package_that_is_not_installed_is_named(tmp_path):
    main = runpy.run_path(str(EXAMPLE))["main"]
    with pytest.raises(SystemExit, match="no_such_package is not installed"):
        main(["--run", str(tmp_path), "--packages", "no_such_package"])
