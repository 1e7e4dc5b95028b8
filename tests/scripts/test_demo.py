"""graft-demo without its page: files, frames, mistakes. test_demo_page.py drives the page."""

import sys

import pytest

from graft.scripts import demo


def test_a_dropped_file_is_text_of_a_known_kind(tmp_path):
    (tmp_path / "book.MD").write_text("# Café\n", encoding="utf-8")
    assert demo.text_of_file(str(tmp_path / "book.MD")) == "# Café\n"
    (tmp_path / "book.pdf").write_bytes(b"%PDF")
    with pytest.raises(ValueError, match=r"\.txt, \.md, \.rst, got 'book\.pdf'"):
        demo.text_of_file(str(tmp_path / "book.pdf"))
    (tmp_path / "book.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="utf-8"):
        demo.text_of_file(str(tmp_path / "book.txt"))


def test_the_frame_of_a_page_closes_nothing_and_runs_nothing():
    framed = demo.frame('<p title="x">\'</p></iframe><script>1</script>')
    assert framed.count("<") == 2  # the frame opens and closes
    assert framed.count('"') == 6
    assert " sandbox " in framed


def test_without_gradio_or_with_a_wrong_model_it_ends_with_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert demo.main(["nowhere"]) == 2
    assert capsys.readouterr().err == "graft-demo: needs gradio: pip install 'graft-transformers[demo]'\n"
    monkeypatch.setitem(sys.modules, "gradio", type(sys)("gradio"))
    assert demo.main(["nowhere/at-all"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("graft-demo: `model` 'nowhere/at-all' cannot be loaded")
