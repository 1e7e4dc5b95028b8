"""The Python in README and docs does what it says, page by page, in a folder where what it names is there."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from reader_folder import write_adapters, write_corpora, write_models, write_original, write_query_plans, write_texts

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [
    page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if BLOCK.search(page.read_text())
]
NEEDS = {
    "composition": ["peft"],
    "graphs": ["peft"],
    "retrofit": ["peft"],
    "memory": ["faiss"],
    "query_plans": ["duckdb"],
    "scale": ["faiss"],
}
TRAINS_RETRO = {"README", "retrieval"}  # half a minute each
ON_A_HUB = "hub"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Texts, models and corpora, made once."""
    folder = tmp_path_factory.mktemp("reader")
    write_texts(folder)
    write_models(folder)
    write_corpora(folder)
    write_original(folder)
    if find_spec("duckdb"):
        write_query_plans(folder)
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A copy of the folder, in which the test stands."""
    shutil.copytree(made, tmp_path / "reader", symlinks=True)
    monkeypatch.chdir(tmp_path / "reader")
    return tmp_path / "reader"


def shown(block):
    """What a block says it prints: the comments at its end, if it prints at all."""
    lines = block.rstrip().splitlines()
    comments = []
    while lines and lines[-1].startswith("# "):
        comments.insert(0, lines.pop()[2:])
    return comments if "print(" in block else []


def marked(page):
    return pytest.param(page, id=page.stem, marks=[pytest.mark.slow] if page.stem in TRAINS_RETRO else [])


@pytest.mark.parametrize("page", [marked(page) for page in PAGES if page.stem != ON_A_HUB])
def test_the_blocks_of_a_page_run_one_after_the_other_and_print_what_they_say(page, place):
    for module in NEEDS.get(page.stem, []):
        pytest.importorskip(module)
    torch.manual_seed(0)
    text = page.read_text(encoding="utf-8")
    names = {"__name__": "reader"}
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        code = compile("\n" * line + found[1], str(page), "exec")  # so that a traceback names the page's line
        with redirect_stdout(io.StringIO()) as printed:
            exec(code, names)
        if expected := shown(found[1]):
            assert printed.getvalue().splitlines() == expected
    assert os.getcwd() == str(place)


PROGRAM = """
import json, sys
from graft.scripts.export_generate import main

names = {}
for python, code in json.load(sys.stdin):
    if python:
        exec(code, names)
    else:
        assert main(code.split()[1:]) == 0
"""


@pytest.mark.slow
def test_what_the_page_on_the_hub_pushes_is_there_and_is_loaded(place, tmp_path):
    pytest.importorskip("peft")
    write_adapters(place)
    text = (ROOT / "docs" / f"{ON_A_HUB}.md").read_text(encoding="utf-8")
    steps = re.findall(
        r"^```python\n(.*?)^```$|^(graft-export-generate .*?)(?: +#.*)?$", text, re.MULTILINE | re.DOTALL
    )
    server = HubServer(token="hf_a_secret")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_a_secret"}
    given = json.dumps([(bool(code), code or command) for code, command in steps])
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, input=given, env=environment, capture_output=True, text=True, timeout=300)
    server.shutdown()
    assert done.returncode == 0, done.stderr
    assert {"me/long-bart", "me/my-adapter"} <= set(server.repositories)
    assert "model.safetensors" in server.asked
