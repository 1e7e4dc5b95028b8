"""No text is on two sides of a split, the same sources give the same bytes, and nobody's folder is overwritten."""

import json

import pytest
from datasets import load_dataset
from hypothesis import given
from hypothesis import strategies as st

from graft.trainer import documentation_dataset
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.documentation import Docstring, Origin
from graft.trainer.documentation_dataset import (
    DocumentationSettings,
    build_documentation_dataset,
    documents_of,
    pairs_of,
    split_of,
)

FILES = [f"{kind}{split}.parquet" for kind in ("", "documents-") for split in ("train", "validation", "test")]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package of 40 modules with 3 functions each, one of them the same everywhere."""
    root = tmp_path / "site" / "manual"
    root.mkdir(parents=True)
    for number in range(40):
        functions = [
            f'def f{i}():\n    """Return the value {number} {i}.\n\n    {f"text {number} {i} " * 40}\n    """\n'
            for i in range(2)
        ]
        copied = f'def same():\n    """Return what all return.\n\n    {"copied " * 90}\n    """\n'
        (root / f"m{number:02}.py").write_text("\n".join([*functions, copied]))
    monkeypatch.setattr(documentation_dataset, "package_folder", lambda name: root if name == "manual" else None)
    monkeypatch.setattr(documentation_dataset, "origin_of", lambda name: Origin(name, "1.0", "MIT"))
    return root


@pytest.fixture
def settings(tmp_path):
    return DocumentationSettings(("manual", "absent"), tmp_path / "none", held_out=0.25, least_document_words=200)


def rows_of(folder, name):
    return load_dataset(
        "parquet", data_files=str(folder / name), split="train", cache_dir=folder.parent / "cache"
    ).to_list()


def test_pairs_and_documents_of_a_module_lie_in_one_split_and_no_text_in_two(package, settings, tmp_path):
    counts = build_documentation_dataset(tmp_path / "out", settings)
    assert sum(counts[split] for split in ("train", "validation", "test")) == 81  # the copied text once
    sides, sources = {}, set()
    for name in FILES:
        split = name.removesuffix(".parquet").removeprefix("documents-")
        for row in rows_of(tmp_path / "out", name):
            assert sides.setdefault(row.get("module", row["id"]), split) == split
            if "source" in row:
                assert row["source"] not in sources
                sources.add(row["source"])
                assert row["words"] == len(row["source"].split()) >= 60
                assert row["target"].startswith("Return")
            else:
                assert row["words"] == len(row["text"].split()) >= 200
    assert set(sides.values()) == {"train", "validation", "test"}


def test_the_same_sources_give_the_same_bytes_and_another_seed_another_split(package, settings, tmp_path):
    for name in ("one", "two"):
        build_documentation_dataset(tmp_path / name, settings)
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    other = DocumentationSettings(**(vars(settings) | {"seed": 1}))
    build_documentation_dataset(tmp_path / "three", other)
    assert rows_of(tmp_path / "one", "test.parquet") != rows_of(tmp_path / "three", "test.parquet")


def test_the_card_names_counts_lengths_versions_and_licences(package, settings, tmp_path):
    counts = build_documentation_dataset(tmp_path / "out", settings)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| train.parquet | {counts['train']} | 120 | 120 |" in card
    assert "| manual | 1.0 | MIT |" in card
    assert "absent" not in card


def test_an_own_folder_is_rebuilt_and_another_one_is_refused(package, settings, tmp_path):
    build_documentation_dataset(tmp_path / "out", settings)
    (tmp_path / "out" / "train.parquet").write_bytes(b"damaged, but ours")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["files"].pop("train.parquet")
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    build_documentation_dataset(tmp_path / "out", settings)
    assert len(rows_of(tmp_path / "out", "train.parquet")) > 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigurationError, match="`output` .*mine' exists and is no documentation data set"):
        build_documentation_dataset(tmp_path / "mine", settings)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_failure_leaves_the_earlier_data_set(package, settings, tmp_path, monkeypatch):
    build_documentation_dataset(tmp_path / "out", settings)
    before = (tmp_path / "out" / "train.parquet").read_bytes()

    def fails(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(documentation_dataset, "data_card", fails)
    with pytest.raises(KeyboardInterrupt):
        build_documentation_dataset(tmp_path / "out", settings)
    assert (tmp_path / "out" / "train.parquet").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "site"]


def test_a_file_without_rows_is_not_written(package, settings, tmp_path, caplog):
    build_documentation_dataset(tmp_path / "out", DocumentationSettings(**(vars(settings) | {"held_out": 0.0})))
    assert [path.name for path in sorted((tmp_path / "out").glob("*.parquet"))] == [
        "documents-train.parquet",
        "train.parquet",
    ]
    assert "test.parquet would have no rows" in caplog.text


def test_with_no_package_at_all_there_is_an_error_and_no_folder(tmp_path):
    settings = DocumentationSettings(packages=("no_such_package_here",))
    with pytest.raises(ConfigurationError, match="None of the packages no_such_package_here is installed"):
        build_documentation_dataset(tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


@given(st.text(min_size=1), st.integers(0, 3))
def test_the_split_of_a_module_depends_on_its_name_and_the_seed_only(module, seed):
    settings = DocumentationSettings(seed=seed)
    assert split_of(module, settings) == split_of(module, DocumentationSettings(packages=("x",), seed=seed))


def test_about_the_asked_share_is_held_out():
    splits = [split_of(f"module.{number}", DocumentationSettings(held_out=0.2)) for number in range(2000)]
    assert 350 < splits.count("test") < 450
    assert 350 < splits.count("validation") < 450


def test_a_summary_of_one_word_or_a_whole_paragraph_makes_no_pair():
    def docstring(summary, words):
        return Docstring("a", "p", "m", "text", summary, "w " * words)

    given = [docstring("Two words", 99), docstring("word " * 61, 99), docstring("Just three words", 59)]
    assert pairs_of(given, 60) == []
    assert len(pairs_of([docstring("Just three words", 60)], 60)) == 1


def test_a_document_has_a_heading_for_each_docstring_and_a_page_keeps_its_own():
    members = [Docstring("m.f", "p", "m", "text f", "", ""), Docstring("m.g", "p", "m", "text g", "", "")]
    page = Docstring("page", "manual", "page", "Title\n=====\n\nText", "", "")
    documents = documents_of([*members, page], 1)
    assert documents[0]["text"] == "m.f\n===\n\ntext f\n\n\nm.g\n===\n\ntext g"
    assert documents[1]["text"] == page.text
