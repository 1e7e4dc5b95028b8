"""The one place where our classes become known to transformers' Auto classes and to PEFT.

Runs when a public name of graft is first touched, or by `import graft.registration`. Running it again changes nothing.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from graft.configuration.configuration_gnn import LlamaGNNConfig
from graft.configuration.configuration_query_graph import QueryGraphConfig
from graft.configuration.configuration_retro import RetroConfig
from graft.configuration.configuration_unlimiformer import (
    UnlimiformerBartConfig,
    UnlimiformerLlamaConfig,
    UnlimiformerQwen3Config,
    UnlimiformerT5Config,
)
from graft.modeling.graph.modeling_llama_gnn import LlamaForCausalLMWithGNN, LlamaModelWithGNN
from graft.modeling.graph.sparse_gin_model import register_with_peft as register_sparse_gin
from graft.modeling.query_graph.modeling_query_graph import QueryGraphForCostEstimation
from graft.modeling.retro.modeling_retro import RetroForCausalLM, RetroModel
from graft.modeling.retro.retrofit_tuner import register_with_peft as register_retrofit
from graft.modeling.unlimiformer.modeling_unlimiformer_bart import UnlimiformerBart
from graft.modeling.unlimiformer.modeling_unlimiformer_llama import UnlimiformerLlamaForCausalLM
from graft.modeling.unlimiformer.modeling_unlimiformer_qwen3 import UnlimiformerQwen3ForCausalLM
from graft.modeling.unlimiformer.modeling_unlimiformer_t5 import UnlimiformerT5ForConditionalGeneration

_REGISTERED = (
    (LlamaGNNConfig, AutoModel, LlamaModelWithGNN),
    (LlamaGNNConfig, AutoModelForCausalLM, LlamaForCausalLMWithGNN),
    (QueryGraphConfig, AutoModel, QueryGraphForCostEstimation),
    (RetroConfig, AutoModel, RetroModel),
    (RetroConfig, AutoModelForCausalLM, RetroForCausalLM),
    (UnlimiformerBartConfig, AutoModelForSeq2SeqLM, UnlimiformerBart),
    (UnlimiformerLlamaConfig, AutoModelForCausalLM, UnlimiformerLlamaForCausalLM),
    (UnlimiformerQwen3Config, AutoModelForCausalLM, UnlimiformerQwen3ForCausalLM),
    (UnlimiformerT5Config, AutoModelForSeq2SeqLM, UnlimiformerT5ForConditionalGeneration),
)

for _config_class, _auto_class, _model_class in _REGISTERED:
    AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    _auto_class.register(_config_class, _model_class, exist_ok=True)

register_retrofit()
register_sparse_gin()
