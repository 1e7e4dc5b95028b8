"""What README and docs tell people to type exists: names, commands, files, options and links."""

import ast
import configparser
import importlib
import inspect
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
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
