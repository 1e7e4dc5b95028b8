"""What the house promises: the mapping of folders, the direction of imports, and what the library never does."""

import ast
import configparser
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

import graft

ROOT = Path(__file__).parents[1]
NOT_OURS = {"tests", "build", "dist"}  # besides hidden folders
OWNERS_NAME = "diablogpt_pytorch"  # compat/diablogpt_pytorch is installed under its own name

# Who may import whom, by folder; everyone may import its own folder.
MAY_IMPORT = {
    "configuration": set(),
    "retrieval": {"configuration"},
    "graphs": {"configuration"},
    "modeling": {"configuration"},
    "trainer": {"configuration", "retrieval", "graphs", "modeling", "registration"},
    "scripts": {"configuration", "retrieval", "graphs", "modeling", "registration", "trainer"},
    "compat": {"configuration", "retrieval", "graphs", "modeling", "registration", "trainer", "scripts"},
    "registration": {"configuration", "modeling"},
    "atomic_files": set(),
    "cpu": set(),
    "pages": {"atomic_files"},
    "text_files": set(),
}
SHARED = {"atomic_files", "cpu", "pages", "text_files"}
# Copied into saved folders, as all of configuration and modeling is.
EXACT_SEARCH = "graft.retrieval.exact_search"
# The one absolute import in modeling: lazy, inside `try`, so saved folders load without it.
DATASTORE = "graft.retrieval.datastore"

OPTIONAL = {
    *("bert_score", "evaluate", "gguf", "hypothesis", "pytest", "tensorboard"),  # extras
    *("bm25s", "duckdb", "faiss", "gradio", "networkx", "psycopg", "pymilvus", "rapidfuzz", "ray", "sklearn", "spacy"),
    *("yake", "comet_ml", "mlflow", "trackio", "wandb"),
}


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def listed(section: str, option: str) -> list[str]:
    return [line.strip() for line in setup_cfg()[section][option].splitlines() if line.strip()]


@cache
def package_folders() -> dict[str, Path]:
    """Each package's name and its folder, relative to the root."""
    found = {}
    for here, folders, files in os.walk(ROOT):
        folders[:] = sorted(name for name in folders if name not in NOT_OURS and not name.startswith("."))
        if "__init__.py" in files:
            folder = Path(here).relative_to(ROOT)
            name = ".".join(("graft", *folder.parts))
            found[name.replace("graft.src.graft", "graft").replace(f"graft.compat.{OWNERS_NAME}", OWNERS_NAME)] = (
                folder
            )
    return found


@cache
def modules() -> dict[str, Path]:
    """Each module's name and its file, packages by the name of the package."""
    files = {}
    for package, folder in package_folders().items():
        for path in sorted((ROOT / folder).glob("*.py")):
            files[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return files


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text(encoding="utf-8"))


def imports(name: str) -> Iterator[tuple[str, ast.AST]]:
    """Our modules that a module of ours imports, anywhere in its text."""
    package = name if modules()[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            targets = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules() else base for alias in node.names]
        else:
            continue
        yield from ((target, node) for target in targets if target.partition(".")[0] == "graft")


def folder_of(name: str) -> str:
    if name.partition(".")[0] == OWNERS_NAME:
        return "compat"
    return name.split(".")[1] if "." in name else ""


def library() -> list[str]:
    return [name for name in modules() if folder_of(name) not in ("scripts", "compat")]


def test_every_folder_with_an_init_is_a_listed_package():
    assert sorted(listed("options", "packages")) == sorted(package_folders())


def test_the_mapping_names_the_folder_of_each_top_package():
    mapping = dict(re.split(r"\s*=\s*", line) for line in listed("options", "package_dir"))
    top = {name: str(folder) for name, folder in package_folders().items() if name.count(".") <= 1}
    assert mapping == top


@pytest.mark.parametrize("name", [name for name in modules() if name != "graft"])
def test_imports_run_one_way(name):
    folder = folder_of(name)
    allowed = MAY_IMPORT[folder] | {folder} | (SHARED if folder not in SHARED else set())
    for target, node in imports(name):
        if folder == "modeling" and target in (EXACT_SEARCH, DATASTORE):
            continue
        if target == "graft" and folder in ("trainer", "scripts", "compat"):
            continue  # the version and the public names
        assert folder_of(target) in allowed, f"{name}, line {node.lineno}: {folder} may not import {target}"


@pytest.mark.parametrize("name", [name for name in modules() if folder_of(name) == "modeling"])
def test_wings_of_modeling_do_not_import_each_other(name):
    def wing(module: str) -> str:
        parts = module.split(".")[2:]
        return parts[0] if parts and ".".join(["graft", "modeling", parts[0]]) in package_folders() else ""

    for target, node in imports(name):
        if folder_of(target) == "modeling":
            assert wing(target) in ("", wing(name)), f"{name}, line {node.lineno}: imports the wing of {target}"


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in modules()
        if folder_of(n) in ("configuration", "modeling", "atomic_files", "pages") or n == EXACT_SEARCH
    ],
)
def test_what_is_copied_into_saved_folders_imports_relatively(name):
    for target, node in imports(name):
        if target == DATASTORE:
            guarded = [t for t in ast.walk(tree(name)) if isinstance(t, ast.Try) and node in ast.walk(t)]
            assert guarded, f"{name}, line {node.lineno}: only inside `try`"
            continue
        assert isinstance(node, ast.ImportFrom), f"{name}, line {node.lineno}: imports {target} absolutely"
        assert node.level, f"{name}, line {node.lineno}: imports {target} absolutely"
        assert node.module, f"{name}, line {node.lineno}: `from . import` cannot be saved flat"


