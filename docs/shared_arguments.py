"""Docstrings say `store, index: ...` of options that share a line; the site needs one line for each.

Griffe's parser looks the whole `store, index` up in the signature, so neither would get its type and its default.
"""

import re

from griffe import Extension, Object

_SHARED = re.compile(r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+): (?P<text>.*)$")


def one_line_each(docstring: str) -> str:
    """The docstring with `a, b: text` as `b: as `a`.` behind `a: text`, and the text's further lines left with `a`."""
    lines: list[str] = []
    waiting: list[str] = []  # lines of the other names, until the text of the first one ends
    in_arguments = False
    depth = 0
    for line in docstring.splitlines():
        indent = len(line) - len(line.lstrip())
        if waiting and indent <= depth:
            lines += waiting
            waiting = []
        if line.strip() and indent == 0:
            in_arguments = line == "Args:"
        shared = _SHARED.match(line) if in_arguments else None
        if shared:
            first, *others = shared["names"].split(", ")
            depth = indent
            waiting = [f"{shared['indent']}{name}: as `{first}`." for name in others]
            line = f"{shared['indent']}{first}: {shared['text']}"
        lines.append(line)
    return "\n".join(lines + waiting)


class SharedArguments(Extension):
    """Gives every option of a docstring its own line before the docstring is parsed."""

    def on_object(self, *, obj: Object, **kwargs: object) -> None:
        """Called for each object that was loaded."""
        if obj.docstring is not None:
            obj.docstring.value = one_line_each(obj.docstring.value)
