import numpy as np
import pytest
import torch
from diablogpt_pytorch import (
    DIABLOGPT,
    DIABLOGPTDataset,
    DIABLOGPTdataset,
    RETRODataset,
    TrainingWrapper,
    top_k,
    top_p,
)
from diablogpt_pytorch.retrieval import (
    bert_embed,
    chunks_to_index_and_embed,
    chunks_to_precalculated_knn_,
    text_folder_to_chunks_,
    tokenize,
)
from hypothesis import given
from hypothesis.strategies import integers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

SMALL = {"num_tokens": 104, "max_seq_len": 16, "enc_dim": 16, "enc_depth": 1, "dec_dim": 24, "dec_depth": 2}
SMALL |= {"dec_cross_attn_layers": (1, 2), "heads": 3, "dim_head": 8, "chunk_size": 4}
NAMES = {"chunks_memmap_path": "t.dat", "seqs_memmap_path": "s.dat", "doc_ids_memmap_path": "d.dat"}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{n}" for n in range(100))]
    backend = Tokenizer(models.WordLevel({token: n for n, token in enumerate(tokens)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=104, initializer_range=0.5, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, encoder):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIABLOGPT_EMBEDDER", str(encoder))
    monkeypatch.delenv("REPROCESS", raising=False)
    rng = np.random.default_rng(1)
    (tmp_path / "texts").mkdir()
    for number, length in enumerate((21, 3, 30, 9)):
        words = " ".join(f"w{n}" for n in rng.integers(0, 100, length))
        (tmp_path / "texts" / f"{number}.txt").write_text(words)
    return tmp_path


def wrapper(model, **options):
    given = {"knn": 2, "chunk_size": 4, "documents_path": "texts", **NAMES, **options}
    return TrainingWrapper(retro=model, **given)


def test_the_loss_is_the_mean_over_real_tokens_of_the_logits():
    torch.manual_seed(0)
    model = DIABLOGPT(**SMALL)
    seq, found = torch.randint(1, 104, (2, 17)), torch.randint(1, 104, (2, 4, 2, 8))
    seq[1, 11:] = 0
    logits = model(seq[:, :-1], found)
    assert logits.shape == (2, 16, 104)
    shares = logits.double().log_softmax(-1).gather(-1, seq[:, 1:, None])[..., 0]
    real = seq[:, 1:] != 0
    expected = -(shares * real).sum() / real.sum()
    for mode in (model.train(), model.eval()):
        torch.testing.assert_close(mode(seq, found, return_loss=True).double(), expected, rtol=1e-5, atol=1e-5)
    assert model(seq, return_loss=True).shape == ()  # without neighbours the original gives logits here


def test_arguments_become_a_config_and_wrong_ones_are_refused():
    config = DIABLOGPT(**SMALL, dec_attn_dropout=0.25, enc_ff_dropout=0.5).model.config
    assert (config.num_attention_heads, config.cross_attention_layers) == (3, [0, 1])
    assert (config.attention_dropout, config.encoder_hidden_dropout, config.rope) == (0.25, 0.5, "paper")
    assert DIABLOGPT(**SMALL, use_deepnet=True).model.config.residual == "deepnorm"
    with pytest.raises(TypeError, match="dec_attn_droput"):
        DIABLOGPT(**SMALL, dec_attn_droput=0.25)


def naive_item(chunks, knn, start, per_row, eos, pad):
    """One row, as the original reads it, with what its files lack as padding."""
    size = chunks.shape[1] - 1

    def chunk(number):
        return chunks[number].tolist() if 0 <= number < len(chunks) else [pad] * (size + 1)

    ids = [token for u in range(per_row) for token in chunk(start + u)[:-1]] + [chunk(start + per_row - 1)[-1]]
    if eos in ids:
        ids = [token if place <= ids.index(eos) else pad for place, token in enumerate(ids)]
    found = []
    for u in range(per_row):
        neighbours = knn[start + u].tolist() if start + u < len(knn) else [-1] * knn.shape[1]
        row = []
        for neighbour in neighbours:
            text = chunk(neighbour)[:-1]
            last = eos in text or neighbour < 0 or neighbour + 1 >= len(chunks)
            row.append(text + ([pad] * size if last else chunk(neighbour + 1)[:-1]))
        found.append(row)
    return ids, found


@given(seed=integers(0, 2**31), count=integers(1, 12), size=integers(1, 5), per_row=integers(1, 4))
def test_rows_of_raw_files_equal_a_naive_reading(tmp_path_factory, seed, count, size, per_row):
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("raw")
    arrays = {
        "chunks": rng.integers(1, 9, (count, size + 1)),
        "knn": rng.integers(-1, count, (count, 2)),
        "seqs": rng.integers(0, count, 3),
    }
    for name, array in arrays.items():
        array.astype(np.int32).tofile(folder / name)
    before = {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir()}
    data = DIABLOGPTDataset(
        num_sequences=3,
        num_chunks=count,
        num_neighbors=2,
        chunk_size=size,
        seq_len=per_row * size,
        chunk_memmap_path=folder / "chunks",
        chunk_nn_memmap_path=folder / "knn",
        seq_memmap_path=folder / "seqs",
        eos_id=7,
    )
    for number in range(3):
        ids, found = data[number]
        start = int(arrays["seqs"][number])
        assert (ids.tolist(), found.tolist()) == naive_item(arrays["chunks"], arrays["knn"], start, per_row, 7, 0)
        assert ids.dtype == found.dtype == torch.int64
    assert {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir()} == before
    assert DIABLOGPTDataset is DIABLOGPTdataset is RETRODataset


def test_bert_embed_is_the_mean_behind_cls_or_cls_itself(here, encoder):
    ids = tokenize(["w1 w2 w3", "w4"])
    assert ids.tolist() == [[2, 5, 6, 7, 3], [2, 8, 3, 0, 0]]
    model = BertModel.from_pretrained(encoder).eval()
    with torch.no_grad():
        hidden = [model(row[row != 0][None]).last_hidden_state[0] for row in ids]
    torch.testing.assert_close(bert_embed(ids), torch.stack([h[1:].mean(0) for h in hidden]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bert_embed(ids, return_cls_repr=True), torch.stack([h[0] for h in hidden]))


def test_the_exported_files_say_what_the_texts_say(here):
    stats = text_folder_to_chunks_(folder="texts", chunk_size=4, seq_len=16, **NAMES)
    tokens = [tokenize((here / "texts" / f"{n}.txt").read_text())[0].tolist() for n in range(4)]
    chunks = np.fromfile("t.dat", np.int32).reshape(-1, 5)
    owners = np.fromfile("d.dat", np.int32)
    assert stats == {"chunks": len(chunks), "docs": 4, "seqs": len(np.fromfile("s.dat", np.int32))}
    for document, ids in enumerate(tokens):
        rows = chunks[owners == document]
        assert rows[:, :-1].reshape(-1)[: len(ids)].tolist() == ids
        assert not rows[:, :-1].reshape(-1)[len(ids) :].any()
        assert rows[:, -1].tolist() == [*rows[1:, 0].tolist(), 0]
    assert text_folder_to_chunks_(folder="texts", chunk_size=4, seq_len=16, max_seqs=2, **NAMES)["seqs"] == 2


def test_raw_files_of_another_maker_are_indexed_and_searched(here):
    rng = np.random.default_rng(0)
    chunks = rng.integers(0, 104, (30, 5)).astype(np.int32)
    chunks[4, :] = 0
    chunks.tofile("foreign.dat")
    np.repeat(np.arange(6), 5).astype(np.int32).tofile("owners.dat")
    index, vectors = chunks_to_index_and_embed(num_chunks=1000, chunk_size=4, chunk_memmap_path="foreign.dat")
    assert vectors.shape == (30, 8)
    assert index.search(vectors[[0, 9, 17]], k=2)[1][:, 0].tolist() == [0, 9, 17]
    path, _ = chunks_to_precalculated_knn_(
        num_chunks=30, chunk_size=4, chunk_memmap_path="foreign.dat", doc_ids_memmap_path="owners.dat"
    )
    assert path.name == "foreign.knn.dat"
    knn = np.fromfile(path, np.int32).reshape(30, 2)
    searched = np.arange(30) != 4  # a chunk of padding finds nothing and is found by nobody
    assert (knn[searched] // 5 != np.arange(30)[searched, None] // 5).all()
    assert (knn[4] == -1).all()
    assert not (knn == 4).any()
    with pytest.raises(TypeError, match="unknown arguments .*'num_chunk'"):
        chunks_to_index_and_embed(num_chunks=30, chunk_size=4, chunk_memmap_path="foreign.dat", num_chunk=1)


def test_a_second_run_keeps_what_is_there_and_reprocess_makes_it_again(here, monkeypatch):
    model = DIABLOGPT(**SMALL)
    wrapper(model)
    vectors = here / "t.corpus" / "embeddings" / "00000.npy"
    before = vectors.stat().st_mtime_ns
    wrapper(model)
    assert vectors.stat().st_mtime_ns == before
    (here / "texts" / "9.txt").write_text("w1 w2 w3 w4 w5")
    with pytest.raises(ValueError, match="overwrite"):
        wrapper(model)
    monkeypatch.setenv("REPROCESS", "1")
    assert wrapper(model).stats["docs"] == 5
    assert vectors.stat().st_mtime_ns != before


def test_the_optimizer_decays_matrices_in_the_order_of_the_model(here):
    model = DIABLOGPT(**SMALL)
    optimizer = wrapper(model).get_optimizer(lr=1e-3, wd=0.01)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, spared = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert sorted(decayed + spared) == sorted(names.values())
    order = list(names.values())
    assert decayed == sorted(decayed, key=order.index)
    assert not any("embed" in name or "norm" in name or "null" in name or "bias" in name for name in decayed)


def test_generation_goes_on_from_a_prompt_and_looks_its_chunks_up(here):
    made = wrapper(DIABLOGPT(**SMALL))
    calls = []
    found = made.retriever
    made.retriever = lambda chunks: (calls.append(len(chunks)), found(chunks))[1]
    made.retriever.corpus = found.corpus
    prompt = torch.tensor([[2, 9, 0, 12, 40, 41]])  # an id that is padding elsewhere is a token here
    torch.manual_seed(0)
    sampled = made.generate(prompt, filter_thres=0.5)
    assert torch.equal(sampled[:, :6], prompt)
    assert sampled.shape[1] <= 16
    assert calls
    assert torch.equal(made.generate(prompt, temperature=0), made.generate(prompt, temperature=0))
    assert made.generate(filter_fn=top_p).shape[1] <= 16


def test_caps_and_wrong_arguments(here):
    model = DIABLOGPT(**SMALL)
    assert wrapper(model, max_seqs=2).ds[1][0].shape == (17,)
    assert len(wrapper(model, max_seqs=2).ds) == 2
    with pytest.raises(ValueError, match="exactly one of `diablogpt` and `retro` must be given, got 0"):
        wrapper(None)
    with pytest.raises(ValueError, match="`chunk_size` must be the model's 4, got 8"):
        wrapper(model, chunk_size=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 50}, "`num_tokens` of the model is 50, the corpus's tokenizer has 104"),
        ({"max_index_memory_usage": "100q"}, "`max_index_memory_usage` must be a size such as .*got '100q'"),
        ({"current_memory_available": "a lot"}, "`current_memory_available` must be a size such as .*got 'a lot'"),
        ({"max_index_memory_usage": "10"}, r"must be at least \d+ bytes for \d+ chunks, got 10 bytes"),
        ({"knn": 100}, r"`num_neighbours` must be at most \d+, .* got 100"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_embedded(here, options, message):
    model = DIABLOGPT(**{**SMALL, **{name: options[name] for name in options if name == "num_tokens"}})
    with pytest.raises(ValueError, match=message):
        wrapper(model, **{name: options[name] for name in options if name != "num_tokens"})
    assert not (here / "t.corpus" / "embeddings").exists()


def test_filters():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0, -1.0]])
    assert torch.isfinite(top_k(logits, 0.6)).tolist() == [[False, True, True, False, False]]
    assert torch.isfinite(top_k(logits, 0.99)).sum() == 1
    shares = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert torch.isfinite(top_p(shares, 0.9)).tolist() == [[True, True, True, False]]
