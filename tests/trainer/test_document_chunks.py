"""Chunks against a loop written from the specification: what each covers, what stands around it, and its text."""

import logging

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from graft.compat.unlimiformer import chunk_dataset_function
from graft.trainer.block_rules import check_blocks
from graft.trainer.config_file import from_dict
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.data import prepare_evaluation, prepare_training, row_counts
from graft.trainer.document_chunks import TEXT_COLUMNS, chunk_dataset, chunk_spans, keep_chunk_texts

KINDS = ["byte_level", "unigram", "word_piece"]
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=80).map(lambda text: f"cat {text}")
sentences = st.lists(st.sampled_from(["The cat", " reads", "  a long\n", "é", "☃", " text."]), max_size=30).map(
    "".join
)


def special_ids(tokenizer):
    """What `build_inputs_with_special_tokens` would put around, found by encoding an empty text."""
    return {"byte_level": ([0], [2]), "unigram": ([], [1]), "word_piece": ([], [])}[tokenizer]


def naive_chunks(ids, prefix, around, chunk_size, overlap, least):
    """Rules 1 to 3, one chunk after the other."""
    before, after = around
    body = chunk_size - len(before) - len(after) - len(prefix)
    rows, index = [], 0
    while True:
        start = index * (body - overlap)
        rows.append(ids[start : start + body])
        if start + body >= len(ids):
            break
        index += 1
    if len(rows) > 1 and len(rows[-1]) < least:
        rows.pop()
    return [before + prefix + row + after for row in rows]


@pytest.mark.parametrize("kind", KINDS)
@given(
    source=texts | sentences.filter(str.strip),
    prefix=st.sampled_from(["", "cat?", "a long text: "]),
    room=st.integers(1, 12),
    overlap=st.integers(0, 11),
    least=st.integers(0, 12),
)
def test_chunks_equal_the_loop_written_from_the_rules(tokenizers, kind, source, prefix, room, overlap, least):
    tokenizer, around = tokenizers[kind], special_ids(kind)
    prefix_ids = tokenizer(prefix, add_special_tokens=False)["input_ids"]
    fixed = len(prefix_ids) + len(around[0]) + len(around[1])
    batch = {"source": [source], "question": [prefix], "target": ["x"]}
    sizes = {"chunk_size": fixed + room, "chunk_overlap": overlap, "min_chunk_tokens": least}
    if overlap >= room:
        with pytest.raises(ValueError, match=rf"`chunk_overlap` must lie in \[0, {room}\), got {overlap}"):
            chunk_dataset(batch, tokenizer, **sizes, prefix_column="question")
        return
    rows = chunk_dataset(batch, tokenizer, **sizes, prefix_column="question")
    ids = tokenizer(source, add_special_tokens=False)["input_ids"]
    expected = naive_chunks(ids, prefix_ids, around, fixed + room, overlap, least)
    assert rows["input_ids"] == expected
    assert rows["length"] == [len(row) for row in expected] == [sum(mask) for mask in rows["attention_mask"]]
    assert max(rows["length"]) <= fixed + room
    assert rows["chunk_index"] == list(range(len(expected)))
    assert set(rows["chunk_count"]) == {len(expected)}
    assert rows["target"] == ["x"] * len(expected)
    covered = {i for start, end in chunk_spans(len(ids), room, overlap, least) for i in range(start, end)}
    assert rows["dropped_tokens"] == [len(ids) - len(covered)] * len(expected)


