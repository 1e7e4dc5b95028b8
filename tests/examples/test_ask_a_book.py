"""The example on a tiny model: it reads, answers, draws, keeps what it has read and answers the same from that."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from graft.trainer.tokenizer_training import train_tokenizer

EXAMPLE = Path(__file__).parents[2] / "examples" / "ask_a_book.py"
TEXT = "the cat sat on a mat near the sea while rain fell all night " * 24


@pytest.mark.slow
def test_a_document_of_many_windows_is_read_asked_and_kept(tmp_path, capsys):
    tokenizer = train_tokenizer([TEXT], vocab_size=300, model_max_length=256)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"max_position_embeddings": 256, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "book.txt").write_text(TEXT)
    options = ["--model", str(tmp_path / "model"), "--document", str(tmp_path / "book.txt"), "--window", "32"]
    options += ["--output", str(tmp_path / "out"), "--question", "Who sat?", "When did it rain?"]
    main = runpy.run_path(str(EXAMPLE))["main"]
    assert main(options) == 0
    printed = capsys.readouterr().out
    assert "gives the same answer" in printed
    assert printed.count("found at tokens") == 2
    for number in (1, 2):
        assert (tmp_path / "out" / f"question-{number}.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((tmp_path / "out" / "answers.json").read_text())
    assert [row["question"] for row in rows] == ["Who sat?", "When did it rain?"]
    (tmp_path / "asked.json").write_text(json.dumps([["Who sat?", "cat"], ["Who flew?", "owl"]]))
    assert main([*options[:-3], "--questions", str(tmp_path / "asked.json"), "--full"]) == 0  # over an earlier run
    printed = capsys.readouterr().out
    assert re.search(r"Of 2 questions the passage found holds the answer of [01]; answered right:", printed)
    assert "full context" in printed


def test_a_document_that_is_not_there_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLE))["main"](["--document", str(tmp_path / "none.txt")])
    assert "none.txt is no file" in capsys.readouterr().err
