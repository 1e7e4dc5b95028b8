import numpy as np
import pytest
import torch
from transformers import BertModel

from graft.retrieval.corpus.embedder import ChunkEmbedder, EmbedderSettings, weights_hash
from graft.retrieval.corpus.embedding import embed_chunks


def naive_vector(embedder, ids, pooling="mean", add_sep=False):
    """One chunk alone, without padding, in float64."""
    model = BertModel.from_pretrained(embedder.name, dtype=torch.float64).eval()
    ids = [2, *ids, *([3] if add_sep else [])]
    hidden = model(torch.tensor([ids])).last_hidden_state[0]
    vector = hidden[0] if pooling == "cls" else hidden[1:].mean(0)
    return (vector / vector.norm()).detach().numpy()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("add_sep", [False, True])
def test_a_chunk_in_a_padded_batch_equals_the_chunk_alone(encoder_folder, pooling, add_sep):
    embedder = ChunkEmbedder(encoder_folder, settings=EmbedderSettings(pooling, add_sep=add_sep, batch_size=3))
    rng = np.random.default_rng(0)
    chunks = [rng.integers(4, 204, length) for length in (5, 1, 8, 8, 2, 3, 30)]
    vectors = embedder.embed_ids(chunks).numpy()
    expected = [naive_vector(embedder, chunk.tolist(), pooling, add_sep) for chunk in chunks]
    np.testing.assert_allclose(vectors, expected, atol=2e-6)


def test_the_number_of_workers_changes_no_bit(embedder):
    rng = np.random.default_rng(0)
    chunks = [rng.integers(4, 204, rng.integers(1, 20)) for _ in range(150)]
    one, two, three = (embedder.embed_ids(chunks, workers) for workers in (1, 2, 3))
    assert torch.equal(one, two)
    assert torch.equal(one, three)


def test_a_chunk_without_tokens_is_a_row_of_zeros(embedder):
    vectors = embedder.embed_texts(["w1 w2", "", "w3"])
    assert vectors[1].tolist() == [0.0] * embedder.width
    assert vectors.norm(dim=1).tolist() == pytest.approx([1, 0, 1])


def test_what_the_encoder_cannot_read_is_cut_and_counted(embedder, caplog):
    long = np.arange(4, 104)
    vectors = embedder.embed_ids([long, long[:3]])
    assert torch.equal(vectors[0], embedder.embed_ids([long[: embedder.longest]])[0])
    assert embedder.longest == 63
    assert "1 of 2 chunks exceed 63 tokens" in caplog.text


def test_an_embedder_with_another_tokenizer_reads_the_text(tmp_path, build, encoder_folder, make_tokenizer):
    corpus = build(tmp_path, ["w1 w2 w3", "w4 w5"], until="tokenize")
    shuffled = make_tokenizer(300)  # its first 204 ids mean the same, so the vectors must be the same
    assert ChunkEmbedder(encoder_folder).tokenizer_sha256 == corpus.manifest.corpus["tokenizer"]["sha256"]
    other = ChunkEmbedder(encoder_folder, shuffled)
    assert other.tokenizer_sha256 != corpus.manifest.corpus["tokenizer"]["sha256"]
    chunks = corpus.tokens.between(0, 2).astype(np.int64)
    expected = [naive_vector(other, ids) for ids in ([5, 6, 7], [8, 9])]
    np.testing.assert_allclose(embed_chunks(corpus, chunks, other), expected, atol=2e-6)


def test_the_same_tokenizer_reads_the_ids_with_their_special_ones(tmp_path, build, embedder):
    corpus = build(tmp_path, ["w1 w2 w3", "w4 w5"], until="tokenize")
    chunks = corpus.tokens.between(0, 2).astype(np.int64)
    expected = [naive_vector(embedder, ids) for ids in ([2, 5, 6, 7, 3], [2, 8, 9, 3])]
    np.testing.assert_allclose(embed_chunks(corpus, chunks, embedder), expected, atol=2e-6)


def test_the_hash_of_weights_tells_models_apart(encoder_folder):
    model = BertModel.from_pretrained(encoder_folder)
    before = weights_hash(model)
    assert weights_hash(BertModel.from_pretrained(encoder_folder)) == before
    with torch.no_grad():
        model.encoder.layer[1].output.dense.bias[3] += 1e-6
    assert weights_hash(model) != before


def test_wrong_settings_are_refused_by_name(encoder_folder, make_tokenizer):
    with pytest.raises(ValueError, match='`pooling` must be "mean" or "cls", got \'max\''):
        EmbedderSettings("max")
    with pytest.raises(ValueError, match='`batch_size` must be "auto" or at least 1, got 0'):
        EmbedderSettings(batch_size=0)
    bare = make_tokenizer(200)
    bare.cls_token = None
    with pytest.raises(ValueError, match='`pooling` "cls" needs a first special token'):
        ChunkEmbedder(encoder_folder, bare, EmbedderSettings("cls"))
    bare.sep_token = None
    with pytest.raises(ValueError, match="`add_sep` needs a separator token"):
        ChunkEmbedder(encoder_folder, bare, EmbedderSettings(add_sep=True))
