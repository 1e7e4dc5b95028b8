import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

BUILD = Path(__file__).with_name("killed_build.py")


def killed_build(texts, encoder, scratch, seed, workers, kills, index="exact"):
    arguments = [sys.executable, BUILD, texts, encoder, scratch, seed, workers, kills, index]
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_builds_killed_at_random_moments_end_in_the_same_bytes(tmp_path, text_folder, encoder_folder):
    report = killed_build(text_folder, encoder_folder, tmp_path, seed=0, workers=2, kills=8)
    assert report["differing"] == []
    assert len(report["hit"]) == 8


@pytest.mark.slow
@pytest.mark.skipif(find_spec("faiss") is None, reason="faiss is not installed")
def test_kills_while_an_index_is_made_and_asked_change_no_byte(tmp_path, text_writer, encoder_folder):
    texts = text_writer(tmp_path / "texts", [13 * n % 90 for n in range(60)])
    scratch = tmp_path / "scratch"
    report = killed_build(texts, encoder_folder, scratch, seed=4, workers=2, kills=30, index="ivf_sq8")
    assert report["differing"] == []
    assert {"tokenize", "embed", "index", "neighbours"} <= set(report["hit"])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_kills_in_every_stage_change_no_byte(tmp_path, text_writer, encoder_folder, workers):
    texts = text_writer(tmp_path / "texts", [13 * n % 90 for n in range(60)])
    report = killed_build(texts, encoder_folder, tmp_path / "scratch", seed=workers, workers=workers, kills=30)
    assert report["differing"] == []
    assert {"tokenize", "embed", "neighbours"} <= set(report["hit"])
