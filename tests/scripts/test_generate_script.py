"""scripts/generate.py on tiny models: with and without memory, the question kept apart, the page of what was read."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.modeling.unlimiformer.attach import unlimiform
from graft.scripts.generate import main
from graft.trainer.tokenisation import plain_ids

OPTIONS = ["--max_new_tokens", "5", "--do_sample", "false", "--memory.window", "32", "--memory.keys_per_query", "8"]
CONFIG = UnlimiformerConfig(window=32, keys_per_query=8)
DOCUMENT = "the cat sat on a mat near the sea while rain fell all night " * 12


@pytest.fixture(params=["seq2seq", "causal"])
def model_folder(request, make_run, tmp_path):
    make_run(request.param)
    return request.param, str(tmp_path / "model")


def expected_text(task, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = plain_ids(tokenizer, ["Read: " + DOCUMENT, "\n\nWho sat?!", "Read: Who sat?\n\n" + DOCUMENT + "!"])
    with torch.no_grad():
        if task == "seq2seq":
            model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
            with unlimiform(model, CONFIG) as handle:
                inputs = handle.remember(torch.tensor([[0, *ids[2], 2]])).inputs()
                tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0]
        else:
            model = AutoModelForCausalLM.from_pretrained(folder).eval()
            with unlimiform(model, CONFIG) as handle:
                inputs = handle.remember(torch.tensor([[0, *ids[0]]])).inputs(torch.tensor([ids[1]]))
                tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, len(ids[1]) :]
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_document_is_remembered_and_the_question_kept_apart(model_folder, tmp_path, capsys):
    task, folder = model_folder
    (tmp_path / "book.txt").write_text(DOCUMENT)
    texts = ["--prompt", str(tmp_path / "book.txt"), "--prefix", "Read: ", "--question", "Who sat?", "--suffix", "!"]
    assert main([folder, *texts, *OPTIONS]) == 0
    assert capsys.readouterr().out.strip() == expected_text(task, folder)


def test_what_reading_costs_is_said_before_and_a_budget_is_kept(model_folder, capsys, caplog):
    task, folder = model_folder
    assert main([folder, "--prompt", DOCUMENT, "--question", "Who?", *OPTIONS]) == 0
    auto = AutoModelForSeq2SeqLM if task == "seq2seq" else AutoModelForCausalLM
    whole = ("Who?\n\n" + DOCUMENT, 2) if task == "seq2seq" else (DOCUMENT, 1)  # and its special tokens
    tokens = len(plain_ids(AutoTokenizer.from_pretrained(folder), [whole[0]])[0]) + whole[1]
    with unlimiform(auto.from_pretrained(folder), CONFIG) as handle:
        size = handle.estimate(tokens)
    assert f"Remembering {tokens:,} tokens: {size}." in caplog.messages
    budget = ["--memory.max_bytes", str(size.nbytes - 1)]
    assert main([folder, "--prompt", DOCUMENT, "--question", "Who?", *OPTIONS, *budget]) == 2
    assert "`max_bytes`" in capsys.readouterr().err.splitlines()[-1]


def test_report_is_a_page_and_a_picture(model_folder, tmp_path, capsys):
    _, folder = model_folder
    page = tmp_path / "page.html"
    assert main([folder, "--prompt", DOCUMENT, "--question", "Who?", *OPTIONS, "--report", str(page)]) == 0
    assert "The document" in page.read_text()
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "%]" in capsys.readouterr().err


def test_without_memory_the_stock_model_answers(model_folder, capsys):
    _, folder = model_folder
    assert main([folder, "--prompt", "the cat sat", "--no-memory", "--max_new_tokens", "3", "--num_beams", "2"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory.windoww", "3"], "windoww"),
        (["--memory.overlap", "2"], "overlap.*2"),
        (["--max_new_tokenss", "3"], "max_new_tokenss"),
        (["--no-memory", "--report", "page.html"], "--report.*--no-memory"),
        (["--chat"], "chat template"),
        (["--no-memory"], "positions: use the memory"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(make_run, tmp_path, capsys, options, message):
    import re

    make_run("causal")
    assert main([str(tmp_path / "model"), "--prompt", DOCUMENT, *options]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("graft-generate: ")
    assert re.search(message, last), last


def test_a_model_that_is_not_there_is_named(capsys):
    assert main(["nowhere/at-all", "--prompt", "x"]) == 2
    assert "nowhere/at-all" in capsys.readouterr().err
