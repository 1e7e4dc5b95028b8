"""Files merge, overrides are typed, and each mistake gives one error that names the option and the way out."""

import copy
import json
import logging
import re

import pytest

from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.trainer.config_file import ConfigurationError, _all_paths, from_dict, read_configuration, to_dict
from graft.trainer.old_names import OLD_NAMES


@pytest.fixture
def write(tmp_path, blocks):
    """write(name, contents) -> path; without contents, the least configuration."""

    def writer(name="base.json", contents=None):
        path = tmp_path / name
        path.write_text(json.dumps(blocks if contents is None else contents))
        return path

    return writer


def error_of(*arguments):
    with pytest.raises(ConfigurationError) as caught:
        read_configuration(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_later_files_win_option_by_option_and_the_replaced_value_is_logged(write, caplog):
    more = {"data": {"train": "other.jsonl"}, "training": {"seed": 3}}
    with caplog.at_level(logging.INFO):
        configuration = read_configuration([write(), write("more.json", more)])
    assert configuration.data.train == "other.jsonl"
    assert configuration.data.validation == "validation.jsonl"
    assert configuration.training == {"output_dir": "out", "seed": 3}
    assert "`data.train` in" in caplog.text
    assert "replaces 'train.jsonl' by 'other.jsonl'" in caplog.text


def test_yaml_files_are_read_by_their_suffix(tmp_path, write):
    path = tmp_path / "more.yaml"
    path.write_text("training:\n  learning_rate: 1.0e-5\nmemory: {heads: [0, 6]}\n")
    configuration = read_configuration([write(), path])
    assert configuration.training["learning_rate"] == 1e-5
    assert configuration.memory.heads == [0, 6]


def test_overrides_are_typed_and_a_flat_stock_name_stands_for_training(write):
    overrides = "--learning_rate 1e-5 --data.max_source_length=7 --memory.heads [0,6] --data.train a.jsonl b.jsonl"
    flat = "--num-train-epochs 3 --model.config_overrides.d_model 16 --bf16 --model.name 2024"
    configuration = read_configuration([write()], [*overrides.split(), *flat.split()])
    assert configuration.training == {
        "output_dir": "out",
        "learning_rate": 1e-5,
        "num_train_epochs": 3,
        "bf16": True,
    }
    assert configuration.data.max_source_length == 7
    assert configuration.data.train == ["a.jsonl", "b.jsonl"]
    assert configuration.memory == UnlimiformerConfig(heads=[0, 6])
    assert configuration.model.config_overrides == {"d_model": 16}
    assert configuration.model.name == "2024"


def test_no_block_takes_it_away(write, blocks):
    path = write("full.json", blocks | {"memory": {"local_tokens": 8}, "adapter": {"r": 4}})
    assert read_configuration([path]).memory.local_tokens == 8
    configuration = read_configuration([path], ["--no-memory"])
    assert configuration.memory is None
    assert configuration.adapter.r == 4
    assert configuration.data.eval_views == ["truncated"]


def test_views_default_to_reading_the_memory_if_there_is_one(write):
    assert read_configuration([write()]).data.eval_views == ["truncated"]
    assert read_configuration([write()], ["--memory.sinks", "1"]).data.eval_views == ["full"]


def test_a_written_configuration_repeats_the_run(write, tmp_path):
    overrides = ["--memory.heads", "[1]", "--metrics", "rouge", '{"name": "chrf", "word_order": 2}']
    more = ["--predict_with_generate", "--generation.num_beams", "4", "--adapter.r", "2", "--eval_strategy", "steps"]
    best = [
        "--load_best_model_at_end",
        "--metric_for_best_model",
        "eval_full_chrf",
        "--training.early_stopping_patience=2",
    ]
    configuration = read_configuration([write()], [*overrides, *more, *best])
    assert from_dict(to_dict(configuration)) == configuration
    run = tmp_path / "run.json"
    run.write_text(json.dumps({"versions": {"graft": "0"}, "configuration": to_dict(configuration)}))
    assert read_configuration([run]) == configuration


def test_reading_leaves_the_given_blocks_alone(blocks):
    blocks["training"]["early_stopping_threshold"] = 0.5
    before = copy.deepcopy(blocks)
    assert from_dict(blocks).early_stopping_threshold == 0.5
    assert blocks == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["--data.scored_token", "3"],
            "`data.scored_token` on the command line is unknown; did you mean `data.scored_tokens`?",
        ),
        (["--data.keys_per_query", "0"], "did you mean `memory.keys_per_query`"),
        (["--learning_rat", "1"], "did you mean `training.learning_rate`"),
        (
            ["--zzzz", "1"],
            "there are the blocks model, data, memory, retrieval, graph, adapter, training, generation and the list",
        ),
        (
            ["--data.num_proc", "many"],
            "`data.num_proc` on the command line must be a whole number or null, got 'many'",
        ),
        (["--model.task", "both"], "`model.task` on the command line must be one of 'seq2seq', 'causal', got 'both'"),
        (["--training.bf16", "3"], "`training.bf16` on the command line must be true or false, got 3"),
        (["--data.num_proc", "0"], "`data.num_proc` must be at least 1, got 0."),
        (["--memory.overlap", "1"], "`memory.overlap` must lie in [0, 1), got 1."),
        (["--graph.sparse.rank", "0"], "`graph.sparse.rank` must be at least 1, got 0."),
        (["--graph.sparse.rnak", "8"], "`graph.sparse.rnak` is unknown; did you mean `graph.sparse.rank`?"),
        (["--graph.sparse.rank", "many"], "`graph.sparse.rank` expected int, got str (value: 'many')"),
        (["--graph.sparse", "[1]"], "`graph.sparse` must be of SparseGraphConfig, a dict of its fields or None"),
        (["--memory.overlap"], "`--memory.overlap` needs a value: a number."),
        (["--metrics", "[3]"], "`metrics` on the command line must be a list of names or of objects"),
        (["--model", "3"], "The block `model` on the command line must be an object"),
        (
            ["--adapter", '[{"r": 4}, {"type": "retrofit"}]'],
            "A run trains one adapter: fold a LoRA with `graft-merge`",
        ),
        (["stray"], "Expected an option such as"),
    ],
)
def test_a_wrong_name_type_or_value_is_told_in_one_line(write, overrides, message):
    assert message in error_of([write()], overrides)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("evaluation_strategy", "training.eval_strategy"),
        ("warmup_ratio", "training.warmup_steps"),
        ("group_by_length", "training.train_sampling_strategy: group_by_length"),
        ("overwrite_output_dir", "`--fresh`"),
        ("no_cuda", "training.use_cpu"),
        ("generation_num_beams", "generation.num_beams"),
        ("model_name_or_path", "model.name"),
        ("unlimiformer_head_num", "memory.heads"),
        ("hub_token", "HF_TOKEN"),
        ("enable_jit_checkpoint", "SIGTERM always"),
    ],
)
def test_an_old_name_is_answered_by_the_new_one_with_and_without_its_block(write, old, new):
    assert new in error_of([write()], [f"--{old}", "1"])
    assert f"is an old name; instead there is {OLD_NAMES[old]}." in error_of([write()], [f"--training.{old}", "1"])


