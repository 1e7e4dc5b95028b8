"""Files of plain text: which of a folder they are, and what is in one."""

from pathlib import Path

TEXT_SUFFIXES = (".md", ".rst", ".text", ".txt")
"""How the names of a folder's text files end, in capitals too."""


def text_files(folder: str | Path) -> list[Path]:
    """The text files in `folder` and below, in order of their paths."""
    return sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in TEXT_SUFFIXES and path.is_file())


def read_utf8(path: str | Path) -> str:
    """The text of a file.

    Raises:
        ValueError: it is not UTF-8; names the file.
        OSError: it cannot be opened.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"File {str(path)!r} is no text in UTF-8: {error}.") from error
