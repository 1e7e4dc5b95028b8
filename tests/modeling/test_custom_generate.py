"""A `custom_generate` folder gives a stock model what graft's own call does, where graft cannot be imported."""

import json
import os
import subprocess
import sys

import pytest
import torch
from stranger import program_without
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
)

from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.modeling.custom_generate import write_custom_generate
from graft.modeling.unlimiformer.attach import unlimiform
from graft.scripts.export_generate import main

SIDES = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
BART = {"vocab_size": 40, "d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32}
LLAMA = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "max_position_embeddings": 64, "eos_token_id": None, "initializer_range": 0.4}
OPTIONS = {"max_new_tokens": 6, "do_sample": False}
MEMORY = {"window": 16, "keys_per_query": 5}

STRANGER = (
    program_without("graft", "faiss")
    + """
import json
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

given = json.load(open(sys.argv[1]))
auto = AutoModelForSeq2SeqLM if given["family"] == "bart" else AutoModelForCausalLM
model = auto.from_pretrained(given["model"]).eval()
before = (model.forward, model.config.to_dict(), len(model._forward_pre_hooks))
tensors = {name: torch.tensor(value) for name, value in given["tensors"].items()}
options = {"custom_generate": given["folder"], "trust_remote_code": True, "memory": given["memory"]}
found = model.generate(**tensors, **options, **given["options"])
assert (model.forward, model.config.to_dict(), len(model._forward_pre_hooks)) == before
print(json.dumps(found.tolist()))
"""
)


def saved_model(family, folder):
    torch.manual_seed(0)
    if family == "bart":
        model = BartForConditionalGeneration(BartConfig(**BART, **SIDES, init_std=0.4))
    else:
        model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    model.eval().save_pretrained(folder)
    auto = AutoModelForSeq2SeqLM if family == "bart" else AutoModelForCausalLM
    return auto.from_pretrained(folder).eval()


@pytest.mark.parametrize("case", ["bart", "llama", "llama with a question"])
def test_a_stranger_gets_the_tokens_that_graft_gives(case, tmp_path):
    family = case.partition(" ")[0]
    model = saved_model(family, tmp_path / "model")
    assert main(["memory", str(tmp_path / "exported")]) == 0
    ids = torch.randint(3, 40, (2, 90), generator=torch.Generator().manual_seed(0))
    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = dict(OPTIONS) if family == "bart" else OPTIONS | {"num_beams": 2}
    memory = MEMORY | ({} if family == "bart" else {"local_tokens": 4})
    if "question" in case:
        tensors["question_ids"] = ids[:, 30:37]
    with unlimiform(model, UnlimiformerConfig(**memory)) as unlimited:
        if "question" in case:
            inputs = unlimited.remember(ids).inputs(tensors["question_ids"])
            expected = model.generate(**inputs, **options)
        else:
            expected = unlimited.generate(ids, **options)
    given = {"family": family, "model": str(tmp_path / "model"), "folder": str(tmp_path / "exported")}
    given |= {"memory": memory, "options": options, "tensors": {name: t.tolist() for name, t in tensors.items()}}
    (tmp_path / "given.json").write_text(json.dumps(given))
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", STRANGER, str(tmp_path / "given.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == expected.tolist()


def test_the_folder_is_refused_without_trust(tmp_path):
    model = saved_model("llama", tmp_path / "model")
    write_custom_generate(tmp_path / "exported", "memory")
    ids = torch.ones(1, 40, dtype=torch.long)
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(ids, custom_generate=str(tmp_path / "exported"), trust_remote_code=False, max_new_tokens=2)


def test_the_folder_has_a_card_with_the_tag_that_the_hub_asks_for_and_no_pickle(tmp_path):
    write_custom_generate(tmp_path / "exported", "memory")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\ntags:\n- custom_generate\n")
    assert {path.suffix for path in (tmp_path / "exported").rglob("*") if path.is_file()} == {".py", ".txt", ".md"}


def test_mistakes_are_one_line_and_leave_what_was_there(tmp_path, capsys):
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "mine.txt").write_text("mine")
    assert main(["memory", str(tmp_path / "exported")]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "exported").iterdir()] == ["mine.txt"]
    with pytest.raises(ValueError, match=r"`ability` must be one of \['memory', 'retrieval'\], got 'graph'"):
        write_custom_generate(tmp_path / "new", "graph")


def test_a_call_without_tokens_is_refused(tmp_path):
    from graft.modeling.unlimiformer.generate_with_memory import generate

    with pytest.raises(ValueError, match="`input_ids` must be given"):
        generate(saved_model("llama", tmp_path))