@pytest.mark.parametrize("kind", KINDS)
@given(source=texts | sentences.filter(str.strip), room=st.integers(1, 9), overlap=st.integers(0, 8))
def test_captured_texts_are_spans_that_tile_the_source_and_agree_with_the_tokens(
    tokenizers, kind, source, room, overlap
):
    tokenizer, (before, after) = tokenizers[kind], special_ids(kind)
    overlap = overlap % room
    size = room + len(before) + len(after)
    rows = chunk_dataset({"source": [source]}, tokenizer, size, overlap, 0, capture_raw_text=True)
    whole = tokenizer(source, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    spans = list(zip(rows["chunk_start"], rows["chunk_end"], strict=True))
    assert rows["raw_text_chunks"] == [source[start:end] for start, end in spans]
    if overlap == 0:
        assert "".join(rows["raw_text_chunks"]) == source
        assert [end for _, end in spans[:-1]] == [start for start, _ in spans[1:]]
    assert (spans[0][0], spans[-1][1]) == (0, len(source))
    for number, offsets in enumerate(rows["token_offsets"]):
        inner = offsets[len(before) : len(offsets) - len(after)]
        assert offsets == [[-1, -1]] * len(before) + inner + [[-1, -1]] * len(after)
        first = number * (room - overlap)
        assert [tuple(pair) for pair in inner] == whole[first : first + room]
        assert all(start >= spans[number][0] for start, _ in inner)


def test_a_character_of_several_tokens_stays_whole(byte_tokenizer):
    source = "☃☃☃"  # three bytes each, none of them merged
    rows = chunk_dataset({"source": [source]}, byte_tokenizer, 4, 0, 0, capture_raw_text=True)
    assert "".join(rows["raw_text_chunks"]) == source
    assert len(rows["input_ids"]) > 3
    assert all(len(text) <= 1 for text in rows["raw_text_chunks"])


def test_the_originals_rows_but_for_the_only_chunk(word_tokenizer_ids, tokenizers):
    """25 tokens cut by 16: the original drops the tail of 9 and a whole document of 7; ours keeps an only chunk."""
    long, short = word_tokenizer_ids
    rows = chunk_dataset({"source": [long, short]}, tokenizers["word_piece"], 16)
    assert rows["length"] == [16, 7]
    assert rows["dropped_tokens"] == [9, 0]


@pytest.fixture
def word_tokenizer_ids(tokenizers):
    texts = [" ".join(["cat"] * 25), " ".join(["cat"] * 7)]
    assert [len(ids) for ids in tokenizers["word_piece"](texts)["input_ids"]] == [25, 7]
    return texts


def test_a_dataset_is_numbered_through_and_its_lost_tails_are_counted(tokenizers, caplog):
    rows = [{"source": " ".join(["cat"] * (20 if i == 7 else 5)), "topic": f"t{i}"} for i in range(1100)]
    with caplog.at_level(logging.INFO):
        chunks = chunk_dataset(Dataset.from_list(rows), tokenizers["word_piece"], 11, capture_raw_text=True)
    assert list(chunks["document_id"]) == [str(i) for i in range(1100)]
    assert list(chunks["topic"]) == [f"t{i}" for i in range(1100)]
    assert chunks[7]["dropped_tokens"] == 9
    assert "1 documents lost a tail" in caplog.text
    assert "source" not in chunks.column_names
    named = chunk_dataset(Dataset.from_list([{"source": "cat", "id": "a"}]), tokenizers["word_piece"], 4)
    assert list(named["document_id"]) == ["a"]


def test_processes_cut_as_one_does_and_tell_the_documents_apart(byte_tokenizer):
    raw = Dataset.from_dict({"source": [f"cat {i} " * 20 for i in range(12)], "topic": list("abcdefghijkl")})
    given = {"tokenizer": byte_tokenizer, "chunk_size": 24, "capture_raw_text": True}
    expected = chunk_dataset(raw, **given)
    mapping = {"batched": True, "batch_size": 4, "num_proc": 2, "remove_columns": raw.column_names}
    mapped = raw.map(chunk_dataset_function, **mapping, fn_kwargs=given)
    for name in set(expected.column_names) - {"document_id"}:
        assert list(mapped[name]) == list(expected[name]), name
    groups = [dict.fromkeys(zip(rows["document_id"], rows["topic"], strict=True)) for rows in (mapped, expected)]
    assert len(groups[0]) == len({name for name, _ in groups[0]}) == len(groups[1]) == 12
    with pytest.raises(ValueError, match="needs `batched=True`"):
        raw.map(chunk_dataset, fn_kwargs=given)


class SlowTokenizer:
    """Wraps a tokenizer and has no offsets."""

    is_fast = False

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, *arguments, **options):
        return self.tokenizer(*arguments, **options)


