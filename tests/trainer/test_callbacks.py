import json

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from graft.trainer.callbacks import (
    GenerationSamples,
    LossCurve,
    Throughput,
    append_json_line,
    read_json_lines,
)


@pytest.fixture
def args(tmp_path):
    made = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    made.predict_with_generate = True
    return made


def test_a_resumed_run_forgets_what_was_logged_after_its_checkpoint(args, tmp_path):
    state, control, curve = TrainerState(), TrainerControl(), LossCurve()
    for step in range(1, 6):
        state.global_step = step
        curve.on_log(args, state, control, logs={"loss": 1 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a full disk
    state.global_step = 3
    curve.on_train_begin(args, state, control)
    assert [line["step"] for line in read_json_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_other_processes_write_nothing(args, tmp_path):
    state = TrainerState(is_world_process_zero=False, global_step=1)
    LossCurve().on_log(args, state, TrainerControl(), logs={"loss": 1.0})
    LossCurve().on_evaluate(args, state, TrainerControl())
    assert list(tmp_path.iterdir()) == []


def test_throughput_counts_steps_only(args):
    state, control, throughput = TrainerState(), TrainerControl(), Throughput()
    throughput.on_train_begin(args, state, control)
    throughput.on_step_begin(args, state, control)
    state.num_input_tokens_seen = 1000
    throughput.on_step_end(args, state, control)
    spent = throughput.seconds
    logs, evaluation = {"loss": 1.0}, {"eval_loss": 1.0}
    throughput.on_log(args, state, control, logs=evaluation)
    throughput.on_log(args, state, control, logs=logs)
    assert evaluation == {"eval_loss": 1.0}
    assert logs["tokens_per_second"] == pytest.approx(1000 / spent, rel=1e-3)
    assert logs["peak_memory_bytes"] > 10_000_000


def test_samples_are_the_first_middle_and_last_row_once_each(args, tmp_path):
    for row in range(7):
        line = {"id": f"r{row}", "prediction": f"p{row}", "references": ["x"], "seconds": 1.0}
        append_json_line(tmp_path / "predictions" / "eval_full-step-000010.jsonl", line)
    state = TrainerState(global_step=10)
    for _ in range(2):
        GenerationSamples().on_evaluate(args, state, TrainerControl())
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["r0", "r3", "r6"]
    assert set(lines[0]) == {"file", "id", "prediction", "references"}
