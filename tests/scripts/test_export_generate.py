"""`graft-export-generate retrieval`: a stock Llama reads neighbours where neither graft, PEFT nor faiss is there."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from stranger import program_without
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from graft.modeling.retro.generate_with_retrieval import generate
from graft.modeling.retro.passage_retriever import PassageRetriever
from graft.modeling.retro.retrofit import retrofit
from graft.modeling.retro.retrofit_config import RetroFitConfig
from graft.retrieval.corpus.corpus import Corpus
from graft.scripts.export_generate import main

OPTIONS = {"max_new_tokens": 14, "do_sample": False, "num_beams": 2}

STRANGER = (
    program_without("graft", "faiss")
    + """
import json

sys.modules["peft"] = None  # absent, also for transformers, which asks before it imports
from transformers import AutoModelForCausalLM

given = json.load(open(sys.argv[1]))
model = AutoModelForCausalLM.from_pretrained(given["model"]).eval()
ids = torch.tensor(given["ids"])


def state():
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks), sorted(vars(m))) for m in model.modules()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    logits, tokens = model(ids).logits, model.generate(ids, **given["options"])
    return hooks, trained, model.config.to_dict(), logits.tolist(), tokens.tolist()


before = state()
where = {"custom_generate": given["folder"], "trust_remote_code": True, "retrofit": given["folder"]}
fixed = torch.tensor(given["fixed"])
own = lambda chunks: fixed.expand(len(chunks), -1, -1)
padded, mask = torch.nn.functional.pad(ids, (3, 0), value=1), torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
found = {
    "passages": model.generate(ids, **where, **given["options"]),
    "padded": model.generate(padded, attention_mask=mask, **where, **given["options"])[:, 3:],
    "retriever": model.generate(ids, retriever=own, **where, **given["options"]),
}
try:
    model.generate(ids, retriever=lambda chunks: None, **where, **given["options"])
except ValueError as error:
    assert "must return ids" in str(error)
else:
    raise AssertionError("an answer that is none was taken")
assert state() == before
print(json.dumps({name: tokens.tolist() for name, tokens in found.items()} | {"base": before[-1]}))
"""
)


@pytest.fixture
def fitted(tmp_path):
    """A tiny Llama in `tmp_path / "model"` and its retro-fit with random weights, saved as "adapter"."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": None, "max_position_embeddings": 128}
    LlamaForCausalLM(LlamaConfig(vocab_size=320, initializer_range=0.4, **sizes, **special)).save_pretrained(
        tmp_path / "model"
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    handle = retrofit(model, RetroFitConfig(chunk_size=8, cross_attention_layers=[0, 1], num_encoder_layers=1))
    with torch.no_grad():
        for parameter in handle.trainable_parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape))
    handle.save_pretrained(tmp_path / "adapter")
    return model, handle


def test_a_stranger_reads_the_passages_that_graft_reads_and_keeps_the_base(fitted, corpora, tmp_path):
    model, handle = fitted
    command = ["retrieval", str(tmp_path / "exported"), "--adapter", str(tmp_path / "adapter")]
    assert main([*command, "--corpus", str(corpora / "corpus")]) == 0
    corpus = Corpus(corpora / "corpus")
    passages = torch.from_numpy(corpus.passages(torch.arange(len(corpus)).numpy(), 16))
    ids = passages[5:7, :11].clone()
    fixed = torch.randint(3, 320, (1, 2, 16), generator=torch.Generator().manual_seed(1))
    retrievers = {
        "passages": PassageRetriever(passages, 8, corpus.pad_token_id),
        "retriever": lambda chunks: fixed.expand(len(chunks), -1, -1),
    }
    expected = {
        name: model.generate(**handle.inputs(ids, retriever=retriever), **OPTIONS).tolist()
        for name, retriever in retrievers.items()
    }
    given = {"model": str(tmp_path / "model"), "folder": str(tmp_path / "exported"), "ids": ids.tolist()}
    (tmp_path / "given.json").write_text(json.dumps(given | {"options": OPTIONS, "fixed": fixed.tolist()}))
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(tmp_path / "given.json")],
        capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name: found[name] for name in expected} == expected
    assert found["padded"] == expected["passages"]
    assert found["base"] not in (found["passages"], found["retriever"])
    assert found["passages"] != found["retriever"]


def test_the_folder_holds_no_pickle_no_path_and_loads_as_the_adapter_it_was_made_from(fitted, tmp_path):
    _, handle = fitted
    handle.remove()
    assert main(["retrieval", str(tmp_path / "exported"), "--adapter", str(tmp_path / "adapter")]) == 0
    files = [path for path in (tmp_path / "exported").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".py", ".txt", ".md", ".json", ".safetensors"}
    assert not [path for path in files if str(tmp_path / "exported") in path.read_text("utf-8", errors="ignore")]
    loaded = type(handle).from_pretrained(handle.model, tmp_path / "exported")
    for new, old in zip(loaded.trainable_parameters(), handle.trainable_parameters(), strict=True):
        assert torch.equal(new, old)


def test_without_passages_a_retriever_is_asked_for_and_a_second_retro_fit_is_refused(fitted, tmp_path):
    model, handle = fitted
    ids = torch.full((1, 9), 5)
    with pytest.raises(RuntimeError, match="`model` has retrieval already"):
        generate(model, ids, retrofit=tmp_path / "adapter")
    handle.remove()
    with pytest.raises(ValueError, match="`retriever` must be given: .* holds no passages.safetensors"):
        generate(model, ids, retrofit=tmp_path / "adapter", max_new_tokens=2)
    with pytest.raises(ValueError, match="`input_ids` and `retrofit`"):
        generate(model, ids)
    with pytest.raises(ValueError, match="holds no retro-fit: it lacks adapter_config.json"):
        generate(model, ids, retrofit=tmp_path / "model")
    with pytest.raises(TypeError, match="`retriever` must be callable"):
        generate(model, ids, retrofit=tmp_path / "adapter", retriever="passages")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["retrieval", "OUT"], "needs --adapter"),
        (["memory", "OUT", "--adapter", "ADAPTER"], "a memory has no weights"),
        (
            ["retrieval", "OUT", "--adapter", "OUT"],
            "must be the folder of a retro-fit: .* it lacks adapter_config.json",
        ),
        (["retrieval", "OUT", "--adapter", "ADAPTER", "--corpus", "ADAPTER"], "manifest.json"),
        (["retrieval", "OUT", "--adapter", "SHORTER", "--corpus", "CORPUS"], "chunks of 8 tokens, the retro-fit of 4"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(fitted, corpora, tmp_path, capsys, arguments, message):
    model, handle = fitted
    handle.remove()
    retrofit(model, RetroFitConfig(chunk_size=4)).save_pretrained(tmp_path / "shorter")
    places = {"OUT": tmp_path / "exported", "ADAPTER": tmp_path / "adapter", "CORPUS": corpora / "corpus"}
    places["SHORTER"] = tmp_path / "shorter"
    try:
        code = main([str(places.get(argument, argument)) for argument in arguments])
    except SystemExit as left:
        code = left.code
    assert code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, error), error
    assert not (tmp_path / "exported").exists()
