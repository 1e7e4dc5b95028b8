"""What README and docs tell people to type exists: names, commands, files, options and links."""

import ast
import configparser
import importlib
import inspect
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from html.parser import HTMLParser
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import yaml

import graft
from graft.configuration.configuration_retro import RetroConfig
from graft.trainer.arguments import (
    AdapterArguments,
    DataArguments,
    ModelArguments,
    RetrievalArguments,
    RunConfiguration,
)

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PATHS = re.compile(
    r"(?<![\w/.-])((?:benchmarks|scripts|examples|configs|tests|modeling|trainer|retrieval|configuration|graphs|compat|docs)"
    r"/[\w./-]*\w\.(?:py|json|md|png|yaml))"
)


def blocks(language):
    return [
        pytest.param(text, id=f"{page.name}-{number}")
        for page in PAGES
        for number, (of_language, text) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
        if of_language == language
    ]


def imported(tree):
    """Names that a block imports from graft, with what they are."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "graft":
            module = importlib.import_module(node.module)
            for alias in node.names:
                found[alias.asname or alias.name] = getattr(module, alias.name)
    return found


@pytest.mark.parametrize("text", blocks("python"))
def test_a_block_of_python_compiles_and_what_it_imports_and_passes_exists(text):
    tree = ast.parse(text)
    names = imported(tree)
    for call in ast.walk(tree):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in names):
            continue
        called = names[call.func.id]
        parameters = inspect.signature(called).parameters
        takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
        known = set(parameters) | ({field.name for field in fields(called)} if is_dataclass(called) else set())
        given = {keyword.arg for keyword in call.keywords if keyword.arg is not None}
        assert takes_all or given <= known, f"{call.func.id} has no {sorted(given - known)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_files_and_links_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    commands = re.findall(r"^(graft-[\w-]+) =", setup["options.entry_points"]["console_scripts"], re.MULTILINE)
    named = set(re.findall(r"(?<![\w/-])graft-(?!transformers)[a-z]+(?:-[a-z]+)*(?=[ `])", text))
    assert named <= set(commands), sorted(named - set(commands))
    missing = [path for path in PATHS.findall(text) if not (ROOT / path).exists()]
    assert not missing
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert link.startswith("http") or (page.parent / link).exists(), link


def test_console_scripts_call_a_main_that_exists():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for line in setup["options.entry_points"]["console_scripts"].split("\n"):
        if line.strip():
            module, _, function = line.partition("=")[2].strip().partition(":")
            assert callable(getattr(importlib.import_module(module), function))


def of_docs(name):
    """A module of docs/, which MkDocs runs and nobody imports."""
    spec = spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def leaves(navigation):
    for entry in navigation:
        for value in entry.values():
            yield from leaves(value) if isinstance(value, list) else [value]


def test_the_site_leads_to_every_page_once():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(leaves(site["nav"])) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_every_public_name_stands_in_the_reference_and_what_stands_there_exists():
    targets = [
        target
        for page in (DOCS / "reference").glob("*.md")
        for target in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert sorted(target for target in targets if target.count(".") == 1) == [
        f"graft.{n}" for n in sorted(graft._PUBLIC)
    ]
    for target in targets:
        module, _, name = target.rpartition(".")
        assert hasattr(importlib.import_module(module), name), target


def test_the_page_on_training_has_a_row_for_each_block():
    page = (DOCS / "training.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| .+ \| .+ \|$", page.partition("\n## ")[0], re.MULTILINE)
    blocks = {field.name for field in fields(RunConfiguration) if not field.name.startswith("early_stopping")}
    assert set(rows) == blocks


def test_tables_that_the_site_makes_have_a_row_for_each_command_metric_and_old_name():
    from graft.trainer.metrics import METRIC_VALUES
    from graft.trainer.old_names import OLD_NAMES

    made = of_docs("generated_tables")
    marks = [mark for page in DOCS.rglob("*.md") for mark in made.MARK.findall(page.read_text(encoding="utf-8"))]
    assert sorted(marks) == sorted(made.TABLES)
    page = made.on_page_markdown("\n\n".join(f"<!-- table: {name} -->" for name in made.TABLES))
    assert "<!--" not in page
    rows = re.findall(r"^\| `([\w-]+)` \| .+ \|$", page, re.MULTILINE)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    commands = re.findall(r"^(graft-[\w-]+) =", setup["options.entry_points"]["console_scripts"], re.MULTILINE)
    assert sorted(rows) == sorted([*commands, *METRIC_VALUES, *OLD_NAMES])


def test_options_that_share_a_line_of_a_docstring_get_one_each():
    pytest.importorskip("griffe")
    text = "Args:\n    one, two: a text\n        of two lines.\n    three: a, b: c.\n\nRaises:\n    A, B: never."
    one_each = text.replace("one, two:", "one:").replace("lines.\n", "lines.\n    two: as `one`.\n")
    assert of_docs("griffe_options").one_line_each(text) == one_each


def test_a_figure_of_the_readme_stands_with_the_same_words_on_the_page_of_figures():
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Figures\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    assert rows
    assert set(rows) <= set((DOCS / "figures.md").read_text(encoding="utf-8").splitlines())


class Fetched(HTMLParser):
    """What a browser loads by itself when it opens a page."""

    def __init__(self):
        super().__init__()
        self.sources = []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag in ("script", "img", "iframe", "source"):
            self.sources.append(given.get("src") or "")
        elif tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload"):
            self.sources.append(given["href"])


@pytest.mark.slow
def test_the_site_builds_strictly_loads_nothing_from_elsewhere_and_tells_every_field(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) == len(list(DOCS.rglob("*.md"))) + 1  # 404.html
    for page in pages:
        fetched = Fetched()
        fetched.feed(page.read_text(encoding="utf-8"))
        assert not [source for source in fetched.sources if "//" in source], page.name
    training = (tmp_path / "site" / "training.html").read_text(encoding="utf-8")
    for block in (ModelArguments, DataArguments, AdapterArguments, RetrievalArguments):
        for field in fields(block):
            assert re.search(rf"<td>\s*<code>{field.name}</code>", training), f"{block.__name__}.{field.name}"
    retrieval = (tmp_path / "site" / "reference" / "retrieval.html").read_text(encoding="utf-8")
    row = re.search(
        r"<code>num_neighbours</code>(.*?)</tr>", retrieval.partition('id="graft.RetroConfig"')[2], re.DOTALL
    )
    assert ">int</span></code>" in row[1]
    assert f"<code>{RetroConfig().num_neighbours}</code>" in row[1]
