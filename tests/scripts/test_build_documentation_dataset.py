"""The script writes the data set, and tells a user's mistake in one line with exit code 2."""

import pytest

from graft.scripts import build_documentation_dataset as script


def test_it_writes_the_data_set_of_a_small_package(tmp_path, caplog):
    arguments = ["--output", str(tmp_path / "out"), "--packages", "accelerate", "--debian", str(tmp_path)]
    caplog.set_level("INFO")
    assert script.main([*arguments, "--least-document-words", "500"]) == 0
    assert (tmp_path / "out" / "documents-train.parquet").stat().st_size > 1000
    assert str(tmp_path / "out") in caplog.text


def test_a_foreign_folder_and_an_unknown_package_give_exit_code_2(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert script.main(["--output", str(tmp_path)]) == 2
    assert "is no documentation data set" in capsys.readouterr().err
    assert script.main(["--output", str(tmp_path / "new"), "--packages", "no_such_package_here"]) == 2
    assert "None of the packages no_such_package_here is installed" in capsys.readouterr().err


def test_an_unknown_option_gives_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(["--outpt", "x"])
    assert stopped.value.code == 2