def test_one_module_of_modeling_at_most_makes_datastores():
    makers = {
        name
        for name in modules()
        if folder_of(name) == "modeling"
        for target, _ in imports(name)
        if target == DATASTORE
    }
    assert len(makers) <= 1


def test_file_names_are_unique():
    names = Counter(path.name for path in modules().values() if path.name != "__init__.py")
    assert not [name for name, count in names.items() if count > 1]


def test_names_of_test_files_are_unique():
    names = Counter(path.name for path in (ROOT / "tests").rglob("*.py"))
    assert not [name for name, count in names.items() if count > 1 and name != "conftest.py"]


def run(program: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_importing_graft_imports_nothing_else():
    program = (
        "import json, sys\nimport importlib, typing\nbefore = set(sys.modules)\nimport graft\ndir(graft)\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    assert json.loads(run(program)) == ["graft"]


def test_every_module_imports_without_any_extra():
    program = f"""
import importlib, json, sys


class NoExtras:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):  # it also finds the metadata of distributions
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] in {sorted(OPTIONAL)!r}
        return None if hidden else self.finder.find_spec(name, path, target)


sys.meta_path[:] = [NoExtras(finder) for finder in sys.meta_path]
failed = {{}}
for name in {sorted(modules())!r}:
    try:
        importlib.import_module(name)
    except Exception as error:
        failed[name] = f"{{type(error).__name__}}: {{error}}"
print(json.dumps(failed))
"""
    assert json.loads(run(program)) == {}


def test_a_name_that_graft_lacks_is_answered_with_those_it_has():
    with pytest.raises(AttributeError, match="no attribute 'unlimiformer'; it has .*UnlimiformerConfig"):
        graft.unlimiformer  # noqa: B018


@pytest.mark.parametrize("name", sorted(graft._PUBLIC))
def test_every_public_name_is_there(name):
    value = getattr(graft, name)
    assert name in graft.__all__
    assert name in dir(graft)
    assert value.__module__ == graft._PUBLIC[name]
    assert getattr(import_module(graft._PUBLIC[name]), name) is value


def test_type_checkers_see_the_public_names_where_they_are():
    typed = {
        alias.name: node.module
        for node in ast.walk(tree("graft"))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("graft.")
        for alias in node.names
    }
    assert typed == graft._PUBLIC


def test_the_version_is_the_same_wherever_it_stands():
    assert f"\nversion: {graft.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_dependency_is_pinned_for_ci():
    def project(line: str) -> str:
        return re.sub(r"[-_.]+", "-", re.split(r"[<>=!~;\[ ]", line)[0]).lower()

    def pinned(name: str) -> set[str]:
        return {project(line) for line in (ROOT / name).read_text().splitlines() if "==" in line}

    def of_extras(*extras: str) -> set[str]:
        return {project(line) for extra in extras for line in listed("options.extras_require", extra)}

    everywhere, engines = pinned("constraints.txt"), pinned("constraints-engines.txt")
    needed = {project(line) for line in listed("options", "install_requires")}
    assert needed | of_extras("dev", "docs", "examples") <= everywhere
    assert of_extras("ray", "milvus", "pgvector", "test-engines") <= engines
    assert not everywhere & engines


def test_make_tests_the_oldest_transformers_that_setup_allows():
    oldest = re.search(r"transformers>=([\d.]+)", "\n".join(listed("options", "install_requires")))[1]
    assert re.search(
        rf"^OLDEST_TRANSFORMERS := {re.escape(oldest)}\.\d+$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )


# Reads what others saved as a pickle, and lets only tensors out of it.
READS_WEIGHTS_ONLY = "graft.modeling.retro.original_checkpoint"
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


@pytest.mark.parametrize("name", sorted(modules()))
def test_nothing_pickles_and_nothing_trusts_by_itself(name):
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            assert not FORBIDDEN_MODULES & {module.partition(".")[0] for module in imported}, f"line {node.lineno}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load" and name == READS_WEIGHTS_ONLY:
            assert "weights_only=True" in ast.unparse(node), f"line {node.lineno}: torch.load runs what it reads"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            if name == READS_WEIGHTS_ONLY and node.attr == "load":
                continue
            assert node.attr not in ("load", "save"), f"line {node.lineno}: torch.{node.attr} pickles"
        if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant) and node.value.value is True:
            assert node.arg not in ("trust_remote_code", "allow_pickle"), f"line {node.lineno}: {node.arg}=True"


@pytest.mark.parametrize("name", library())
def test_the_library_does_not_print(name):
    calls = [node for node in ast.walk(tree(name)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert not [node.lineno for node in calls if node.func.id == "print"]


def test_extras_bear_the_name_that_every_pip_knows_them_by():
    """Built metadata have hyphens; a pip of 2023, asked for an underscore, installs nothing and only warns."""
    extras = list(setup_cfg()["options.extras_require"])
    assert extras
    assert [extra for extra in extras if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", extra)] == []
