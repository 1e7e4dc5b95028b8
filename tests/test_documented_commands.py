"""Commands in README and docs have the options they are given; those that need little run as they stand there."""

import configparser
import importlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest
from reader_folder import write_documentation, write_models, write_query_plans, write_texts

from graft.trainer.config_file import read_configuration

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(?:bash|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = {"README": [], "memory": [], "knowledge_graph": ["yake", "networkx", "rapidfuzz"], "query_plans": ["duckdb"]}
LONG = "--train 8"  # measures 1,600 queries
JSON = re.compile(r"^```json\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def mains():
    """Command -> the module whose `main` it is."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = [line for line in setup["options.entry_points"]["console_scripts"].split("\n") if line.strip()]
    return {
        name.strip(): target.strip().partition(":")[0] for name, _, target in (line.partition("=") for line in lines)
    }


def commands(page):
    """The words of each command of ours on a page, with variables of the block in their places."""
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        variables = {}
        for line in block.replace("\\\n", " ").splitlines():
            if assigned := re.fullmatch(r'(\w+)="([^"]*)"', line):
                variables[assigned[1]] = assigned[2]
                continue
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            words = shlex.split(line, comments=True)
            if words[:3] == ["accelerate", "launch", "scripts/run.py"]:
                words = ["graft-train", *words[3:]]
            if words and words[0].startswith("graft-"):
                yield words


COMMANDS = [pytest.param(words, id=f"{page.stem}-{shlex.join(words)}") for page in PAGES for words in commands(page)]


@pytest.fixture
def configurations(tmp_path, monkeypatch):
    """Stands in a folder with this project's configs/ and the configuration that docs/training.md shows."""
    monkeypatch.setenv("HF_TOKEN", "hf_a_secret")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    [shown] = JSON.findall((ROOT / "docs" / "training.md").read_text(encoding="utf-8"))
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    for name in ("config.json", "base.json", "runs/mine/run.json"):
        (tmp_path / name).write_text(shown)
    (tmp_path / "mine.yaml").write_text(json.dumps({"training": {"seed": 1}}))
    for words in (words for page in PAGES for words in commands(page) if words[0] == "graft-build-database"):
        folder = tmp_path / words[words.index("--output") + 1]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").touch()  # what tells a corpus before it is opened


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_takes_the_options_that_a_page_gives_it(words, configurations):
    name, *arguments = words
    parsed = importlib.import_module(mains()[name]).parse(arguments)
    if name == "graft-train":
        configs, given, overrides = parsed
        assert read_configuration(configs or [given.resume / "run.json"], overrides).model.task
    elif isinstance(parsed, tuple):
        from graft.trainer.generation import options_of

        options_of(parsed[1])


@pytest.mark.slow
@pytest.mark.parametrize("stem", RUN)
def test_the_commands_of_a_page_run_one_after_the_other(stem, tmp_path, monkeypatch):
    for module in RUN[stem]:
        pytest.importorskip(module)
    write_texts(tmp_path)
    write_models(tmp_path)
    if stem == "query_plans":
        write_query_plans(tmp_path)
    if stem == "knowledge_graph":
        write_documentation(tmp_path)
        (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    page = ROOT / "README.md" if stem == "README" else ROOT / "docs" / f"{stem}.md"
    ran = 0
    for name, *arguments in commands(page):
        if LONG in shlex.join(arguments):
            continue
        monkeypatch.setattr("sys.stdin", io.StringIO("Where does it end?\n"))  # for the one that asks for questions
        assert importlib.import_module(mains()[name]).main(arguments) == 0, (name, arguments)
        ran += 1
    assert ran
