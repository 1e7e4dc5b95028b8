"""What cannot be read is named with its file, and its line where there are lines."""

import pytest

from graft.graphs.knowledge_graph.chunk_sources import read_chunks
from graft.scripts.build_knowledge_graph import aliases_in

LATIN = "Gr\xfc\xdfe".encode("latin-1")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("folder/a.txt", LATIN, "folder/a.txt' is no text in UTF-8"),
        ("a.txt", LATIN, "a.txt' is no text in UTF-8"),
        ("a.jsonl", b'{"text": "fine"}\n\nnot json\n', "a.jsonl, line 3: expected a JSON object"),
        ("a.jsonl", b'{"text": "' + LATIN + b'"}\n', "a.jsonl, line 1: expected a JSON object"),
        ("a.jsonl", b"[1]\n", "a.jsonl, line 1: expected a JSON object, got list"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_chunks((tmp_path / name).parent if "/" in name else tmp_path / name)


def test_a_line_of_json_may_hold_a_line_separator_of_unicode(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "One \u2028 line."}\n', encoding="utf-8")
    [chunk] = read_chunks(tmp_path / "a.jsonl")
    assert chunk.text == "One \u2028 line."


@pytest.mark.parametrize("content", ["a,b", "[]", '{"a": 1}'])
def test_aliases_that_are_none_are_refused(tmp_path, content):
    (tmp_path / "aliases").write_text(content)
    with pytest.raises(ValueError, match="`--aliases` .*aliases (is no JSON|must hold an object)"):
        aliases_in(tmp_path / "aliases")
