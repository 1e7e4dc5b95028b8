import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

BUILD, PACK = (Path(__file__).with_name(name) for name in ("killed_build.py", "killed_pack.py"))


def killed(*arguments):
    """What the program reports."""
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_builds_killed_at_random_moments_end_in_the_same_bytes(tmp_path, text_folder, encoder_folder):
    report = killed(BUILD, text_folder, encoder_folder, tmp_path, 0, 2, 8, "exact", "some")
    assert report["differing"] == []
    assert len(report["hit"]) == 8


@pytest.mark.slow
def test_killed_at_any_call_that_touches_a_file_pack_ends_in_the_same_bytes(tmp_path, text_folder, encoder_folder):
    report = killed(PACK, text_folder, encoder_folder, tmp_path)
    assert report["differing"] == {}
    assert {"open", "os.rename"} <= set(report["calls"])
    assert len(report["interrupted"]) > 5  # kills that left the manifest saying that pack runs


@pytest.mark.slow
@pytest.mark.skipif(find_spec("faiss") is None, reason="faiss is not installed")
def test_kills_while_an_index_is_made_and_asked_change_no_byte(tmp_path, text_writer, encoder_folder):
    texts = text_writer(tmp_path / "texts", [13 * n % 90 for n in range(60)])
    scratch = tmp_path / "scratch"
    report = killed(BUILD, texts, encoder_folder, scratch, 4, 2, 30, "ivf_sq8", "sweep")
    assert report["differing"] == []
    assert {"tokenize", "embed", "index", "neighbours", "pack"} <= set(report["hit"])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_kills_in_every_stage_change_no_byte(tmp_path, text_writer, encoder_folder, workers):
    texts = text_writer(tmp_path / "texts", [13 * n % 90 for n in range(60)])
    report = killed(BUILD, texts, encoder_folder, tmp_path / "scratch", workers, workers, 30, "exact", "sweep")
    assert report["differing"] == []
    assert {"tokenize", "embed", "neighbours", "pack"} <= set(report["hit"])
