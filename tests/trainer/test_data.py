"""From raw rows to a Trainer's rows: limits of each view, what is left out, and the cache."""

import logging

import datasets
import pytest
from datasets import Dataset

from graft.trainer import data as data_module
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.data import prepare_evaluation, prepare_training, row_counts, tokenizer_fingerprint

TEXT = "The cat number {} reads a long text, then answers."


@pytest.fixture
def raw():
    """Sources of 1 to 6 sentences; rows 2 and 3 share an id."""
    return Dataset.from_list(
        [
            {
                "source": " ".join([TEXT.format(i)] * (i + 1)),
                "target": f"cat {i}",
                "key": ["a", "b", "c", "c", "d", "e"][i],
            }
            for i in range(6)
        ]
    )


def test_training_sources_are_cut_to_the_configured_or_trained_length(raw, byte_tokenizer, configure):
    short = prepare_training(raw, byte_tokenizer, configure(max_source_length=12), 64)
    assert max(short["length"]) == 12
    trained = prepare_training(raw, byte_tokenizer, configure(), 30)
    assert max(trained["length"]) == 30
    assert row_counts(raw, trained) == {"rows": 6, "prepared": 6, "truncated": sum(trained["truncated"])}
    whole = prepare_training(raw, byte_tokenizer, configure(), None)
    assert not any(whole["truncated"])


def test_a_decoder_keeps_room_for_the_answer(raw, byte_tokenizer, configure):
    rows = prepare_training(raw, byte_tokenizer, configure("causal", max_target_length=10), 40)
    assert max(rows["length"]) <= 40
    assert any(rows["truncated"])


def test_full_reads_everything_truncated_what_training_reads_and_context_what_fits(
    raw, byte_tokenizer, configure, caplog
):
    configuration = configure(memory={}, max_source_length=20)
    lengths = {
        view: list(prepare_evaluation(raw, byte_tokenizer, configuration, view, 60)["length"])
        for view in ("full", "truncated", "context")
    }
    assert max(lengths["full"]) > 60
    assert lengths["truncated"] == [min(length, 20) for length in lengths["full"]]
    assert lengths["context"] == [length for length in lengths["full"] if length <= 60]
    assert "leaves out" in caplog.text
    limited = configure(memory={}, max_source_length=20, eval_max_source_length=50)
    for view in ("full", "context"):
        rows = prepare_evaluation(raw, byte_tokenizer, limited, view, 60)
        assert list(rows["length"]) == [min(length, 50) for length in lengths["full"]]


def test_evaluation_keeps_order_ids_and_all_references(byte_tokenizer, configure):
    raw = Dataset.from_list([{"source": "a cat", "target": ["x", "y"]}, {"source": "a dog", "target": ["z"]}])
    rows = prepare_evaluation(raw, byte_tokenizer, configure(), "truncated", 64)
    assert list(rows["id"]) == ["0", "1"]
    assert list(rows["references"]) == [["x", "y"], ["z"]]
    assert rows[0]["labels"] == byte_tokenizer("x")["input_ids"]


def test_duplicates_are_merged_in_evaluation_and_kept_in_training(raw, byte_tokenizer, configure):
    configuration = configure(id_column="key")
    rows = prepare_evaluation(raw, byte_tokenizer, configuration, "truncated", 64)
    assert list(rows["id"]) == ["a", "b", "c", "d", "e"]
    assert rows[2]["references"] == ["cat 2", "cat 3"]
    assert len(prepare_training(raw, byte_tokenizer, configuration, 64)) == 6
    kept = prepare_evaluation(raw, byte_tokenizer, configure(id_column="key", merge_duplicates=False), "truncated", 64)
    assert len(kept) == 6


