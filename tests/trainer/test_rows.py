"""Rows come under our names; what is missing is named by row and id."""

import pytest

from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.rows import ColumnSettings, check_columns, merged_duplicates, standard_rows


def test_columns_are_renamed_and_the_first_reference_trains():
    batch = {"text": ["a", "b"], "answers": [["x", "", "y"], "z"], "q": ["why", None], "key": [7, 8]}
    settings = ColumnSettings("train", "text", "answers", "q", "key", keeps_references=True)
    assert standard_rows(batch, [0, 1], settings) == {
        "id": ["7", "8"],
        "source": ["a", "b"],
        "prefix": ["why", ""],
        "target": ["x", "z"],
        "references": [["x", "y"], ["z"]],
    }


def test_without_an_id_column_the_row_number_is_the_id():
    assert standard_rows({"source": ["a"], "target": ["b"]}, [17], ColumnSettings("train"))["id"] == ["17"]


@pytest.mark.parametrize("empty", [None, "", "  ", [], [""], [None]])
def test_an_empty_target_is_refused_or_left_out(empty):
    batch = {"source": ["a", "b"], "target": ["x", empty], "key": ["first", "second"]}
    with pytest.raises(
        ConfigurationError, match=r"Row 17 .id 'second'. of the split test .*`data.on_empty_target: skip`"
    ):
        standard_rows(batch, [16, 17], ColumnSettings("test", id="key"))
    skipped = standard_rows(batch, [16, 17], ColumnSettings("test", id="key", skips_empty_target=True))
    assert skipped == {"id": ["first"], "source": ["a"], "target": ["x"]}


@pytest.mark.parametrize("empty", [None, "", " \n", 3])
def test_a_row_without_a_source_is_refused(empty):
    with pytest.raises(ConfigurationError, match="Row 4 .id '4'. of the split train has no text in 'source', got"):
        standard_rows({"source": [empty], "target": ["x"]}, [4], ColumnSettings("train"))


def test_of_a_chat_the_last_answer_is_the_target():
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    settings = ColumnSettings("train", messages="chat", target="chat")
    assert standard_rows({"chat": [chat]}, [0], settings) == {"id": ["0"], "messages": [chat[:1]], "target": ["hello"]}
    with pytest.raises(ConfigurationError, match="must end with the assistant's message, got one of 'user'"):
        standard_rows({"chat": [chat[:1]]}, [0], settings)
    with pytest.raises(ConfigurationError, match="must hold a list of messages"):
        standard_rows({"chat": [["hi"]]}, [0], settings)


def test_a_missing_column_lists_those_of_the_split():
    with pytest.raises(ConfigurationError, match="The split test has no column 'summary'; it has id, text. Name"):
        check_columns(["id", "text"], ColumnSettings("test", source="text", target="summary"))


def test_duplicates_keep_the_first_row_and_every_different_reference():
    rows, references = merged_duplicates(["a", "b", "a", "a"], [["x"], ["y"], ["z", "x"], ["x"]])
    assert rows == [0, 1]
    assert references == [["x", "z"], ["y"]]


def test_each_reference_trains_a_row_of_its_own_where_that_is_asked_for():
    settings = ColumnSettings(split="train", id="key", prefix="ask", repeats_references=True, skips_empty_target=True)
    batch = {"key": ["a", "b", "c"], "source": ["x", "y", "z"], "ask": ["?", "!", ""]}
    batch["target"] = [["one", "", "two"], [], "three"]
    rows = standard_rows(batch, [0, 1, 2], settings)
    assert rows["id"] == ["a", "a", "c"]
    assert rows["source"] == ["x", "x", "z"]
    assert rows["prefix"] == ["?", "?", ""]
    assert rows["target"] == ["one", "two", "three"]