ARGUMENTS_OF_THE_ORIGINAL = """
    model_name_or_path config_name tokenizer_name cache_dir use_fast_tokenizer model_revision drop_duplicates_in_eval
    dataset_name dataset_config_name data_dir train_file validation_file test_file input_column input_prefix_column
    output_column source_prefix max_source_length eval_max_source_length max_prefix_length max_target_length
    val_max_target_length pad_to_max_length max_train_samples max_eval_samples max_predict_samples test_start_ind
    test_end_ind num_beams length_penalty metric_names extra_metrics patience chunked_training_size oracle_training
    oracle_merge assign_zero_to_too_long_val_examples overwrite_cache download_mode preprocessing_num_workers
    preprocess_only pad_prefix ignore_pad_token_for_loss trim_very_long_strings evaluate_on_training_data
    shared_storage folder_suffix test_unlimiformer unlimiformer_training random_unlimiformer_training layer_begin
    layer_end unlimiformer_chunk_overlap unlimiformer_chunk_size unlimiformer_head_num unlimiformer_exclude
    use_datastore flat_index gpu_datastore gpu_index reconstruct_embeddings test_datastore unlimiformer_verbose
    eval_steps_override save_steps_override eval_fraction use_auth_token fp16_padding
"""


@pytest.mark.parametrize("old", ARGUMENTS_OF_THE_ORIGINAL.split())
def test_every_argument_of_the_original_is_answered_by_ours(write, old):
    message = error_of([write()], [f"--{old}", "1"])
    kept = re.search(r"did you mean `\w+\.(\w+)`", message)
    assert "is an old name; instead there is" in message or (kept and kept[1] == old), message


def test_a_new_name_in_an_answer_is_one_that_a_run_takes():
    for old, answer in OLD_NAMES.items():
        for path in re.findall(r"`(\w+\.\w+)", answer):
            versions = ("activation_checkpointing", "train_sampling_strategy")  # of newer ones of transformers
            assert path in _all_paths() or path.endswith((*versions, "activation_checkpointing_kwargs")), (old, path)


@pytest.mark.parametrize(
    ("contents", "path"),
    [
        ({"model": {"trust_remote_code": True}}, "model.trust_remote_code"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"model": {"config_overrides": {"trust_remote_code": True}}}, "model.config_overrides.trust_remote_code"),
        ({"training": {"trust": 1}}, "training.trust"),
    ],
)
def test_a_file_cannot_consent_to_running_code(write, contents, path):
    message = error_of([write(), write("evil.json", contents)])
    assert message.startswith(f"`{path}` in ")
    assert "the flag `--trust-remote-code`" in message


@pytest.mark.parametrize("metric", ["os:system", {"name": "package.module:function"}])
def test_a_file_cannot_name_a_function_as_metric(write, metric):
    assert "`--metric module:function`" in error_of([write(), write("evil.json", {"metrics": [metric]})])


def test_unreadable_files_are_named(tmp_path, write):
    assert "cannot be read" in error_of([tmp_path / "absent.json"])
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert "is not valid JSON" in error_of([broken])
    assert "must hold an object of blocks, got list" in error_of([write("list.json", [1])])


@pytest.mark.parametrize("missing", ["model", "data"])
def test_a_missing_block_is_named(blocks, missing):
    del blocks[missing]
    with pytest.raises(ConfigurationError, match=f"The block `{missing}` is missing"):
        from_dict(blocks)


def test_a_missing_required_option_is_named_with_its_choices(blocks):
    del blocks["model"]["task"]
    with pytest.raises(ConfigurationError, match="`model.task` is missing: one of 'seq2seq', 'causal'"):
        from_dict(blocks)