def test_too_long_sources_are_cut_left_out_or_refused(raw, byte_tokenizer, configure):
    limit = {"max_source_length": 40, "eval_max_source_length": 40}
    kept = prepare_training(raw, byte_tokenizer, configure(on_too_long="skip", **limit), 64)
    whole = prepare_training(raw, byte_tokenizer, configure(), None)
    assert list(kept["id"]) == [row["id"] for row in whole if row["length"] <= 40]
    with pytest.raises(
        ConfigurationError, match="sources of the split train exceed 40 tokens, the first has the id '3'"
    ):
        prepare_training(raw, byte_tokenizer, configure(on_too_long="error", **limit), 64)
    with pytest.raises(ConfigurationError, match="sources of the split validation exceed 40 tokens"):
        prepare_evaluation(raw, byte_tokenizer, configure(on_too_long="error", **limit), "truncated", 64)
    with pytest.raises(ConfigurationError, match="No row of the split train is left"):
        prepare_training(raw, byte_tokenizer, configure(on_too_long="skip", max_source_length=4), 64)


def test_what_training_alone_cuts_does_not_count_as_too_long_in_evaluation(raw, byte_tokenizer, configure):
    configuration = configure(on_too_long="error", max_source_length=12)
    rows = prepare_evaluation(raw, byte_tokenizer, configuration, "truncated", 64)
    assert all(rows["truncated"])


def test_a_test_set_may_lack_its_targets(raw, byte_tokenizer, configure):
    without = raw.remove_columns("target")
    rows = prepare_evaluation(without, byte_tokenizer, configure(), "truncated", 64, split="test")
    assert "labels" not in rows.column_names
    assert "references" not in rows.column_names
    decoder = configure("causal", max_target_length=16)
    causal = prepare_evaluation(without, byte_tokenizer, decoder, "truncated", 64, split="test")
    assert "labels" not in causal.column_names
    with pytest.raises(ConfigurationError, match="The split validation has no column 'target'; it has source, key"):
        prepare_evaluation(without, byte_tokenizer, configure(), "truncated", 64)


def test_text_without_target_is_learnt_in_blocks_and_scored_at_its_end(raw, byte_tokenizer, configure):
    configuration = configure("causal", memory={"local_tokens": 6}, target_column=None, scored_tokens=5)
    blocks = prepare_training(raw, byte_tokenizer, configuration, 16)
    assert max(blocks["length"]) == 16
    assert len(blocks) > 6
    views = {
        v: prepare_evaluation(raw, byte_tokenizer, configuration, v, 1000) for v in ("full", "truncated", "context")
    }
    for number in range(6):
        labels = {v: [t for t in rows[number]["labels"] if t != -100] for v, rows in views.items()}
        assert labels["full"] == labels["truncated"] == labels["context"]
        assert len(labels["full"]) == 5
    assert set(views["truncated"]["length"]) == {11}
    assert list(views["full"]["length"]) == list(views["context"]["length"])
    assert "references" not in views["full"].column_names
    assert all(count > 0 for count in views["full"]["scored_bytes"])


def test_rows_with_nothing_to_remember_are_kept(byte_tokenizer, configure):
    raw = Dataset.from_list([{"source": "a cat"}] * 70 + [{"source": TEXT * 3}])  # more than one batch of the map
    configuration = configure("causal", memory={"local_tokens": 9}, target_column=None, scored_tokens=4)
    rows = prepare_evaluation(raw, byte_tokenizer, configuration, "full", 64)
    assert [len(memory) for memory in rows["memory_ids"]][:70] == [0] * 70
    assert len(rows[70]["memory_ids"]) > 0


def test_a_slow_tokenizer_cannot_score_text(raw, byte_tokenizer, configure):
    class Slow:
        is_fast = False

    configuration = configure("causal", target_column=None)
    with pytest.raises(ConfigurationError, match="needs the offsets of a fast tokenizer"):
        prepare_evaluation(raw, Slow(), configuration, "truncated", 64)


def test_lengths_beyond_the_trained_positions_are_refused(raw, byte_tokenizer, configure):
    with pytest.raises(ConfigurationError, match="`data.max_source_length` 65 exceeds the 64 positions"):
        prepare_training(raw, byte_tokenizer, configure(max_source_length=65), 64)
    with pytest.raises(
        ConfigurationError, match="`data.max_target_length` 64 leaves the source none of the 64 positions"
    ):
        prepare_training(raw, byte_tokenizer, configure("causal", max_target_length=64), 64)


