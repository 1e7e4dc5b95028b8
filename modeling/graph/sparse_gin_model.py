"""Sparse-GIN as a method of PEFT: `get_peft_model(model, SparseGINConfig(...))`, with its saving and loading."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..attachment import Attachment
from ..hooked_tuner import AdaptersByName, HookedTuner, register_tuner
from .external_graph import refuse_to_generate
from .sparse_gin_config import PEFT_TYPE, SparseGINConfig
from .sparse_gin_layer import SparseGINAdapter, install_sparse_gin


class SparseGINModel(HookedTuner):
    """The tuner of sparse-GIN. A forward pass takes a `graph`, see ExternalGraph."""

    prefix = "sparse_gin_"
    home = "sparse_gin"
    method = PEFT_TYPE
    depends_on = "the input's graph"
    sparse_gin: AdaptersByName

    def make_adapter(self, model: PreTrainedModel, config: Any, adapter_name: str) -> nn.Module:
        """The weights that `config` asks for, in the dtype of the base or float32 if that is wider.

        Raises:
            TypeError, ValueError: the model's layers cannot be tapped, or it has not the layers named.
        """
        dtype = torch.promote_types(model.get_input_embeddings().weight.dtype, torch.float32)  # type: ignore[arg-type]
        return SparseGINAdapter(config, model, adapter_name).to(dtype)

    def install(
        self, attachment: Attachment, model: PreTrainedModel, adapter: Any, is_active: Callable[[], bool]
    ) -> None:
        """Let the adapter read attention and write to the residual."""
        install_sparse_gin(attachment, model, adapter, is_active)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the base's.

        Raises:
            ValueError: `graph` is given; it has to travel in the cache.
        """
        refuse_to_generate(kwargs)
        return self.model.generate(*args, **kwargs)


def register_with_peft() -> None:
    """Let PEFT know SparseGINConfig; again changes nothing.

    Raises:
        ImportError: this PEFT cannot be extended in this way.
    """
    register_tuner(SparseGINConfig, SparseGINModel)
