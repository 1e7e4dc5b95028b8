"""Prefix, suffix and special tokens survive every cut, and every view scores the same tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.trainer.tokenisation import (
    IGNORED,
    TokenSettings,
    causal_evaluation_rows,
    causal_training_rows,
    join_source,
    lay_out,
    plain_ids,
    seq2seq_rows,
    special_tokens_around,
    text_blocks,
    text_evaluation_rows,
)

KINDS = ["byte_level", "unigram", "word_piece"]
VIEWS = ["full", "truncated", "context"]
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).filter(str.strip)
ids = st.lists(st.integers(0, 99), max_size=12)


def test_special_tokens_are_found_on_both_sides(tokenizers):
    assert special_tokens_around(tokenizers["byte_level"]) == ([0], [2])
    assert special_tokens_around(tokenizers["unigram"]) == ([], [1])
    assert special_tokens_around(tokenizers["word_piece"]) == ([], [])


@given(prefix=ids, source=ids, suffix=ids, before=ids, after=ids, limit=st.none() | st.integers(1, 60))
def test_a_cut_takes_from_the_end_of_the_source_only(prefix, source, suffix, before, after, limit):
    fixed = len(prefix) + len(suffix) + len(before) + len(after)
    if limit is not None and limit <= fixed:
        with pytest.raises(ValueError, match=rf"{limit} must exceed prefix, suffix and special tokens .{fixed}."):
            join_source((prefix, source, suffix), (before, after), limit)
        return
    joined, cut = join_source((prefix, source, suffix), (before, after), limit)
    kept = len(joined) - fixed
    assert joined == before + prefix + source[:kept] + suffix + after
    assert cut == (kept < len(source))
    assert len(joined) == (fixed + len(source) if not cut else limit)


@pytest.mark.parametrize("kind", KINDS)
@given(source=texts, prefix=texts, limit=st.integers(20, 40))
def test_seq2seq_rows_end_as_the_tokenizer_ends_them(tokenizers, kind, source, prefix, limit):
    tokenizer = tokenizers[kind]
    settings = TokenSettings(source_prefix="read: ", max_prefix_length=4, source_limit=limit, target_limit=5)
    rows = seq2seq_rows({"source": [source], "prefix": [prefix], "target": [source]}, tokenizer, settings)
    before, after = special_tokens_around(tokenizer)
    fixed, given_prefix = plain_ids(tokenizer, ["read: ", prefix])
    start = before + fixed + given_prefix[:4]
    row = rows["input_ids"][0]
    assert row[: len(start)] == start
    assert row[len(row) - len(after) :] == after
    assert len(row) == rows["length"][0] == sum(rows["attention_mask"][0]) <= limit
    body = row[len(start) : len(row) - len(after)]
    whole = plain_ids(tokenizer, ["\n\n" + source])[0]
    assert body == whole[: len(body)]
    assert rows["truncated"][0] == (len(body) < len(whole))
    assert rows["source_tokens"][0] == len(whole)
    assert len(rows["labels"][0]) <= 5
    assert rows["labels"][0][len(rows["labels"][0]) - len(after) :] == after


def test_without_a_prefix_an_uncut_row_is_what_the_tokenizer_itself_gives(tokenizers):
    text = "The cat reads a long text."
    for tokenizer in tokenizers.values():
        rows = seq2seq_rows({"source": [text], "target": [text]}, tokenizer, TokenSettings())
        assert rows["input_ids"][0] == rows["labels"][0] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
@given(source=texts, target=texts, limit=st.none() | st.integers(12, 30))
def test_causal_training_learns_the_answer_and_its_end_only(tokenizers, kind, source, target, limit):
    tokenizer = tokenizers[kind]
    settings = TokenSettings(source_suffix=" =>", source_limit=limit, target_limit=8)
    rows = causal_training_rows({"source": [source], "target": [target]}, tokenizer, settings)
    row, labels = rows["input_ids"][0], rows["labels"][0]
    answer = [label for label in labels if label != IGNORED]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    assert answer == plain_ids(tokenizer, [target])[0][: 8 - len(end)] + end
    assert row[len(row) - len(answer) :] == answer
    assert set(labels[: len(labels) - len(answer)]) <= {IGNORED}
    suffix = plain_ids(tokenizer, [" =>"])[0]
    prompt = row[: len(row) - len(answer)]
    assert prompt[len(prompt) - len(suffix) :] == suffix
    assert limit is None or len(prompt) <= limit


@pytest.mark.parametrize("kind", KINDS)
@given(source=texts, limit=st.integers(2, 9))
def test_blocks_tile_the_text_but_for_a_lone_last_token(tokenizers, kind, source, limit):
    tokenizer = tokenizers[kind]
    rows = text_blocks({"source": [source], "id": ["a"]}, tokenizer, TokenSettings(source_limit=limit))
    whole = tokenizer(source)["input_ids"]
    joined = [token for block in rows["input_ids"] for token in block]
    assert joined == whole[: len(joined)]
    assert len(whole) - len(joined) <= 1
    assert all(2 <= len(block) <= limit for block in rows["input_ids"])
    assert rows["labels"] == rows["input_ids"]
    assert rows["id"] == ["a"] * len(rows["input_ids"])


@given(before=st.lists(st.integers(0, 99), min_size=1, max_size=20), scored=ids, local=st.integers(1, 25))
def test_views_hide_different_tokens_and_score_the_same(before, scored, local):
    rows = {view: lay_out(before, scored, TokenSettings(local_tokens=local, view=view)) for view in VIEWS}
    for row in rows.values():
        assert row["input_ids"][len(row["input_ids"]) - len(scored) :] == scored
        assert row["labels"] == [IGNORED] * (len(row["input_ids"]) - len(scored)) + scored
    full = rows["full"]
    assert full["memory_ids"] + full["input_ids"] == before + scored == rows["context"]["input_ids"]
    assert rows["truncated"]["input_ids"] == full["input_ids"]
    assert len(full["input_ids"]) - len(scored) == min(local, len(before))
    assert "memory_ids" not in rows["truncated"]
    assert "memory_ids" not in rows["context"]


@pytest.mark.parametrize("kind", KINDS)
@given(source=texts, scored=st.integers(1, 30), local=st.integers(1, 30), limit=st.none() | st.integers(2, 40))
def test_texts_are_scored_at_the_same_tokens_in_every_view(tokenizers, kind, source, scored, local, limit):
    tokenizer = tokenizers[kind]
    whole = tokenizer(source)["input_ids"][:limit]
    rows = {
        view: text_evaluation_rows(
            {"source": [source]}, tokenizer, TokenSettings("", "", None, limit, 1, scored, local, view)
        )
        for view in VIEWS
    }
    if len(whole) < 2:
        assert all(view["input_ids"] == [] for view in rows.values())
        return
    expected = whole[max(len(whole) - scored, 1) :]
    for view in rows.values():
        assert [label for label in view["labels"][0] if label != IGNORED] == expected
        assert view["source_tokens"][0] == len(tokenizer(source)["input_ids"])
    assert rows["full"]["memory_ids"][0] + rows["full"]["input_ids"][0] == whole == rows["context"]["input_ids"][0]
    assert len({view["scored_bytes"][0] for view in rows.values()}) == 1


@given(source=texts, scored=st.integers(1, 80))
def test_scored_bytes_are_those_of_the_scored_text(byte_tokenizer, source, scored):
    rows = text_evaluation_rows({"source": [source]}, byte_tokenizer, TokenSettings(scored_tokens=scored, view="full"))
    labels = [label for label in rows["labels"][0] if label != IGNORED]
    text = byte_tokenizer.decode(labels, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if "\ufffd" in text:  # the first scored token lies inside a character, of which less than 4 bytes are unscored
        return
    assert rows["scored_bytes"][0] == len(text.encode())


@pytest.mark.parametrize("kind", KINDS)
@given(source=texts, target=texts, local=st.integers(1, 20), limit=st.integers(12, 30))
def test_answers_are_scored_at_the_same_tokens_in_every_view(tokenizers, kind, source, target, local, limit):
    tokenizer = tokenizers[kind]
    rows = {}
    for view in VIEWS:
        cut = limit if view == "truncated" else None
        settings = TokenSettings(" ", " =>", None, cut, 8, local_tokens=local, view=view)
        rows[view] = causal_evaluation_rows({"source": [source], "target": [target]}, tokenizer, settings)
        row = rows[view]
        assert row["prompt_ids"][0] + [t for t in row["labels"][0] if t != IGNORED] == row["input_ids"][0]
    answers = [[t for t in row["labels"][0] if t != IGNORED] for row in rows.values()]
    assert answers[0] == answers[1] == answers[2] != []
    full, context, truncated = (rows[view]["prompt_ids"][0] for view in ("full", "context", "truncated"))
    assert rows["full"]["memory_ids"][0] + full == context
    assert len(full) == min(local, len(context))
    assert len(truncated) <= limit
    assert truncated == context or rows["truncated"]["truncated"][0]


def test_prompts_without_targets_have_no_labels(byte_tokenizer):
    rows = causal_evaluation_rows({"source": ["a cat"]}, byte_tokenizer, TokenSettings(view="full"))
    assert "labels" not in rows
    assert rows["prompt_ids"] == rows["input_ids"]


def test_a_chat_is_written_by_its_template_and_cut_at_its_beginning(byte_tokenizer):
    byte_tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    try:
        batch = {"messages": [[{"role": "user", "content": "a long text"}]], "target": ["yes"]}
        whole = causal_training_rows(batch, byte_tokenizer, TokenSettings())
        cut = causal_training_rows(batch, byte_tokenizer, TokenSettings(source_limit=4))
    finally:
        byte_tokenizer.chat_template = None
    assert byte_tokenizer.decode(whole["input_ids"][0]) == "<s>user: a long text\nassistant:yes</s>"
    assert whole["truncated"] == [False]
    assert cut["truncated"] == [True]
    answer = 3 if cut["labels"][0][4:] == cut["input_ids"][0][4:] else 0
    assert answer
    assert cut["input_ids"][0] == whole["input_ids"][0][len(whole["input_ids"][0]) - len(cut["input_ids"][0]) :]


def test_a_limit_without_room_is_refused(byte_tokenizer):
    batch = {"source": ["a cat"], "target": ["a dog"]}
    with pytest.raises(
        ValueError, match="`data.max_source_length` 2 must exceed prefix, suffix and special tokens .2."
    ):
        seq2seq_rows(batch, byte_tokenizer, TokenSettings(source_limit=2))
    with pytest.raises(ValueError, match="`data.max_target_length` 2 must exceed the target's special tokens .2."):
        seq2seq_rows(batch, byte_tokenizer, TokenSettings(target_limit=2))
    with pytest.raises(
        ValueError, match="`data.max_source_length` must be at least 2 to cut texts into blocks, got None"
    ):
        text_blocks(batch, byte_tokenizer, TokenSettings())
