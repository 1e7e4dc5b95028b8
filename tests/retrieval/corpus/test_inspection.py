"""The page of a corpus: chunks, what follows them, and their neighbours, as text that cannot become markup."""

from html import escape

from graft.retrieval.corpus.inspection import inspect_page, read_neighbours, read_passage


def test_the_page_shows_chunks_with_what_follows_and_their_neighbours(corpus, tmp_path):
    inner = next(c for c in range(len(corpus)) if read_passage(corpus, c).continuation)
    last = int(corpus.documents[1]) - 1
    assert not read_passage(corpus, last).continuation
    text = inspect_page(corpus, [inner, last], tmp_path / "page.html").read_text()
    assert "chunks of 8 tokens" in text
    for chunk in (inner, last):
        own, near = read_passage(corpus, chunk), read_neighbours(corpus, chunk)
        follows = f" ... {own.continuation}" if own.continuation else ""
        assert f"<h2>Chunk {chunk} of {escape(own.document)}</h2>\n<p>{escape(own.text + follows)}</p>" in text
        assert len(near) == 3
        for passage in near:
            cells = (f"{passage.distance:.4g}", f"{passage.chunk}", escape(passage.document), escape(passage.text))
            assert all(f">{cell}</td>" in text for cell in cells)


def test_a_corpus_without_neighbours_is_shown_as_far_as_it_is(build, tmp_path):
    bare = build(tmp_path / "bare", texts=["w1 w2 <b> w3"], until="tokenize")
    text = inspect_page(bare, [0], tmp_path / "page.html").read_text()
    assert "Chunk 0 of row:0" in text
    assert "<b>" not in text
    assert "what follows it</th>" not in text
