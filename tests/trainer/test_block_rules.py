"""Blocks that contradict each other, or that would do nothing, are refused with both names and the way out."""

import pytest

from graft.trainer import block_rules
from graft.trainer.block_rules import available_metric_names
from graft.trainer.config_file import ConfigurationError, from_dict

BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "metric_for_best_model": "eval_truncated_loss"}
GENERATES = {"predict_with_generate": True}


def changed(blocks, **changes):
    """The blocks with some options replaced; None removes a block or an option."""
    result = {name: dict(block) for name, block in blocks.items()}
    for name, block in changes.items():
        result[name] = result.get(name, {}) | block if isinstance(block, dict) else block
    return result


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"output_dir": None}}, "`training.output_dir` is missing"),
        ({"training": {"do_predict": True}}, "`training.do_predict` is true but there is no `data.test`"),
        ({"training": {"eval_strategy": "steps"}, "data": {"validation": None}}, "add `data.validation`"),
        ({"data": {"train": None, "validation": None}}, "The block `data` names no rows"),
        ({"training": {"fsdp": "full_shard"}}, "`training.fsdp` is 'full_shard' with one process"),
        ({"data": {"messages_column": "messages"}}, "`data.messages_column` is for `model.task` 'causal'"),
        ({"data": {"target_column": None}}, "`data.target_column` is null, but `model.task` 'seq2seq'"),
        (
            {"model": {"task": "causal"}, "data": {"target_column": None, "source_suffix": "?"}},
            "`data.source_suffix` is for rows with a target",
        ),
        (
            {"model": {"task": "causal"}, "data": {"target_column": None, "train_on_all_references": True}},
            "`data.train_on_all_references` would do nothing",
        ),
        (
            {"data": {"train_view": "chunked", "capture_raw_text": True, "train_on_all_references": True}},
            "`data.train_on_all_references` and `data.capture_raw_text` exclude each other",
        ),
        ({"model": {"attn_implementation": "someone/kernel"}}, "names a repository of code and is refused"),
        ({"data": {"eval_views": ["full"]}}, "there is no block `memory`: add it"),
        (
            {"model": {"task": "causal"}, "data": {"target_column": None}, "training": GENERATES},
            "scored by likelihood only",
        ),
        ({"generation": {"num_beams": 4}}, "The block `generation` would do nothing"),
        (
            {"generation": {"num_beams": 4, "temperature": 0.5}, "training": GENERATES},
            "Block `generation`:.*temperature",
        ),
        (
            {"metrics": ["rougeL"]},
            "`metrics` has no 'rougeL' .rougeL is a value of rouge.; there are bert_score, bits",
        ),
        ({"metrics": ["rouge"]}, "`metrics` holds 'rouge', which scores generated texts"),
        ({"metrics": [{"name": "rouge", "steps": 1}], "training": GENERATES}, "rouge has no option 'steps'"),
        ({"metrics": ["bits_per_byte"]}, "'bits_per_byte', which is for text without a target"),
        (
            {"training": {"early_stopping_patience": 2}},
            "`training.early_stopping_patience` needs `training.load_best_model_at_end`",
        ),
        ({"training": BEST | {"early_stopping_patience": 0}}, "must be at least 1, got 0"),
        ({"training": BEST | {"eval_strategy": "no"}}, "needs `training.eval_strategy` 'steps' or 'epoch'"),
        (
            {"training": BEST | {"metric_for_best_model": None}},
            "needs `training.metric_for_best_model`, one of eval_tr",
        ),
        (
            {"training": BEST | {"metric_for_best_model": "rougeL"} | GENERATES, "metrics": ["rouge"]},
            "must be one of .*eval_truncated_rougeL,.* got 'rougeL'",
        ),
        ({"training": {"hub_strategy": "all_checkpoints"}}, "would publish the optimizer's pickles"),
        ({"training": {"hub_strategy": "checkpoint"}}, "would publish the optimizer's pickles"),
    ],
)
def test_a_contradiction_is_refused_before_anything_is_loaded(blocks, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        from_dict(changed(blocks, **changes))


def test_pushing_needs_a_token(blocks, monkeypatch):
    monkeypatch.setattr(block_rules, "get_token", lambda: None)
    with pytest.raises(ConfigurationError, match="run `hf auth login`, or set HF_TOKEN"):
        from_dict(changed(blocks, training={"push_to_hub": True}))


def test_an_adapter_is_not_published_with_a_temporary_folder_as_its_base(blocks, monkeypatch, tmp_path):
    monkeypatch.setattr(block_rules, "get_token", lambda: "hf_token")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path.parent))
    pushed = changed(blocks, training={"push_to_hub": True}, adapter={}, model={"name": str(tmp_path)})
    with pytest.raises(ConfigurationError, match="a temporary folder nobody else has: set `adapter.base_model`"):
        from_dict(pushed)
    assert from_dict(changed(pushed, adapter={"base_model": "someone/base"})).adapter.base_model == "someone/base"


def test_the_names_for_the_best_model_follow_views_and_metrics(blocks):
    with_metrics = changed(
        blocks, training=GENERATES, memory={}, metrics=["f1"], data={"eval_views": ["full", "chunked", "context"]}
    )
    assert available_metric_names(from_dict(with_metrics)) == [
        "eval_full_loss",
        "eval_full_perplexity",
        "eval_full_f1",
        "eval_chunked_loss",
        "eval_chunked_perplexity",
        "eval_context_loss",
        "eval_context_perplexity",
        "eval_context_f1",
    ]
    text = changed(blocks, model={"task": "causal"}, data={"target_column": None})
    assert "eval_truncated_bits_per_byte" in available_metric_names(from_dict(text))
