"""Docstrings are read from sources without running them, once each, in the order of the source."""

import gzip
import importlib.metadata

import numpy as np
import pytest

from graft.trainer import documentation
from graft.trainer.documentation import (
    Docstring,
    debian_pages,
    file_docstrings,
    origin_of,
    package_docstrings,
    package_folder,
    without_duplicates,
)

LONG = "word " * 70
SOURCE = f'''"""Module says this.

{LONG}
"""
raise SystemExit("executed")

def first(x):
    """First summary
    on two lines.

    Body of first.
    """
    def inner():
        """Nobody's documentation."""

class Second:
    """Second summary."""

    async def method(self):
        """Method summary."""

def undocumented(): pass
'''


@pytest.fixture
def package(tmp_path):
    root = tmp_path / "pkg"
    (root / "sub" / "tests").mkdir(parents=True)
    (root / "sub" / "__init__.py").write_text(SOURCE)
    (root / "sub" / "tests" / "more.py").write_text(SOURCE)
    (root / "test_all.py").write_text(SOURCE)
    (root / "broken.py").write_text(f'"""{LONG}"""\ndef (')
    (root / "short.py").write_text('"""Too short to matter."""')
    (root / "made.py").write_text(f'# This file was automatically generated from x.py\n"""{LONG}"""')
    return root


def test_names_texts_and_summaries_follow_the_source(package):
    found = list(package_docstrings(package))
    assert [d.name for d in found] == ["pkg.sub", "pkg.sub.first", "pkg.sub.Second", "pkg.sub.Second.method"]
    assert {d.module for d in found} == {"pkg.sub"}
    assert {d.package for d in found} == {"pkg"}
    assert found[1].summary == "First summary on two lines."
    assert found[1].body == "Body of first."
    assert found[1].text == "First summary\non two lines.\n\nBody of first."
    assert found[0].body.split() == LONG.split()


def test_several_processes_give_the_same_docstrings_in_the_same_order(package, monkeypatch):
    for number in range(5):
        (package / f"m{number}.py").write_text(SOURCE)
    alone = list(package_docstrings(package))
    monkeypatch.setattr(documentation, "_FILES_FOR_ONE_PROCESS", 0)
    assert list(package_docstrings(package)) == alone


def test_the_docstrings_of_a_real_package_are_those_it_shows():
    root = package_folder("numpy")
    found = {d.name: d for d in file_docstrings(root, root / "linalg" / "_linalg.py")}
    assert found["numpy.linalg._linalg.svd"].text == np.linalg.svd.__doc__.strip() or (
        found["numpy.linalg._linalg.svd"].text.split() == np.linalg.svd.__doc__.split()
    )
    assert found["numpy.linalg._linalg.svd"].summary == "Singular Value Decomposition."


def test_an_absent_package_has_no_folder():
    assert package_folder("no_such_package_here") is None


def test_only_the_first_of_equal_texts_or_bodies_is_kept():
    def docstring(name, text, body=""):
        return Docstring(name, "p", "p", text, "", body)

    given = [
        docstring("a", "one  two"),
        docstring("b", "one\ntwo"),
        docstring("c", "A.\n\nshared", "shared"),
        docstring("d", "B.\n\nshared", "shared"),
        docstring("e", "other"),
    ]
    assert [d.name for d in without_duplicates(given)] == ["a", "c", "e"]


def test_pages_of_debians_manual_are_read_with_their_synopsis(tmp_path):
    folder = tmp_path / "python3.11" / "html" / "_sources" / "library"
    folder.mkdir(parents=True)
    page = "Title\n=====\n\n.. module:: x\n   :synopsis: What x\n   :other: y\n\nText of the page.\n"
    (folder / "x.rst.txt").write_text(page)
    (folder / "y.rst.txt.gz").write_bytes(gzip.compress(b"Plain page."))
    (tmp_path / "python3.11-doc").symlink_to(tmp_path / "python3.11")
    found = list(debian_pages(tmp_path))
    assert [d.name for d in found] == ["python3.11/library/x", "python3.11/library/y"]
    assert found[0].summary == "What x"
    assert ":synopsis:" not in found[0].body
    assert "Text of the page." in found[0].body
    assert found[1].summary == ""


def test_without_debians_manual_a_line_is_logged_and_nothing_found(tmp_path, caplog):
    caplog.set_level("INFO")
    assert list(debian_pages(tmp_path)) == []
    assert "it is left out" in caplog.text


def test_version_and_licence_come_from_the_packages_metadata():
    origin = origin_of("networkx")
    assert origin.version == importlib.metadata.version("networkx")
    assert "BSD" in origin.licence
    assert "\n" not in origin.licence
