"""The example trains a RETRO on a few texts, and its page shows what was read."""

import json
import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[3] / "examples" / "retro_from_scratch.py"
NAVIGATION = (
    '<div class="navheader"><div>Prev</div> Up</div><p>SELECT reads &lt;rows&gt;.</p>\n\n<pre>of  a\ntable</pre>'
)


@pytest.fixture
def example():
    return runpy.run_path(str(EXAMPLE), run_name="retro_from_scratch")


def test_pages_of_postgresql_become_text_without_navigation(example, tmp_path):
    folder = tmp_path / "postgresql-doc-99" / "html"
    folder.mkdir(parents=True)
    (folder / "sql-select.html").write_text(f"<html><title>T</title><body class='x'>{NAVIGATION}</body></html>")
    assert example["postgresql_pages"](tmp_path) == ["SELECT reads <rows>.\nof  a\ntable"]
    assert example["postgresql_pages"](tmp_path / "nothing") == []


def test_long_rules_and_runs_of_empty_lines_are_cut_short(example):
    assert example["readable"]("a\n\n \n\n  b\n\nc") == "a\n\n  b\n\nc"
    assert example["readable"]("Title\n" + 40 * "=" + "\naaaaaaaaaaaa --- ") == "Title\n========\naaaaaaaaaaaa --- "


def test_the_three_losses_are_put_in_a_sentence(example):
    words = example["verdict"]({"eval_retrieved_loss": 2.0, "eval_without_loss": 2.5, "eval_random_loss": 1.75})
    assert "-0.5000 nats a token against none" in words
    assert "+0.2500 against those of other chunks" in words


def test_every_tenth_text_is_held_out(example):
    texts = [f"{number} ".ljust(600, "x") for number in range(40)] + ["short"]
    train, held_out = example["divided"](texts, 10**6)
    assert held_out == texts[:40:10]
    assert sorted(train + held_out) == sorted(texts[:40])
    assert len(sum(example["divided"](texts, 6000), [])) == 20


def test_the_example_ends_in_three_losses_and_a_page(example, tmp_path, encoder_folder, capsys):
    main = example["main"]
    words = ["select", "insert", "table", "index", "python", "function", "returns", "value", "of", "a", "&", "<row>"]
    texts = [" ".join(words[(place * number) % len(words)] for place in range(120)) for number in range(1, 31)]
    main.__globals__.update(documentation=lambda: texts, minilm_folder=lambda: encoder_folder)
    assert main(["--run", str(tmp_path), "--steps", "2", "--tokens", "40"]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())["final"]
    assert len({figures[f"eval_{view}_loss"] for view in ("retrieved", "without", "random")}) == 3
    printed = capsys.readouterr().out
    assert "with the neighbours found" in printed
    assert printed.count("it read") >= 2  # the two chunks of the prompt
    page = (tmp_path / "retro.html").read_text()
    assert "What was read meanwhile" in page
    assert "data:image/png" in page
    assert "nats a token" in page
    assert page.count('<div class="tokens">') == 1
    assert (tmp_path / "model" / "model.safetensors").exists()
