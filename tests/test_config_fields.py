"""A field of a configuration exists only if something reads it: looked for in the source; a check is no reader."""

import ast
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path

import pytest

from graft.configuration.configuration_gnn import GNNConfig, LlamaGNNConfig
from graft.configuration.configuration_query_graph import QueryGraphConfig
from graft.configuration.configuration_retro import RetroConfig
from graft.configuration.configuration_unlimiformer import (
    UnlimiformerBartConfig,
    UnlimiformerConfig,
    UnlimiformerLlamaConfig,
    UnlimiformerQwen3Config,
    UnlimiformerT5Config,
)
from graft.configuration.graph_edges_config import AdjacencyConfig, EdgeTransformConfig
from graft.configuration.latent_config import LatentConfig
from graft.configuration.sparse_graph_config import SparseGraphConfig
from graft.modeling.graph.sparse_gin_config import SparseGINConfig
from graft.modeling.retro.retrofit_config import RetroFitConfig
from graft.trainer.arguments import (
    AdapterArguments,
    DataArguments,
    GraphArguments,
    ModelArguments,
    RetrievalArguments,
    RunConfiguration,
)
from graft.trainer.knowledge_graph_arguments import KnowledgeGraphArguments

ROOT = Path(__file__).parents[1]
TRAINER, GRAPH, RETRO = ["trainer"], ["modeling/graph"], ["modeling/retro"]
READERS = {
    RunConfiguration: TRAINER,
    ModelArguments: TRAINER,
    DataArguments: TRAINER,
    AdapterArguments: TRAINER,
    RetrievalArguments: TRAINER,
    GraphArguments: [*TRAINER, *GRAPH],
    KnowledgeGraphArguments: TRAINER,
    UnlimiformerConfig: ["modeling/unlimiformer", "retrieval", "trainer"],
    **dict.fromkeys(
        (UnlimiformerBartConfig, UnlimiformerLlamaConfig, UnlimiformerQwen3Config, UnlimiformerT5Config),
        ["modeling/unlimiformer"],
    ),
    GNNConfig: GRAPH,
    LlamaGNNConfig: GRAPH,
    **dict.fromkeys((AdjacencyConfig, EdgeTransformConfig, SparseGraphConfig, LatentConfig), GRAPH),
    SparseGINConfig: GRAPH,
    RetroConfig: [*RETRO, "configuration/configuration_retro.py"],  # its properties complete what was left None
    RetroFitConfig: RETRO,
    QueryGraphConfig: ["modeling/query_graph"],
}
"""Each configuration and the folders that act on it."""

CHECKS = {"block_rules.py", "config_file.py", "knowledge_graph_rules.py", "retrieval_rules.py"}
"""Files that only build and check the blocks of a run."""

OF_TRANSFORMERS = {"use_cache", "bos_token_id", "eos_token_id", "tie_word_embeddings", "max_position_embeddings"}
"""Fields under transformers' own names, which its `generate` and its models read."""


class Reads(ast.NodeVisitor):
    """Names of attributes that are read, and of those asked for by name, outside of the checks of a configuration."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if not node.name.startswith(("validate_", "__post_init__")):
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self.names.add(node.attr)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id == "getattr" and isinstance(node.args[1], ast.Constant):
            self.names.add(node.args[1].value)
        self.generic_visit(node)


def names_read(text: str) -> set[str]:
    reads = Reads()
    reads.visit(ast.parse(text))
    return reads.names


def names_read_in(places: list[str]) -> set[str]:
    files = [
        file
        for place in places
        for file in ([ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*.py"))
        if file.name not in CHECKS
    ]
    return {name for file in files for name in names_read(file.read_text(encoding="utf-8"))}


def own_fields(configuration: type) -> list[str]:
    """Each field that the class or a parent of ours declares, without those of stock parents."""
    parents = [
        each for each in configuration.__mro__ if is_dataclass(each) and not each.__module__.startswith("graft.")
    ]
    stock = {each.name for parent in parents for each in fields(parent)}
    return [each.name for each in fields(configuration) if each.name not in stock]


def configurations() -> list[type]:
    """Every dataclass that graft.configuration and the arguments of a run define."""
    names = [f"graft.configuration.{path.stem}" for path in (ROOT / "configuration").glob("configuration_*.py")]
    classes = [each for name in [*names, "graft.trainer.arguments"] for each in vars(import_module(name)).values()]
    return [
        each
        for each in classes
        if isinstance(each, type) and is_dataclass(each) and each.__module__ in [*names, "graft.trainer.arguments"]
    ]


def test_every_configuration_is_looked_at():
    assert [each.__name__ for each in configurations() if each not in READERS] == []


@pytest.mark.parametrize("owner", READERS, ids=lambda owner: owner.__name__)
def test_every_field_is_read_where_it_should_act(owner):
    read = names_read_in(READERS[owner])
    unread = [name for name in own_fields(owner) if name not in read | OF_TRANSFORMERS]
    assert unread == [], f"nothing in {READERS[owner]} reads {unread} of {owner.__name__}"


def test_checks_and_assignments_are_no_readers():
    text = """
class Options:
    def validate_ranges(self):
        if self.checked < 1:
            raise ValueError

    def apply(self, options):
        options.assigned = options.used + getattr(options, "asked")
"""
    assert names_read(text) == {"used", "asked"}
