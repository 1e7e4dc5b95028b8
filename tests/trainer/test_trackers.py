"""Trackers run without an account, and one that is not installed is refused by name."""

import os

import pytest

from graft.trainer import trackers
from graft.trainer.config_file import from_dict
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.trackers import prepare_trackers
from graft.trainer.training_run import training_arguments


@pytest.fixture(autouse=True)
def nobody_logged_in(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: object())


def test_wandb_stays_on_this_machine_where_nobody_has_logged_in(installed):
    prepare_trackers(["tensorboard"])
    assert "WANDB_MODE" not in os.environ
    prepare_trackers(["wandb"])
    assert os.environ.pop("WANDB_MODE") == "offline"


def test_a_key_or_a_mode_of_the_user_is_left_alone(installed, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    prepare_trackers(["wandb"])
    assert "WANDB_MODE" not in os.environ
    (tmp_path / "netrc").write_text("machine elsewhere login user password key\n")
    monkeypatch.setenv("WANDB_API_KEY", "key")
    prepare_trackers(["wandb"])
    assert "WANDB_MODE" not in os.environ
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    prepare_trackers(["wandb"])
    assert os.environ["WANDB_MODE"] == "disabled"


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="`training.report_to` names 'trackio', .*: pip install trackio"):
        prepare_trackers(["trackio"])
    prepare_trackers([])


def test_a_run_is_named_as_its_folder_unless_it_is_named(blocks):
    blocks["training"] = {"output_dir": "runs/mine", "use_cpu": True, "report_to": "none"}
    assert training_arguments(from_dict(blocks)).run_name == "mine"
    blocks["training"]["run_name"] = "other"
    assert training_arguments(from_dict(blocks)).run_name == "other"
