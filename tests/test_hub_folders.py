"""A memory and a corpus pushed to data set repositories, and used from there by a process with an empty cache."""

import json

import pytest

MODEL = """
import sys, json
from pathlib import Path
import numpy as np
import torch
from huggingface_hub import HfApi, snapshot_download
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.modeling.unlimiformer.attach import unlimiform
from graft.modeling.unlimiformer.memory import Memory

OPTIONS = UnlimiformerConfig(window=16, local_tokens=8, keys_per_query=4)
QUESTION = torch.tensor([[5, 6, 7]])


def answer(model, memory):
    with torch.no_grad():
        logits = model(**memory.inputs(QUESTION)).logits
    return logits.tolist()


def push(folder, repository):
    HfApi(token="hf_a_secret").create_repo(repository, repo_type="dataset", exist_ok=True)
    HfApi(token="hf_a_secret").upload_folder(repo_id=repository, folder_path=folder, repo_type="dataset")
"""
PUSH_MEMORY = (
    MODEL
    + """
torch.manual_seed(0)
sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64)).push_to_hub("me/base", token="hf_a_secret")
model = LlamaForCausalLM.from_pretrained("me/base").eval()
with unlimiform(model, OPTIONS) as handle:
    memory = handle.remember(torch.randint(3, 50, (1, 60), generator=torch.Generator().manual_seed(0)))
    print(json.dumps(answer(model, memory)))
    memory.save_pretrained("book")
push("book", "me/book")
"""
)
USE_MEMORY = (
    MODEL
    + """
model = LlamaForCausalLM.from_pretrained("me/base").eval()
folder = snapshot_download("me/book", repo_type="dataset", revision=sys.argv[1])
with unlimiform(model, OPTIONS):
    print(json.dumps(answer(model, Memory.from_pretrained(folder, model))))
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    try:
        Memory.from_pretrained(folder, model)
    except ValueError:
        pass
    else:
        raise AssertionError("another model took the memory")
"""
)
CORPUS = (
    MODEL
    + """
from graft.retrieval.corpus.chunking import ChunkSettings
from graft.retrieval.corpus.corpus import Corpus
from graft.retrieval.corpus.document_sources import DatasetRows
from graft.retrieval.corpus.embedder import ChunkEmbedder
from graft.retrieval.corpus.preparation import PreparationSettings, prepare_corpus
from graft.trainer.tokenizer_training import train_tokenizer


def facts(corpus):
    chunks = np.arange(len(corpus))
    return [corpus.texts(chunks), corpus.neighbours.take(chunks).tolist(), len(corpus.tokenizer)]
"""
)
PUSH_CORPUS = (
    CORPUS
    + """
words = "the cat sat on a mat near an old house by the sea while rain fell".split()
texts = [" ".join(words[(n + 7 * i) % len(words)] for i in range(30)) for n in range(8)]
tokenizer = train_tokenizer(texts, 300, 128)
torch.manual_seed(0)
sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
BertModel(BertConfig(vocab_size=300, max_position_embeddings=128, **sizes)).save_pretrained("encoder")
tokenizer.save_pretrained("encoder")
settings = PreparationSettings(ChunkSettings(8), 2, 32, workers=1)
rows = DatasetRows([{"text": text} for text in texts])
print(json.dumps(facts(prepare_corpus(rows, "corpus", tokenizer, ChunkEmbedder("encoder"), settings))))
push("corpus", "me/corpus")
"""
)
USE_CORPUS = (
    CORPUS
    + """
folder = snapshot_download("me/corpus", repo_type="dataset", revision=sys.argv[1])
print(json.dumps(facts(Corpus(folder, verify=True))))
"""
)


@pytest.mark.parametrize(
    ("push", "use", "repository"),
    [
        (PUSH_MEMORY, USE_MEMORY, "me/book"),
        pytest.param(PUSH_CORPUS, USE_CORPUS, "me/corpus", marks=pytest.mark.slow),
    ],
    ids=["memory", "corpus"],
)
def test_what_was_pushed_is_used_by_id_and_commit_with_an_empty_cache(hub, push, use, repository):
    expected = json.loads(hub.run(push).stdout.splitlines()[-1])
    files = hub.repositories[repository].files
    assert not [name for name in files if name.endswith((".pt", ".pth", ".pkl"))]
    assert not [name for name, content in files.items() if b"hf_a_secret" in content]
    found = hub.run(use, hub.repositories[repository].sha, home="elsewhere").stdout.splitlines()[-1]
    assert json.loads(found) == expected
