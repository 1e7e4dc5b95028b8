"""accelerate reads every file in configs/accelerate, and sharding that would not happen is refused."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

from graft.trainer.config_file import ConfigurationError, read_configuration
from graft.trainer.training_run import training_arguments

FILES = Path(__file__).parents[2] / "configs" / "accelerate"
TYPES = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED", "deepspeed_zero3": "DEEPSPEED"}


def test_there_is_a_file_for_each_way():
    assert {path.stem for path in FILES.glob("*.yaml")} == TYPES.keys()


@pytest.mark.parametrize("name", TYPES)
def test_accelerate_reads_the_file_and_knows_every_option_in_it(name):
    read = load_config_from_file(str(FILES / f"{name}.yaml"))
    assert read.distributed_type == DistributedType(TYPES[name])
    known = vars(launch_command_parser().parse_args(["script.py"]))
    options = [*(read.fsdp_config or {}), *(read.deepspeed_config or {})]
    assert [option for option in options if option not in known] == []
    if name.startswith("deepspeed"):
        assert read.deepspeed_config["zero_stage"] == int(name[-1])


@pytest.mark.parametrize("asked_by", ["file", "accelerate"])
def test_sharding_over_processes_of_a_cpu_is_refused(make_run, monkeypatch, asked_by):
    """accelerate would copy the model to each process, and say nothing."""
    config = str(make_run("causal"))
    if asked_by == "accelerate":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        configuration = read_configuration([config])
    else:
        with monkeypatch.context() as two_processes:
            two_processes.setenv("WORLD_SIZE", "2")
            configuration = read_configuration([config], ["--training.fsdp", "true"])
        assert configuration.training["fsdp"] is True
    with pytest.raises(ConfigurationError, match="shards over GPUs only, and this process has none"):
        training_arguments(configuration)