def test_mistakes_name_what_is_allowed(byte_tokenizer):
    batch = {"source": ["cat"], "question": ["The cat"]}
    length = len(byte_tokenizer("The cat")["input_ids"])
    with pytest.raises(ValueError, match=rf"`chunk_size` 2 must exceed prefix and special tokens .{length}."):
        chunk_dataset(batch, byte_tokenizer, 2, prefix_column="question")
    with pytest.raises(ValueError, match="no column 'text'; there are source, question"):
        chunk_dataset(batch, byte_tokenizer, 8, source_column="text")
    with pytest.raises(ValueError, match="needs the offsets of a fast tokenizer, got SlowTokenizer"):
        chunk_dataset(batch, SlowTokenizer(byte_tokenizer), 8, capture_raw_text=True)
    assert chunk_dataset(batch, SlowTokenizer(byte_tokenizer), 8)["input_ids"]


def test_an_empty_text_is_refused_where_nothing_would_stand_in_its_row(tokenizers):
    assert chunk_dataset({"source": [""]}, tokenizers["byte_level"], 8)["input_ids"] == [[0, 2]]
    with pytest.raises(ValueError, match="has no token"):
        chunk_dataset({"source": [""]}, tokenizers["word_piece"], 8)


# The training view ---------------------------------------------------------------------------------------------------

TEXT = "The cat number {} reads a long text, then answers."


@pytest.fixture
def raw():
    return Dataset.from_list(
        [{"source": " ".join([TEXT.format(i)] * (3 * i + 1)), "target": f"cat {i}", "ask": "a cat"} for i in range(4)]
    )


def test_an_encoder_decoders_chunks_all_learn_the_target(raw, byte_tokenizer, configure):
    rows = prepare_training(raw, byte_tokenizer, configure(train_view="chunked", chunk_size=24), 64)
    expected = chunk_dataset(raw, byte_tokenizer, 24)
    assert list(rows["input_ids"]) == list(expected["input_ids"])
    assert list(rows["id"]) == list(rows["document_id"]) == list(expected["document_id"])
    labels = {str(i): byte_tokenizer(f"cat {i}")["input_ids"] for i in range(4)}
    assert list(rows["labels"]) == [labels[name] for name in rows["id"]]
    assert row_counts(raw, rows)["truncated"] == len({r["document_id"] for r in expected if r["dropped_tokens"]})


def test_prefix_and_suffix_stand_around_every_chunk(raw, byte_tokenizer, configure):
    fixed = {"source_prefix": "read: ", "source_suffix": " then?", "prefix_column": "ask", "chunk_size": 48}
    rows = prepare_training(raw, byte_tokenizer, configure(train_view="chunked", **fixed), 64)
    assert len(rows) > 8
    assert max(rows["length"]) <= 48
    for row in rows:
        text = byte_tokenizer.decode(row["input_ids"])
        assert text.startswith("<s>read: a cat\n\n")
        assert text.endswith(" then?</s>")


def test_a_decoder_reads_a_chunk_and_answers(raw, byte_tokenizer, configure):
    options = {"train_view": "chunked", "chunk_size": 20, "max_target_length": 12}
    rows = prepare_training(raw, byte_tokenizer, configure("causal", **options), 64)
    for row in rows:
        learnt = [token for token in row["labels"] if token != -100]
        assert byte_tokenizer.decode(learnt) == f"cat {row['id']}</s>"
        assert row["input_ids"][len(row["input_ids"]) - len(learnt) :] == learnt
        assert len(row["input_ids"]) - len(learnt) <= 20


