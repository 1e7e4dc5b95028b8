"""Tables of the site that are read from the source, so that nobody copies them by hand.

A page says `<!-- table: NAME -->`; the site has the table there. Nothing of graft is imported for it: the lists are
literals, read as such.
"""

import ast
import configparser
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MARK = re.compile(r"^<!-- table: ([\w ]+) -->$", re.MULTILINE)


def literal(path: str, name: str) -> Any:
    """What the module at `path` assigns to `name`, without running it."""
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return ast.literal_eval(node.value)
    raise LookupError(f"{path} assigns nothing to {name}.")


def table(header: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    """Rows of two cells in Markdown."""
    return "\n".join(f"| {left} | {right} |" for left, right in [header, ("---", "---"), *rows])


def commands() -> str:
    """Each console script with the first sentence of its module."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    rows = []
    for line in setup["options.entry_points"]["console_scripts"].strip().splitlines():
        command, _, target = (part.strip() for part in line.partition("="))
        script = ROOT / "scripts" / f"{target.partition(':')[0].rpartition('.')[2]}.py"
        docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
        rows.append((f"`{command}`", " ".join(docstring.partition("\n\n")[0].split())))
    return table(("command", "what it does"), rows)


def metrics() -> str:
    """Each metric of generated texts with the names of its values."""
    values = literal("trainer/metrics.py", "METRIC_VALUES")
    return table(("metric", "values"), [(f"`{name}`", ", ".join(values[name])) for name in sorted(values)])


def names(which: str) -> Callable[[], str]:
    """Old names of options and what there is instead."""

    def rows() -> str:
        old = literal("trainer/old_names.py", which)
        return table(("old", "ours"), [(f"`{name}`", text) for name, text in sorted(old.items())])

    return rows


TABLES: dict[str, Callable[[], str]] = {
    "commands": commands,
    "metrics": metrics,
    "original names": names("_ORIGINAL"),
    "transformers names": names("_TRANSFORMERS"),
}


def on_page_markdown(markdown: str, **context: Any) -> str:
    """Called by MkDocs for each page: puts the tables in."""
    return MARK.sub(lambda mark: TABLES[mark[1]](), markdown)