def test_a_limit_without_room_is_the_users_mistake(raw, byte_tokenizer, configure):
    with pytest.raises(ConfigurationError, match="`data.max_source_length` 2 must exceed"):
        prepare_training(raw, byte_tokenizer, configure(max_source_length=2), 64)


def test_a_missing_prefix_column_is_named(raw, byte_tokenizer, configure):
    with pytest.raises(ConfigurationError, match="has no column 'question'; it has source, target, key"):
        prepare_training(raw, byte_tokenizer, configure(prefix_column="question"), 64)


def test_rows_left_out_for_an_empty_target_are_logged(byte_tokenizer, configure, caplog):
    raw = Dataset.from_list([{"source": "a cat", "target": "x"}, {"source": "a dog", "target": ""}])
    with caplog.at_level(logging.INFO):
        rows = prepare_training(raw, byte_tokenizer, configure(on_empty_target="skip"), 64)
    assert list(rows["id"]) == ["0"]
    assert "1 rows without a target are left out" in caplog.text


def test_a_tokenizer_has_one_fingerprint_however_it_is_used(tokenizers):
    before = {name: tokenizer_fingerprint(tokenizer) for name, tokenizer in tokenizers.items()}
    assert len(set(before.values())) == 3
    for tokenizer in tokenizers.values():
        tokenizer(["a cat", "a dog and more"], truncation=True, max_length=4, padding=True)
    assert {name: tokenizer_fingerprint(tokenizer) for name, tokenizer in tokenizers.items()} == before


def test_the_same_rows_are_tokenised_once_and_other_settings_again(
    raw, byte_tokenizer, configure, tmp_path, monkeypatch
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    raw.save_to_disk(tmp_path / "raw")
    calls = []
    original = data_module.tokenisation.seq2seq_rows

    def seq2seq_rows(batch, tokenizer, settings):
        calls.append(len(batch["source"]))
        return original(batch, tokenizer, settings)

    monkeypatch.setattr(data_module.tokenisation, "seq2seq_rows", seq2seq_rows)
    # Each call also tokenises one row to learn the columns.
    for limit, expected in ((12, [1, 6]), (12, [1]), (14, [1, 6])):
        rows = prepare_training(
            datasets.load_from_disk(tmp_path / "raw"), byte_tokenizer, configure(max_source_length=limit), 64
        )
        assert max(rows["length"]) == limit
        assert calls == expected
        calls.clear()
    prepare_training(
        datasets.load_from_disk(tmp_path / "raw"),
        byte_tokenizer,
        configure(max_source_length=14, overwrite_cache=True),
        64,
    )
    assert calls == [1, 6]


def test_two_processes_tokenise_as_one_does_and_report_the_same_mistake(byte_tokenizer, configure):
    raw = Dataset.from_list([{"source": TEXT.format(i), "target": f"cat {i}"} for i in range(80)])
    alone = prepare_training(raw, byte_tokenizer, configure(), 64)
    together = prepare_training(raw, byte_tokenizer, configure(num_proc=2), 64)
    assert together.to_list() == alone.to_list()
    broken = Dataset.from_list([*raw.to_list(), {"source": "a cat", "target": None}])
    with pytest.raises(
        ConfigurationError, match=r"Row 80 .id '80'. of the split train has an empty target in 'target'"
    ):
        prepare_training(broken, byte_tokenizer, configure(num_proc=2), 64)


def test_a_chat_becomes_prompt_and_answer(byte_tokenizer, configure):
    chat = [{"role": "user", "content": "reads the cat"}, {"role": "assistant", "content": "yes"}]
    raw = Dataset.from_list([{"messages": chat}])
    configuration = configure("causal", messages_column="messages", max_target_length=16)
    byte_tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    try:
        train = prepare_training(raw, byte_tokenizer, configuration, 64)
        rows = prepare_evaluation(raw, byte_tokenizer, configuration, "context", 64)
    finally:
        byte_tokenizer.chat_template = None
    assert byte_tokenizer.decode(train[0]["input_ids"]) == "user: reads the cat\nyes</s>"
    assert byte_tokenizer.decode(rows[0]["prompt_ids"]) == "user: reads the cat\n"
    assert rows[0]["references"] == ["yes"]
