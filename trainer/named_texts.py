"""The documents and questions that a command line names: texts, files, folders of text files, standard input."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from graft.text_files import TEXT_SUFFIXES, read_utf8, text_files
from graft.trainer.configuration_error import ConfigurationError


@dataclass(frozen=True)
class NamedText:
    """A document and what its sources are called: a file's path, or the first words of a text."""

    name: str
    text: str


def text_of(prompt: str) -> str:
    """The document that `prompt` names or is: a file, standard input for "-", or the text itself.

    Raises:
        ConfigurationError: a file that is not UTF-8, or what looks like a file's name and is none.
    """
    if prompt == "-":
        return sys.stdin.read()
    if _exists(prompt):
        return _content(Path(prompt))
    if not prompt.strip().count(" ") and "\n" not in prompt and (Path(prompt).suffix or "/" in prompt):
        raise ConfigurationError(f"{prompt!r} is no file; a text that is meant itself has spaces in it.")
    return prompt


def named_texts(prompts: Sequence[str]) -> list[NamedText]:
    """The documents of all `prompts`, each a folder or as `text_of` takes it; a folder's files by name.

    Raises:
        ConfigurationError: a folder without text files, a document without text, or as `text_of`.
    """
    found = []
    for prompt in prompts:
        if _exists(prompt, folder=True):
            files = text_files(prompt)
            if not files:
                raise ConfigurationError(f"Folder {prompt!r} holds no text file ({', '.join(TEXT_SUFFIXES)}).")
            found += [NamedText(str(path), _content(path)) for path in files]
        else:
            name = "standard input" if prompt == "-" else prompt if _exists(prompt) else f"{prompt[:30]!r}..."
            found.append(NamedText(name, text_of(prompt)))
    for document in found:
        if not document.text.strip():
            raise ConfigurationError(f"Document {document.name} has no text.")
    return found


def questions_in(path: Path) -> list[str]:
    """The questions of a file, one a line; empty lines are none.

    Raises:
        ConfigurationError: there is no such file, or no question in it.
    """
    if not path.is_file():
        raise ConfigurationError(f"`--questions` {str(path)!r} is no file.")
    questions = [line.strip() for line in _content(path).splitlines() if line.strip()]
    if not questions:
        raise ConfigurationError(f"`--questions` {str(path)!r} holds no question; it has one a line.")
    return questions


def _exists(prompt: str, folder: bool = False) -> bool:
    try:
        return Path(prompt).is_dir() if folder else Path(prompt).is_file()
    except (OSError, ValueError):  # too long for a name, or with a zero in it
        return False


def _content(path: Path) -> str:
    try:
        return read_utf8(path)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
