"""Tiny tokenizers, encoders and folders of text; a corpus of each kind is built in well under a second."""

import hashlib
import itertools
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from graft.retrieval.corpus.chunking import ChunkSettings, tokenize_corpus
from graft.retrieval.corpus.document_sources import DatasetRows, TextFolder
from graft.retrieval.corpus.embedder import ChunkEmbedder
from graft.retrieval.corpus.embedding import embed_corpus
from graft.retrieval.corpus.neighbours import find_neighbours
from graft.retrieval.corpus.packing import pack_sequences

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def word_tokenizer(num_words: int, adds_special: bool = True) -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *(f"w{n}" for n in range(num_words))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_special:
        backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.fixture(scope="session")
def make_tokenizer():
    return word_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return word_tokenizer(200)


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory, tokenizer):
    """A folder as `from_pretrained` takes it, with a random but fixed encoder and the tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=204, max_position_embeddings=64, initializer_range=0.3, **sizes)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def embedder(encoder_folder):
    return ChunkEmbedder(encoder_folder)


def write_texts(folder: Path, lengths, seed: int = 0) -> Path:
    rng = random.Random(seed)
    for number, length in enumerate(lengths):
        path = folder / f"part{number % 3}" / f"{number:03d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join(f"w{rng.randrange(200)}" for _ in range(length)))
    return folder


@pytest.fixture(scope="session")
def text_writer():
    return write_texts


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    rng = random.Random(3)
    return write_texts(tmp_path_factory.mktemp("texts"), [0, *(rng.randrange(1, 60) for _ in range(20)), 6, 14])


@pytest.fixture(scope="session")
def build(tokenizer, embedder):
    """Make a corpus of lists of words, as far as `until`."""

    def make(folder, texts=None, source=None, until="pack", **options):
        settings = ChunkSettings(**{"chunk_size": 8, "shard_chunks": 8, **options})
        source = source or DatasetRows([{"text": text} for text in texts])
        steps = {
            "tokenize": lambda: tokenize_corpus(source, folder, tokenizer, settings),
            "embed": lambda: embed_corpus(folder, embedder, workers=1),
            "neighbours": lambda: find_neighbours(folder, 3, workers=1),
            "pack": lambda: pack_sequences(folder, 32),
        }
        for name, step in steps.items():
            corpus = step()
            if name == until:
                return corpus
        raise KeyError(until)

    return make


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, build, text_folder):
    """Of `text_folder`, all stages done; tests only read it."""
    return build(tmp_path_factory.mktemp("corpus"), source=TextFolder(text_folder))


@pytest.fixture(scope="session")
def digests():
    """Name to SHA-256 of every file under a folder."""

    def of(folder):
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    return of


@pytest.fixture(scope="session")
def naive_neighbours():
    """Brute force in float64 over all pairs: (ids, distances), by (distance, id), -1 and infinity at the end."""

    def search(queries, vectors, k, ranges):
        ids, distances = [], []
        for query, (start, end) in zip(queries, ranges, strict=True):
            candidates = [j for j in range(len(vectors)) if not start <= j < end and vectors[j].any() and query.any()]
            gaps = [(float(((query.astype(float) - vectors[j].astype(float)) ** 2).sum()), j) for j in candidates]
            best = list(itertools.islice(sorted(gaps), k))
            best += [(float("inf"), -1)] * (k - len(best))
            ids.append([j for _, j in best])
            distances.append([distance for distance, _ in best])
        return ids, distances

    return search
