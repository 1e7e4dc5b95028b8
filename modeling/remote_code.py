"""Writes the self-contained folder that `trust_remote_code=True` loads where graft is not installed.

transformers' loader wants one flat folder: the model's file, and beside it every file reached by relative imports that
begin a line as `from .name import X`. Our files live in packages and import as `from ..package.name import X`. So
the modules reachable from a model are found in their syntax trees, copied flat and only their relative imports are
rewritten. Whatever the loader would stumble over is refused while saving, where its author still sees it.

This file is copied along: a class that was loaded from such a folder saves its code again.
"""

import ast
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import transformers
from transformers import PreTrainedModel
from transformers.utils import import_utils

from ..atomic_files import write_text

# What may be imported unguarded: what transformers cannot be installed without, and the standard library.
ALWAYS_INSTALLED = frozenset({"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "tqdm"})

_HEADER = "# Part of "
# The loader finds relative imports in the text with these, so we must agree with it about what it finds.
_LOADER_IMPORTS = (r"^\s*import\s+\.(\S+)\s*$", r"^\s*from\s+\.(\S+)\s+import")

if TYPE_CHECKING:
    _Model = PreTrainedModel
else:
    _Model = object


class SavesItsCode(_Model):
    """Makes `save_pretrained` and `push_to_hub` of a model write its source code next to the weights.

    Goes before the model in the list of bases: `class RetroForCausalLM(SavesItsCode, LlamaForCausalLM)`.

    Attributes:
        auto_classes: names of transformers' Auto classes that shall load the model, such as "AutoModelForCausalLM".
    """

    auto_classes: ClassVar[tuple[str, ...]]

    def save_pretrained(
        self, save_directory: str | os.PathLike[Any], is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Save as the stock model does, and the code that loads the folder; takes the same arguments.

        Raises:
            ValueError: the code cannot be saved so that it loads elsewhere; nothing has been written then.
        """
        if is_main_process:
            write_remote_code(self, save_directory, self.auto_classes)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)

    def _get_files_timestamps(self, working_dir: str | os.PathLike[Any]) -> dict[str, float]:
        # With push_to_hub=True the stock method uploads what is newer than these times, and our code is already there.
        times: dict[str, float] = super()._get_files_timestamps(working_dir)
        return {name: time for name, time in times.items() if not name.endswith(".py")}


def write_remote_code(
    model: PreTrainedModel, folder: str | os.PathLike[Any], auto_classes: Sequence[str]
) -> list[Path]:
    """Write the source of `model` flat into `folder` and name it in `model.config.auto_map`.

    The config itself is not written: save it afterwards.

    Args:
        model: its class and the class of its config are defined in modules with a file, not in a script.
        folder: made if absent; each file there is replaced in one step.
        auto_classes: Auto classes that shall load the model; AutoConfig is added.

    Returns:
        The files written, sorted by name.

    Raises:
        ValueError: an Auto class is unknown, or `flat_source` refuses; nothing has been written then.
    """
    # FSDP puts a class of its own making before the model's.
    model_class = next(of_class for of_class in type(model).__mro__ if not of_class.__module__.startswith("torch."))
    config_class = type(model.config)
    if unknown := [
        name for name in auto_classes if not (name.startswith("AutoModel") and hasattr(transformers, name))
    ]:
        raise ValueError(f"`auto_classes` must name transformers' AutoModel classes, got {unknown}.")
    if not auto_classes:
        raise ValueError("`auto_classes` must name at least one of transformers' AutoModel classes, got none.")
    source = flat_source(model_class.__module__, config_class.__module__)
    model.config.auto_map = {"AutoConfig": _reference(config_class)} | {
        name: _reference(model_class) for name in auto_classes
    }
    return [write_text(Path(folder) / f"{name}.py", text) for name, text in sorted(source.items())]


def flat_source(*module_names: str) -> dict[str, str]:
    """Return the text of each module reachable by relative imports, ready to lie in one folder, by its file's name.

    Args:
        module_names: full names of modules to start from, e.g. "graft.modeling.retro.modeling_retro".

    Raises:
        ValueError: a module has no source file; two share a name, or one is called like a standard module or like a
            transformers module that it imports; an import cannot work in the folder, or needs a package that may
            be absent there; what was written does not compile.
    """
    found: dict[str, tuple[str, str]] = {}  # flat name -> full name, flat text
    waiting = list(module_names)
    while waiting:
        full_name = waiting.pop()
        flat_name = full_name.rpartition(".")[2]
        known_name, known_text = found.get(flat_name, (None, None))
        if known_name == full_name:
            continue
        text, imported = _flatten(_read_source(full_name), full_name)
        if known_name is None:
            found[flat_name] = full_name, text
            waiting.extend(imported)
        elif text != known_text:  # the loader may have made several equal copies of one file
            raise ValueError(f"{known_name} and {full_name} would both be saved as {flat_name}.py: rename one.")
    return {name: text for name, (_, text) in found.items()}


def _reference(of_class: type) -> str:
    """How `auto_map` names a class: file and class, with one dot."""
    return f"{of_class.__module__.rpartition('.')[2]}.{of_class.__name__}"


def _read_source(full_name: str) -> str:
    """The text of an importable module, by its full name."""
    try:
        spec = None if full_name == "__main__" else importlib.util.find_spec(full_name)
    except (ImportError, ValueError):  # ValueError: a module that was made by hand has no spec
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ValueError(f"The code of {full_name} cannot be saved: it is no module with a source file.")
    if spec.submodule_search_locations is not None:
        raise ValueError(f"{full_name} is a package and cannot be saved flat: import from the module that defines it.")
    return Path(spec.origin).read_text(encoding="utf-8")


def _flatten(text: str, full_name: str) -> tuple[str, list[str]]:
    """Rewrite the relative imports of one module for a flat folder; also return the full names they reach."""
    tree = ast.parse(text)
    flat_name = full_name.rpartition(".")[2]
    relative = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    reached = [_resolve(node, full_name) for node in relative]
    _check_absolute_imports(tree, full_name)
    flat = text if text.startswith(_HEADER) else f"{_header(full_name)}\n{_rewrite(text, relative)}"
    compile(flat, f"{flat_name}.py", "exec", dont_inherit=True)
    loader_finds = {name for pattern in _LOADER_IMPORTS for name in re.findall(pattern, flat, flags=re.MULTILINE)}
    if wrong := loader_finds ^ {name.rpartition(".")[2] for name in reached}:
        raise ValueError(
            f"{full_name}: the loader reads relative imports line by line, and would mistake {sorted(wrong)}. "
            "Begin a line with each import, and no line of a text with words that look like one."
        )
    return flat, reached


def _resolve(node: ast.ImportFrom, full_name: str) -> str:
    """The full name of the module that a relative import in `full_name` reads from."""
    if node.module is None:
        raise ValueError(
            f"{full_name}, line {node.lineno}: `from {'.' * node.level} import ...` cannot be saved flat; "
            "import from the module that defines the name."
        )
    try:
        return importlib.util.resolve_name("." * node.level + node.module, full_name.rpartition(".")[0])
    except ImportError as error:
        raise ValueError(f"{full_name}, line {node.lineno}: {error}.") from error


def _rewrite(text: str, relative: list[ast.ImportFrom]) -> str:
    """Put `from .name import X, Y as Z` on one line in place of each relative import, the last one first."""
    lines = text.encode().splitlines(keepends=True)  # the tree counts lines and columns of bytes
    for node in sorted(relative, key=lambda node: (node.lineno, node.col_offset), reverse=True):
        assert node.end_lineno is not None  # a parsed node always ends
        names = ", ".join(name.name if name.asname is None else f"{name.name} as {name.asname}" for name in node.names)
        statement = f"from .{str(node.module).rpartition('.')[2]} import {names}".encode()
        first, last = node.lineno - 1, node.end_lineno - 1
        lines[first : last + 1] = [lines[first][: node.col_offset] + statement + lines[last][node.end_col_offset :]]
    return b"".join(lines).decode()


def _header(full_name: str) -> str:
    package = full_name.partition(".")[0]
    version = getattr(sys.modules.get(package), "__version__", "(unknown version)")
    return (
        f"{_HEADER}{package} {version}, {full_name}, copied here so that this folder loads where {package} is absent."
    )


def _check_absolute_imports(tree: ast.Module, full_name: str) -> None:
    """Refuse what the loader would find missing, and names that hide a module from its importer."""
    flat_name = full_name.rpartition(".")[2]
    if flat_name in sys.stdlib_module_names:
        raise ValueError(f"{full_name} would be saved as {flat_name}.py, the name of a standard module: rename it.")
    for line, name in _unguarded_imports(tree):
        package, *inside = name.split(".")
        if package not in ALWAYS_INSTALLED and package not in sys.stdlib_module_names:
            raise ValueError(
                f"{full_name}, line {line}: `{name}` may be absent where the saved folder is loaded. Import it inside "
                "`try` or `if is_<package>_available():`, relatively if it is ours; unguarded may stand the standard "
                f"library and {', '.join(sorted(ALWAYS_INSTALLED))}."
            )
        if package == "transformers" and flat_name in inside:
            raise ValueError(
                f"{full_name}, line {line}: a file that imports `{name}` must not share its name: rename it."
            )


def _unguarded_imports(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and module of each absolute import that the loader checks: all but those under `try` and a guard."""
    if isinstance(node, ast.Try) or (isinstance(node, ast.If) and _asks_whether_available(node.test)):
        return
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield node.lineno, alias.name
    elif isinstance(node, ast.ImportFrom) and not node.level:
        yield node.lineno, str(node.module)
    for child in ast.iter_child_nodes(node):
        yield from _unguarded_imports(child)


def _asks_whether_available(test: ast.expr) -> bool:
    """Whether a condition calls, by its plain name, one of the functions that the loader takes for a guard."""
    called = (
        node.func.id for node in ast.walk(test) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    )
    return any(
        hasattr(import_utils, name) or (name.startswith("is_flash_attn") and name.endswith("available"))
        for name in called
    )
