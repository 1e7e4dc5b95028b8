import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from graft.trainer.checkpoints import check_output_dir, differing_keys, incompleteness, last_complete_checkpoint
from graft.trainer.configuration_error import ConfigurationError


def write_checkpoint(folder, step):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    save_file({"weight": torch.arange(6.0)}, checkpoint / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (checkpoint / name).write_bytes(b"x")
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return checkpoint


def cut_weights(checkpoint):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def cut_header(checkpoint):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:20])


def miss_a_shard(checkpoint):
    index = {"weight_map": {"weight": "model.safetensors", "other": "model-00002-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))


def without(name):
    def remove(checkpoint):
        (checkpoint / name).unlink()

    return remove


DAMAGES = [
    (cut_weights, "shorter than its header"),
    (cut_header, "shorter than its header"),
    (miss_a_shard, "model-00002-of-00002.safetensors is missing"),
    (without("model.safetensors"), "no safetensors weights"),
    (without("optimizer.pt"), "optimizer.pt is missing"),
    (without("scheduler.pt"), "scheduler.pt is missing"),
    (without("rng_state.pth"), "rng_state.pth is missing"),
    (without("trainer_state.json"), "trainer_state.json is missing"),
    (lambda checkpoint: (checkpoint / "trainer_state.json").write_text('{"glo'), "trainer_state.json is missing"),
    (lambda checkpoint: (checkpoint / "checkpoint-is-incomplete.txt").touch(), "checkpoint-is-incomplete.txt"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_the_newest_complete_checkpoint_is_used_and_skipped_ones_are_logged(tmp_path, caplog, damage, reason):
    whole = write_checkpoint(tmp_path, 90)
    damage(write_checkpoint(tmp_path, 100))
    write_checkpoint(tmp_path, 8)
    (tmp_path / "checkpoint-final").mkdir()
    with caplog.at_level(logging.WARNING):
        assert last_complete_checkpoint(tmp_path) == whole
    assert "checkpoint-100" in caplog.text
    assert reason in caplog.text
    assert (tmp_path / "checkpoint-100").is_dir()


def test_a_whole_checkpoint_has_no_fault(tmp_path):
    assert incompleteness(write_checkpoint(tmp_path, 1)) is None


def test_a_run_killed_during_its_first_save_starts_anew(tmp_path, caplog):
    without("trainer_state.json")(write_checkpoint(tmp_path, 3))
    with caplog.at_level(logging.WARNING):
        assert last_complete_checkpoint(tmp_path) is None
    assert "checkpoint-3 is incomplete" in caplog.text


def test_no_checkpoint_is_none_and_only_partial_ones_are_an_error_that_says_why(tmp_path):
    assert last_complete_checkpoint(tmp_path / "absent") is None
    assert last_complete_checkpoint(tmp_path) is None
    cut_weights(write_checkpoint(tmp_path, 2))
    without("optimizer.pt")(write_checkpoint(tmp_path, 4))
    with pytest.raises(ConfigurationError, match="checkpoint-4: optimizer.pt.*checkpoint-2: model.safetensors is sho"):
        last_complete_checkpoint(tmp_path)


def test_a_folder_of_another_run_is_refused_with_the_keys_that_differ(tmp_path):
    mine = {"model": {"name": "a"}, "data": {"train": "x", "eval_views": ["full"]}, "training": {"max_steps": 1}}
    (tmp_path / "run.json").write_text(json.dumps({"configuration": mine}))
    check_output_dir(tmp_path, mine | {"training": {"max_steps": 2}})
    other = {"model": {"name": "b"}, "data": {"train": "x", "eval_views": ["full"]}, "adapter": {"r": 8}}
    with pytest.raises(ConfigurationError, match="model.name, adapter"):
        check_output_dir(tmp_path, other)
    assert differing_keys(mine, other) == ["model.name", "adapter"]


def test_fresh_needs_an_empty_folder(tmp_path):
    check_output_dir(tmp_path, {}, fresh=True)
    check_output_dir(tmp_path / "absent", {}, fresh=True)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigurationError, match="--fresh.*empty"):
        check_output_dir(tmp_path, {}, fresh=True)
