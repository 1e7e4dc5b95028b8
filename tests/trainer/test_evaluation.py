import json
import math

import numpy as np
import pytest

from graft.trainer.evaluation import Evaluation
from graft.trainer.metrics import exact_match


def evaluation(losses, **rows):
    losses = np.array(losses, dtype=np.float32)
    predictions = [f"text {n}" for n in range(len(losses))] if "references" in rows else None
    return Evaluation("eval_full", rows, losses, predictions, None, [0.5] * len(losses))


def test_means_weigh_tokens_and_not_rows():
    done = evaluation([[1.0, 1.0, 1.0], [5.0, -100.0, -100.0]], scored_bytes=[6, 2])
    done.score([], by_position=False)
    assert done.values["loss"] == pytest.approx(2.0)
    assert done.values["perplexity"] == pytest.approx(math.exp(2.0))
    assert done.values["bits_per_byte"] == pytest.approx(8 / math.log(2) / 8)
    assert done.per_sample["loss"] == [1.0, 5.0]


def test_loss_by_position_is_given_for_long_targets_only():
    short, long = evaluation(np.ones((2, 128))), evaluation(np.ones((2, 300)))
    for done in (short, long):
        done.score([], by_position=True)
    assert set(short.values) == {"loss", "perplexity"}
    assert {"loss_0_127", "loss_128_255", "loss_256_299"} < set(long.values)


def test_intervals_hold_the_value_and_shrink_with_more_rows():
    rng = np.random.default_rng(0)
    widths = []
    for rows in (10, 1000):
        done = evaluation(rng.exponential(size=(rows, 4)))
        done.score([], by_position=False)
        for name in ("loss", "perplexity"):
            low, high = done.interval(name)
            assert low < done.values[name] < high
        widths.append(np.subtract(*done.interval("loss")[::-1]))
    assert widths[1] < widths[0] / 3
    assert evaluation([[1.0]]).interval("loss") is None


def test_lines_hold_no_number_that_is_not_json(tmp_path):
    done = evaluation([[float("inf")], [1.0]], references=[["text 0"], ["b"]], id=["x", "y"])
    done.score([exact_match], by_position=False)
    done.write(tmp_path / "lines.jsonl")
    lines = [
        json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "lines.jsonl").read_text().splitlines()
    ]
    assert [line["scores"] for line in lines] == [
        {"loss": None, "exact_match": 100.0},
        {"loss": 1.0, "exact_match": 0.0},
    ]


def test_extremes_are_the_worst_then_the_best():
    done = evaluation([[float(n)] for n in range(20)], id=[f"r{n}" for n in range(20)])
    done.score([], by_position=False)
    assert [line.split(":")[0].strip() for line in done.extremes(2).splitlines()] == ["r19", "r18", "r1", "r0"]


def test_extremes_show_what_was_written_and_put_what_is_no_number_first():
    done = evaluation([[1.0], [float("inf")]], id=["x", "y"])
    done.score([], by_position=False)
    assert done.extremes() == "  y: loss not finite\n  x: loss 1"
    done = evaluation([[1.0], [2.0]], id=["x", "y"], references=[["text 0"], ["b"]])
    done.score([exact_match], by_position=False)
    assert done.extremes() == "  y: exact_match 0 'text 1'\n  x: exact_match 100 'text 0'"
