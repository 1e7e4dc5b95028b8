"""Which files of a folder are text, and what is said of one that is not."""

import pytest

from graft.graphs.knowledge_graph.chunk_sources import read_chunks
from graft.text_files import read_utf8, text_files
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.named_texts import named_texts


def test_text_files_are_found_below_the_folder_in_order_and_folders_are_none(tmp_path):
    (tmp_path / "b" / "in.txt").mkdir(parents=True)
    for name in ("b/z.md", "a.TXT", "b/in.txt/c.text", "d.rst", "e.py", "f"):
        (tmp_path / name).write_text("text", encoding="utf-8")
    found = [path.relative_to(tmp_path).as_posix() for path in text_files(tmp_path)]
    assert found == ["a.TXT", "b/in.txt/c.text", "b/z.md", "d.rst"]
    assert [document.name for document in named_texts([str(tmp_path)])] == [str(tmp_path / name) for name in found]
    assert [chunk.document for chunk in read_chunks(tmp_path)] == found


def test_what_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("Gr\xfc\xdfe".encode("latin-1"))
    message = "File '.*a.txt' is no text in UTF-8: .*position 2"
    with pytest.raises(ValueError, match=message):
        read_utf8(tmp_path / "a.txt")
    with pytest.raises(ConfigurationError, match=message):
        named_texts([str(tmp_path)])
