"""What Griffe cannot know of our docstrings and classes, told to it while it loads them.

Docstrings say `store, index: ...` of options that share a line; the parser looks the whole `store, index` up in the
signature, so neither would get its type and its default. And transformers makes a dataclass of every config by itself,
without a decorator that could be seen.
"""

import re

from griffe import Class, Extension, Function, Object, Parameter, ParameterKind, Parameters

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


def constructor_of(config: Class) -> Function:
    """The `__init__` that transformers gives to a config: its annotated fields, by keyword."""
    fields = [
        Parameter(field.name, annotation=field.annotation, kind=ParameterKind.keyword_only, default=field.value)
        for field in config.members.values()
        if field.is_attribute and field.annotation is not None and "ClassVar" not in str(field.annotation)
    ]
    this = Parameter("self", annotation=None, kind=ParameterKind.positional_or_keyword, default=None)
    return Function("__init__", lineno=0, endlineno=0, parent=config, parameters=Parameters(this, *fields))


class OurOptions(Extension):
    """Gives every option its own line before a docstring is parsed, and a config of transformers its constructor."""

    def on_object(self, *, obj: Object, **kwargs: object) -> None:
        """Called for each object that was loaded."""
        if obj.docstring is not None:
            obj.docstring.value = one_line_each(obj.docstring.value)

    def on_class(self, *, cls: Class, **kwargs: object) -> None:
        """Called for each class that was loaded."""
        is_config = any(str(base).endswith("Config") for base in cls.bases)
        is_dataclass = any(str(decorator.value).partition("(")[0] == "dataclass" for decorator in cls.decorators)
        if is_config and not is_dataclass and "__init__" not in cls.members:
            cls.set_member("__init__", constructor_of(cls))
