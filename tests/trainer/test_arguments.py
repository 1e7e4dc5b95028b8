"""The blocks refuse what they cannot mean; test_every_field_acts.py tells what each option does."""

import pytest
from huggingface_hub.errors import StrictDataclassError

from graft.trainer.arguments import AdapterArguments, DataArguments, ModelArguments


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ModelArguments(task="causal"), "`name` must be a model's folder or id"),
        (lambda: DataArguments(num_proc=0), "`num_proc` must be at least 1, got 0"),
        (lambda: DataArguments(max_prefix_length=-1), "`max_prefix_length` must be at least 0, got -1"),
        (
            lambda: DataArguments(eval_during_training=1.5),
            "`eval_during_training` must be a number of rows or a share",
        ),
        (lambda: DataArguments(eval_during_training=0), "between 0 and 1, got 0"),
        (lambda: DataArguments(test_slice=[1]), r"`test_slice` must be \[start, end\], got \[1\]"),
        (lambda: DataArguments(eval_views=[]), "`eval_views` must name different views"),
        (lambda: DataArguments(eval_views=["full", "full"]), "`eval_views` must name different views"),
        (lambda: DataArguments(dataset="x", train="y"), "exclude each other"),
        (lambda: DataArguments(train="y", revision="main"), "`revision` belongs to `dataset`"),
        (lambda: DataArguments(dataset="x", splits={"dev": "a"}), r"`splits` maps train.*got \['dev'\]"),
        (lambda: AdapterArguments(r=0), "`r` must be at least 1, got 0"),
        (lambda: AdapterArguments(alpha=0), "`alpha` must be above 0, got 0"),
        (lambda: AdapterArguments(dropout=1.0), r"`dropout` must lie in \[0, 1\), got 1.0"),
    ],
)
def test_a_number_out_of_range_is_refused_with_its_name_and_value(build, message):
    with pytest.raises(StrictDataclassError, match=message):
        build()


def test_a_model_from_its_config_needs_no_name_but_a_tokenizer():
    assert ModelArguments(task="seq2seq", from_config=True, config="bart", tokenizer="train").name is None
    with pytest.raises(StrictDataclassError, match="`config` and `tokenizer` are given"):
        ModelArguments(task="seq2seq", from_config=True, config="bart")
