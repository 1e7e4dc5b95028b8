"""Retro-fit as a method of PEFT: `get_peft_model(model, RetroFitConfig(...))`, with its saving and loading."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..attachment import Attachment
from ..hooked_tuner import AdaptersByName, HookedTuner, register_tuner
from .retriever import Retriever
from .retrofit_adapter import make_adapter
from .retrofit_config import PEFT_TYPE, RetroFitConfig
from .retrofit_hook import has_retrieval, install_retrieval
from .retrofit_inputs import retrieval_inputs


class RetroFitTuner(HookedTuner):
    """The tuner of a retro-fit."""

    prefix = "retrofit_"
    home = "retrofit"
    method = PEFT_TYPE
    depends_on = "the neighbours that are retrieved"
    retrofit: AdaptersByName

    def make_adapter(self, model: PreTrainedModel, config: Any, adapter_name: str) -> nn.Module:
        """The weights that `config` asks for.

        Raises:
            RuntimeError: the model has retrieval from elsewhere.
        """
        adapter = make_adapter(model, config)
        if self.home not in self._modules and has_retrieval(model):
            raise RuntimeError("`model` has retrieval already: `remove()` or `unload()` it first.")
        return adapter

    def install(
        self, attachment: Attachment, model: PreTrainedModel, adapter: Any, is_active: Callable[[], bool]
    ) -> None:
        """Let `model` read neighbours."""
        install_retrieval(attachment, model, adapter, is_active)

    def inputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        retriever: Retriever | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        """What to give to `generate` of the PEFT model, made anew for each generation; see `RetroFit.inputs`."""
        adapter = self.retrofit.adapters[self.active_adapters[0]]
        return retrieval_inputs(self.model, adapter, (input_ids, attention_mask), retriever, others)  # type: ignore[arg-type]


def register_with_peft() -> None:
    """Let PEFT know RetroFitConfig; again changes nothing.

    Raises:
        ImportError: this PEFT cannot be extended in this way.
    """
    register_tuner(RetroFitConfig, RetroFitTuner)
