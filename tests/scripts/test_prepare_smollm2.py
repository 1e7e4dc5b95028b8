"""The script says where the model lies, and tells a user's mistake in one line with exit code 2."""

from graft.atomic_files import write_manifest
from graft.scripts import prepare_smollm2 as script
from graft.trainer.pretrained import KIND


def test_a_complete_folder_is_success_at_once(tmp_path, caplog):
    write_manifest(tmp_path, {"kind": KIND})
    caplog.set_level("INFO")
    assert script.main(["--output", str(tmp_path)]) == 0
    assert f"SmolLM2-135M-Instruct is in {tmp_path}" in caplog.text


def test_a_foreign_folder_gives_exit_code_2(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert script.main(["--output", str(tmp_path)]) == 2
    assert "choose another folder" in capsys.readouterr().err
