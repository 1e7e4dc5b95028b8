"""One command from texts to a corpus, and the commands that look after it, with a tiny random encoder."""

import json
import re

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from graft.retrieval.corpus.corpus import Corpus
from graft.scripts import build_retrieval_database, corpus_commands


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghij"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(["a b c d e f g", "b c d", "h i j a " * 4]):
        (folder / f"{number}.txt").write_text(text)
    return folder


def build(texts, output, encoder, *more):
    arguments = [str(texts), "--output", str(output), "--embedder", str(encoder), "--chunk-size", "4"]
    return build_retrieval_database.main([*arguments, "--sequence-length", "16", "--neighbours", "2", *more])


def test_held_out_documents_find_their_neighbours_in_another_corpus(texts, tmp_path, encoder, capsys):
    assert build(texts, tmp_path / "corpus", encoder) == 0
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    (held_out / "0.txt").write_text("b c d")  # one document: it has no neighbours of its own
    database = ["--database", str(tmp_path / "corpus")]
    assert build(held_out, tmp_path / "other", encoder, *database, "--index", "auto") == 0
    corpus, other = Corpus(tmp_path / "corpus"), Corpus(tmp_path / "other")
    assert other.neighbours.between(0, 1).min() >= 0
    assert corpus.text(int(other.neighbours.between(0, 1)[0, 0])) == "b c d"
    assert build(held_out, tmp_path / "third", encoder, *database, "--index", "hnsw") == 2
    assert "`index` must be exact or auto with a `database`" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


def corpus_command(*arguments):
    return corpus_commands.main([str(argument) for argument in arguments])


def test_one_command_makes_a_corpus_and_another_shows_it(texts, tmp_path, encoder, capsys, caplog):
    with caplog.at_level("INFO"):
        assert build(texts, tmp_path / "corpus", encoder) == 0
    assert re.search(r"will need at most about .* \(tokenize .*, embed .*, neighbours .*\)", caplog.text)
    assert re.search(r"stage embed is complete, 8 chunks, \d+ a second", caplog.text)
    assert "8 chunks and their neighbours are in" in caplog.text
    assert corpus_command("verify", tmp_path / "corpus", "--embed") == 0
    assert capsys.readouterr().out.endswith("corpus is sound.\n")
    assert corpus_command("inspect", tmp_path / "corpus", "--chunk", 2) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[:2] == ["chunk 2 of 1.txt", "  b c d"]
    assert re.fullmatch(r"distance [\d.e-]+: chunk \d of [02]\.txt", shown[2])
    assert corpus_command("inspect", tmp_path / "corpus", "--page", tmp_path / "page.html") == 0
    assert "<h1>corpus: chunks and their neighbours</h1>" in (tmp_path / "page.html").read_text()


def test_jsonl_and_another_tokenizer(tmp_path, encoder):
    rows = [{"body": text} for text in ("a b c", "d e f", "g h")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    more = ("--text-field", "body", "--tokenizer", str(encoder), "--pack", "document")
    assert build(tmp_path / "rows.jsonl", tmp_path / "corpus", encoder, *more) == 0
    assert len(Corpus(tmp_path / "corpus").sequences) == 3


def test_one_file_of_text_beside_a_database(texts, tmp_path, encoder, capsys):
    assert build(texts, tmp_path / "corpus", encoder) == 0
    (tmp_path / "one.txt").write_text("b c d")
    assert build(tmp_path / "one.txt", tmp_path / "other", encoder, "--database", str(tmp_path / "corpus")) == 0
    assert Corpus(tmp_path / "other").document_names.to_pylist() == ["one.txt"]
    assert corpus_command("refresh", tmp_path / "corpus", "--neighbours", 100_000) == 2
    assert "`num_neighbours` must be at most" in capsys.readouterr().err
    (tmp_path / "one.txt").write_text("b c e")
    assert build(tmp_path / "one.txt", tmp_path / "other", encoder, "--database", str(tmp_path / "corpus")) == 2
    assert "holds folder of 1 (sha256" in capsys.readouterr().err


def test_an_index_can_be_asked_for(texts, tmp_path, encoder, caplog):
    pytest.importorskip("faiss", reason="the extra graft-transformers[faiss] is not installed")
    with caplog.at_level("INFO"):
        assert build(texts, tmp_path / "corpus", encoder, "--index", "hnsw") == 0
        assert build(texts, tmp_path / "corpus", encoder, "--index", "hnsw") == 0
    assert re.search(r"Datastore\(8 vectors of 16, hnsw.*recall@4 1\.0 on 8 chunks", caplog.text)
    assert build(texts, tmp_path / "auto", encoder, "--index", "auto") == 0
    assert not Corpus(tmp_path / "auto").manifest.files_of("index")
    assert corpus_command("verify", tmp_path / "corpus") == 0


def test_append_and_refresh(texts, tmp_path, encoder):
    build(texts, tmp_path / "corpus", encoder)
    more = tmp_path / "more"
    more.mkdir()
    (more / "new.txt").write_text("b c d")
    assert corpus_command("append", tmp_path / "corpus", more) == 0
    old = int(Corpus(tmp_path / "corpus").neighbours.between(2, 3)[0, 0])
    assert corpus_command("refresh", tmp_path / "corpus", "--neighbours", 3) == 0
    corpus = Corpus(tmp_path / "corpus")
    new = corpus.num_chunks - 1
    assert old != new
    assert corpus.neighbours.between(2, 3).shape == (1, 3)
    assert int(corpus.neighbours.between(2, 3)[0, 0]) == new  # the same words


def test_a_users_mistake_is_one_line_and_exit_code_2(texts, tmp_path, encoder, capsys):
    assert build(texts, tmp_path / "corpus", encoder, "--glob", "*.md") == 2
    assert re.fullmatch(r"graft-build-database: no file in `folder` .*\n", capsys.readouterr().err)
    assert build(texts, tmp_path / "corpus", encoder, "--sequence-length", "15") == 2
    assert "must be a multiple of the corpus's chunk_size 4, got 15" in capsys.readouterr().err
    assert build(texts, tmp_path / "corpus", encoder, "--index-memory", "100q") == 2
    assert "`index_memory` must be a size such as 500M" in capsys.readouterr().err
    assert build(texts, tmp_path / "corpus", encoder, "--index", "tree") == 2
    assert "`index` must be one of exact, auto" in capsys.readouterr().err
    assert not (tmp_path / "corpus").exists()
    assert corpus_command("verify", tmp_path / "absent") == 2
    assert re.fullmatch(r"graft-corpus verify: .* has no manifest\.json.*\n", capsys.readouterr().err)


def test_verify_reports_faults_with_exit_code_1(texts, tmp_path, encoder, capsys):
    build(texts, tmp_path / "corpus", encoder)
    path = tmp_path / "corpus" / "tokens" / "00000.bin"
    path.write_bytes(path.read_bytes()[::-1])
    assert corpus_command("verify", tmp_path / "corpus", "--fast") == 0
    capsys.readouterr()
    assert corpus_command("verify", tmp_path / "corpus") == 1
    assert "00000.bin is damaged" in capsys.readouterr().out
