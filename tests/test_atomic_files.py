import hashlib
import json
import mmap
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from graft import atomic_files
from graft.atomic_files import (
    new_file,
    new_folder,
    read_manifest,
    sha256,
    side_by_side,
    write_json,
    write_manifest,
    write_text,
)


def test_new_file_replaces_the_old_one_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "made" / "a.txt"
    for text in ("first", "second"):
        with new_file(path) as temporary:
            temporary.write_text(text)
            assert not path.exists() or path.read_text() == "first"
    assert path.read_text() == "second"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.txt"]


def test_an_exception_while_writing_keeps_the_old_file(tmp_path):
    path = write_text(tmp_path / "a.txt", "old")

    def fail_halfway():
        with new_file(path) as temporary:
            temporary.write_text("ne")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail_halfway()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_job_that_writes_nothing_fails_and_keeps_the_old_file(tmp_path):
    path = write_text(tmp_path / "a.txt", "old")
    with pytest.raises(FileNotFoundError), new_file(path):
        pass
    assert path.read_text() == "old"


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_job_leaves_the_old_file_whole(tmp_path):
    path = write_text(tmp_path / "a.txt", "old")
    program = (
        "import os, signal\nfrom graft.atomic_files import new_file\n"
        f"with new_file({str(path)!r}) as temporary:\n"
        "    temporary.write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_new_folder_appears_whole(tmp_path):
    path = tmp_path / "corpus"
    with new_folder(path) as temporary:
        (temporary / "a").write_text("a")
        assert not path.exists()
    assert sorted(os.listdir(path)) == ["a"]
    assert os.listdir(tmp_path) == ["corpus"]


def test_new_folder_refuses_to_replace_what_a_user_has(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "precious").write_text("mine")
    with pytest.raises(FileExistsError, match="`path` .*corpus exists.*replace=True"), new_folder(tmp_path / "corpus"):
        raise AssertionError("never entered")
    assert (tmp_path / "corpus" / "precious").read_text() == "mine"


def test_new_folder_takes_the_place_of_an_empty_one(tmp_path):
    (tmp_path / "corpus").mkdir()
    with new_folder(tmp_path / "corpus") as temporary:
        (temporary / "a").write_text("a")
    assert os.listdir(tmp_path / "corpus") == ["a"]


def test_new_folder_replaces_all_of_the_old_one_if_told(tmp_path):
    for name in ("a", "b"):
        with new_folder(tmp_path / "corpus", replace=True) as temporary:
            (temporary / name).write_text(name)
    assert os.listdir(tmp_path / "corpus") == ["b"]
    assert os.listdir(tmp_path) == ["corpus"]


def test_an_exception_while_filling_keeps_the_old_folder(tmp_path):
    with new_folder(tmp_path / "corpus") as temporary:
        (temporary / "a").write_text("a")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "corpus", replace=True):
        raise RuntimeError
    assert os.listdir(tmp_path / "corpus") == ["a"]
    assert os.listdir(tmp_path) == ["corpus"]


@pytest.mark.parametrize("size", [0, 1, 3 * mmap.PAGESIZE, 3 * mmap.PAGESIZE + 1])
def test_sha256_is_that_of_the_whole_content(tmp_path, monkeypatch, size):
    monkeypatch.setattr(atomic_files, "MAPPED_BYTES", mmap.ALLOCATIONGRANULARITY)  # several pieces
    content = os.urandom(size)
    (tmp_path / "a").write_bytes(content)
    assert sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_items_are_answered_in_their_order_and_several_at_a_time(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    meet = threading.Barrier(2)  # passed by two calls that run at once, or not at all

    def call(item):
        meet.wait(timeout=10)
        return item * item

    assert list(side_by_side(call, range(6))) == [0, 1, 4, 9, 16, 25]


def test_the_first_item_that_fails_is_told():
    with pytest.raises(ZeroDivisionError):
        list(side_by_side(lambda item: 1 / item, [2, 1, 0, 1]))


def test_json_keeps_order_and_letters_and_refuses_nan(tmp_path):
    path = write_json(tmp_path / "a.json", {"z": "naïve", "a": [1]})
    assert path.read_text(encoding="utf-8") == '{\n  "z": "naïve",\n  "a": [\n    1\n  ]\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, float("nan"))
    assert json.loads(path.read_text(encoding="utf-8")) == {"z": "naïve", "a": [1]}


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    write_text(tmp_path / "deep" / "a.txt", "content")
    write_text(tmp_path / "b.txt", "")
    write_manifest(tmp_path, {"rows": 3})
    return tmp_path


def test_a_manifest_returns_its_details_when_all_files_are_there(stored):
    write_text(stored / "added_later.txt", "ignored")
    assert read_manifest(stored) == {"rows": 3}
    assert set(json.loads((stored / "manifest.json").read_text())["files"]) == {"b.txt", "deep/a.txt"}


def test_a_changed_file_is_found_by_its_sum_only_when_asked(stored):
    write_text(stored / "deep" / "a.txt", "contenT")
    with pytest.raises(ValueError, match=r"a\.txt is damaged"):
        read_manifest(stored)
    assert read_manifest(stored, verify=False) == {"rows": 3}


def test_a_short_or_missing_file_is_named(stored):
    write_text(stored / "deep" / "a.txt", "cont")
    with pytest.raises(ValueError, match=r"a\.txt has 4 bytes, its manifest says 7"):
        read_manifest(stored, verify=False)
    (stored / "deep" / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"lacks 'deep/a\.txt'"):
        read_manifest(stored)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "deep/../../a", "C:/a", "..\\a"])
def test_a_manifest_cannot_name_files_outside_its_folder(stored, name):
    manifest = json.loads((stored / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 0, "sha256": ""}
    write_json(stored / "manifest.json", manifest)
    with pytest.raises(ValueError, match="outside its folder"):
        read_manifest(stored)


def test_files_behind_links_are_read_as_the_cache_of_the_hub_keeps_them(stored, tmp_path):
    (stored / "deep" / "a.txt").rename(tmp_path / "blob")
    (stored / "deep" / "a.txt").symlink_to(tmp_path / "blob")
    read_manifest(stored)
    (tmp_path / "blob").write_text("damaged")
    with pytest.raises(ValueError, match="damaged"):
        read_manifest(stored)


def test_no_manifest_and_a_broken_manifest_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("[1]")
    with pytest.raises(ValueError, match="is not a manifest"):
        read_manifest(tmp_path)
