"""Memory, retrieval and graphs, grafted onto the transformers models people already have.

Importing this package imports nothing else: no torch, no transformers. A public name is imported when it is first
touched, from the file that defines it, and its models are then known to transformers' Auto classes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "Attachment": "graft.modeling.attachment",
    "AttentionReport": "graft.modeling.unlimiformer.report",
    "CachingRetriever": "graft.modeling.retro.retriever",
    "CallableRetriever": "graft.modeling.retro.retriever",
    "ChunkEmbedder": "graft.retrieval.corpus.embedder",
    "ChunkGraph": "graft.modeling.graph.external_edges",
    "Corpus": "graft.retrieval.corpus.corpus",
    "CorpusRetriever": "graft.retrieval.corpus.corpus_retriever",
    "DataCollatorForRetro": "graft.retrieval.corpus.retro_collator",
    "FixedNeighbours": "graft.modeling.retro.retriever",
    "GNNConfig": "graft.configuration.configuration_gnn",
    "GraphRecorder": "graft.modeling.graph.graph_recorder",
    "GraftSeq2SeqTrainer": "graft.trainer.trainer",
    "GraftTrainer": "graft.trainer.trainer",
    "LlamaForCausalLMWithGNN": "graft.modeling.graph.modeling_llama_gnn",
    "LlamaGNNConfig": "graft.configuration.configuration_gnn",
    "LlamaModelWithGNN": "graft.modeling.graph.modeling_llama_gnn",
    "Memory": "graft.modeling.unlimiformer.memory",
    "QueryGraphConfig": "graft.configuration.configuration_query_graph",
    "QueryGraphForCostEstimation": "graft.modeling.query_graph.modeling_query_graph",
    "QueryPlanGraph": "graft.graphs.query_plan.query_plan_graph",
    "RetroConfig": "graft.configuration.configuration_retro",
    "RetroDataset": "graft.retrieval.corpus.retro_dataset",
    "RetroFit": "graft.modeling.retro.retrofit",
    "RetroFitConfig": "graft.modeling.retro.retrofit_config",
    "RetroForCausalLM": "graft.modeling.retro.modeling_retro",
    "RetroModel": "graft.modeling.retro.modeling_retro",
    "RetroTrainer": "graft.trainer.retro_trainer",
    "SparseGINConfig": "graft.modeling.graph.sparse_gin_config",
    "TokenEdges": "graft.modeling.graph.external_edges",
    "UnlimiformerBart": "graft.modeling.unlimiformer.modeling_unlimiformer_bart",
    "UnlimiformerBartConfig": "graft.configuration.configuration_unlimiformer",
    "UnlimiformerConfig": "graft.configuration.configuration_unlimiformer",
    "UnlimiformerLlamaConfig": "graft.configuration.configuration_unlimiformer",
    "UnlimiformerLlamaForCausalLM": "graft.modeling.unlimiformer.modeling_unlimiformer_llama",
    "UnlimiformerQwen3Config": "graft.configuration.configuration_unlimiformer",
    "UnlimiformerQwen3ForCausalLM": "graft.modeling.unlimiformer.modeling_unlimiformer_qwen3",
    "UnlimiformerT5Config": "graft.configuration.configuration_unlimiformer",
    "UnlimiformerT5ForConditionalGeneration": "graft.modeling.unlimiformer.modeling_unlimiformer_t5",
    "chunk_dataset": "graft.trainer.document_chunks",
    "decode_faster": "graft.modeling.cpu_linear",
    "estimate_memory": "graft.modeling.unlimiformer.memory_size",
    "retrofit": "graft.modeling.retro.retrofit",
    "unlimiform": "graft.modeling.unlimiformer.attach",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'graft' has no attribute {name!r}; it has {', '.join(sorted(_PUBLIC))}")
    import_module("graft.registration")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from graft.configuration.configuration_gnn import GNNConfig as GNNConfig
    from graft.configuration.configuration_gnn import LlamaGNNConfig as LlamaGNNConfig
    from graft.configuration.configuration_query_graph import QueryGraphConfig as QueryGraphConfig
    from graft.configuration.configuration_retro import RetroConfig as RetroConfig
    from graft.configuration.configuration_unlimiformer import (
        UnlimiformerBartConfig as UnlimiformerBartConfig,
    )
    from graft.configuration.configuration_unlimiformer import (
        UnlimiformerConfig as UnlimiformerConfig,
    )
    from graft.configuration.configuration_unlimiformer import (
        UnlimiformerLlamaConfig as UnlimiformerLlamaConfig,
    )
    from graft.configuration.configuration_unlimiformer import (
        UnlimiformerQwen3Config as UnlimiformerQwen3Config,
    )
    from graft.configuration.configuration_unlimiformer import (
        UnlimiformerT5Config as UnlimiformerT5Config,
    )
    from graft.graphs.query_plan.query_plan_graph import QueryPlanGraph as QueryPlanGraph
    from graft.modeling.attachment import Attachment as Attachment
    from graft.modeling.cpu_linear import decode_faster as decode_faster
    from graft.modeling.graph.external_edges import ChunkGraph as ChunkGraph
    from graft.modeling.graph.external_edges import TokenEdges as TokenEdges
    from graft.modeling.graph.graph_recorder import GraphRecorder as GraphRecorder
    from graft.modeling.graph.modeling_llama_gnn import LlamaForCausalLMWithGNN as LlamaForCausalLMWithGNN
    from graft.modeling.graph.modeling_llama_gnn import LlamaModelWithGNN as LlamaModelWithGNN
    from graft.modeling.graph.sparse_gin_config import SparseGINConfig as SparseGINConfig
    from graft.modeling.query_graph.modeling_query_graph import (
        QueryGraphForCostEstimation as QueryGraphForCostEstimation,
    )
    from graft.modeling.retro.modeling_retro import RetroForCausalLM as RetroForCausalLM
    from graft.modeling.retro.modeling_retro import RetroModel as RetroModel
    from graft.modeling.retro.retriever import CachingRetriever as CachingRetriever
    from graft.modeling.retro.retriever import CallableRetriever as CallableRetriever
    from graft.modeling.retro.retriever import FixedNeighbours as FixedNeighbours
    from graft.modeling.retro.retrofit import RetroFit as RetroFit
    from graft.modeling.retro.retrofit import retrofit as retrofit
    from graft.modeling.retro.retrofit_config import RetroFitConfig as RetroFitConfig
    from graft.modeling.unlimiformer.attach import unlimiform as unlimiform
    from graft.modeling.unlimiformer.memory import Memory as Memory
    from graft.modeling.unlimiformer.memory_size import estimate_memory as estimate_memory
    from graft.modeling.unlimiformer.modeling_unlimiformer_bart import UnlimiformerBart as UnlimiformerBart
    from graft.modeling.unlimiformer.modeling_unlimiformer_llama import (
        UnlimiformerLlamaForCausalLM as UnlimiformerLlamaForCausalLM,
    )
    from graft.modeling.unlimiformer.modeling_unlimiformer_qwen3 import (
        UnlimiformerQwen3ForCausalLM as UnlimiformerQwen3ForCausalLM,
    )
    from graft.modeling.unlimiformer.modeling_unlimiformer_t5 import (
        UnlimiformerT5ForConditionalGeneration as UnlimiformerT5ForConditionalGeneration,
    )
    from graft.modeling.unlimiformer.report import AttentionReport as AttentionReport
    from graft.retrieval.corpus.corpus import Corpus as Corpus
    from graft.retrieval.corpus.corpus_retriever import CorpusRetriever as CorpusRetriever
    from graft.retrieval.corpus.embedder import ChunkEmbedder as ChunkEmbedder
    from graft.retrieval.corpus.retro_collator import DataCollatorForRetro as DataCollatorForRetro
    from graft.retrieval.corpus.retro_dataset import RetroDataset as RetroDataset
    from graft.trainer.document_chunks import chunk_dataset as chunk_dataset
    from graft.trainer.retro_trainer import RetroTrainer as RetroTrainer
    from graft.trainer.trainer import GraftSeq2SeqTrainer as GraftSeq2SeqTrainer
    from graft.trainer.trainer import GraftTrainer as GraftTrainer