def test_a_text_is_learnt_once_however_chunks_overlap(raw, byte_tokenizer, configure):
    options = {"train_view": "chunked", "chunk_size": 20, "chunk_overlap": 5, "min_chunk_tokens": 0}
    rows = prepare_training(raw, byte_tokenizer, configure("causal", target_column=None, **options), 64)
    for number, source in enumerate(raw["source"]):
        learnt = [t for r in rows if r["id"] == str(number) for t in r["labels"] if t not in (-100, 0, 2)]
        assert learnt == byte_tokenizer(source, add_special_tokens=False)["input_ids"]


def test_captured_texts_are_written_and_leave_the_rows(raw, byte_tokenizer, configure, tmp_path):
    configuration = configure(train_view="chunked", chunk_size=24, capture_raw_text=True, min_chunk_tokens=0)
    rows = prepare_training(raw, byte_tokenizer, configuration, 64)
    kept = keep_chunk_texts(rows, tmp_path / "chunks.parquet")
    assert not set(TEXT_COLUMNS) & set(kept.column_names)
    written = Dataset.from_parquet(str(tmp_path / "chunks.parquet"), cache_dir=str(tmp_path / "cache"))
    for number, source in enumerate(raw["source"]):
        assert "".join(r["raw_text_chunks"] for r in written if r["document_id"] == str(number)) == source


def test_chunks_beyond_the_trained_length_are_refused(raw, byte_tokenizer, configure):
    with pytest.raises(ConfigurationError, match="`data.chunk_size` 65 exceeds the 64 tokens"):
        prepare_training(raw, byte_tokenizer, configure(train_view="chunked", chunk_size=65), 64)
    with pytest.raises(ConfigurationError, match="`chunk_overlap` must lie in"):
        prepare_training(raw, byte_tokenizer, configure(train_view="chunked", chunk_overlap=63), 64)
    rows = prepare_training(raw, byte_tokenizer, configure(train_view="chunked"), 64)
    assert max(rows["length"]) == 64


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"chunk_size": 64}, "`data.chunk_size` would do nothing: it is for `data.train_view` 'chunked'"),
        ({"capture_raw_text": True}, "`data.capture_raw_text` would do nothing"),
        ({"train_view": "chunked", "max_source_length": 64}, "set `data.chunk_size` instead"),
    ],
)
def test_options_that_contradict_the_view_are_refused(blocks, data, message):
    with pytest.raises(ConfigurationError, match=message):
        check_blocks(from_dict(blocks | {"data": blocks["data"] | data}))


@pytest.mark.parametrize("task", ["seq2seq", "causal"])
def test_documents_are_evaluated_in_the_chunks_they_are_learnt_in(byte_tokenizer, configure, task):
    text = "The cat reads a long text, then answers. " * 5
    raw = Dataset.from_list([{"source": text, "target": ["an answer", "other"]}, {"source": "short", "target": ["b"]}])
    options = {"chunk_size": 30, "chunk_overlap": 4, "max_target_length": 12}
    learnt = prepare_training(raw, byte_tokenizer, configure(task, train_view="chunked", **options), 64)
    configuration = configure(task, eval_views=["chunked"], **options)
    rows = prepare_evaluation(raw, byte_tokenizer, configuration, "chunked", 64)
    assert len(rows) > 2
    for name in learnt.column_names:
        assert list(rows[name]) == list(learnt[name])
    assert list(rows["references"])[0] == ["an answer", "other"]
    assert "prompt_ids" not in rows.column_names


def test_chunks_without_a_target_to_score_are_refused(configure):
    with pytest.raises(ConfigurationError, match="`data.eval_views` 'chunked' scores the target behind each chunk"):
        configure("causal", eval_views=["chunked"], target_column=None)
    with pytest.raises(ConfigurationError, match="`data.eval_views` 'chunked' cuts texts, not chats"):
        configure("causal", eval_views=["chunked"], messages_column="messages")
    with pytest.raises(ConfigurationError, match="`data.capture_raw_text` would do nothing"):
        configure(eval_views=["chunked"], capture_raw_text=True)
