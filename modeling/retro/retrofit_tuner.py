"""Retro-fit as a method of PEFT: `get_peft_model(model, RetroFitConfig(...))`, with its saving, loading and Trainer.

No module of the base is replaced or renamed, so LoRA fits beside it: the weights of all adapters lie in one layer of
the tuner, and hooks on the base read them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftConfig
from peft import mapping as peft_mapping
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from ..attachment import Attachment, device_of
from .retriever import Retriever
from .retrofit import WEIGHTS_PREFIX, has_retrieval, make_adapter, retrieval_inputs
from .retrofit_config import PEFT_TYPE, RetroFitConfig
from .retrofit_hook import install_retrieval


class RetroFitTunerLayer(nn.Module, BaseTunerLayer):
    """Holds the adapters by name; PEFT asks it which of them are active, enabled and trained.

    Args:
        device: of the base.
    """

    adapter_layer_names = ("adapters",)

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.adapters = nn.ModuleDict()

    def uses(self, name: str) -> bool:
        """Whether the adapter `name` is to be used now."""
        return not self.disable_adapters and name in self.active_adapters

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Called when weights were loaded into an empty adapter; there is no base layer here to ask."""
        if adapter_name in self.adapters:
            self.adapters[adapter_name].to(self.device if device is None else device)


class RetroFitTuner(BaseTuner):
    """The tuner of a retro-fit: adapters of one base model, one of them active at a time."""

    prefix = "retrofit_"
    tuner_layer_cls = RetroFitTunerLayer
    target_module_mapping: dict[str, list[str]] = {}
    uses_shared_state = True

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Make the weights of `adapter_name` and let the base read them; arguments as in BaseTuner."""
        config: Any = self.peft_config[adapter_name]
        adapter = make_adapter(model, config)  # type: ignore[arg-type]  # it refuses what is no transformers model
        if "retrofit" not in self._modules:
            if has_retrieval(model):
                raise RuntimeError("`model` has retrieval already: `remove()` or `unload()` it first.")
            self.retrofit = RetroFitTunerLayer(device_of(self.model))
            self.attachments: dict[str, Attachment] = {}
        layer = self.retrofit
        attachment = Attachment()
        with attachment.installing():
            install_retrieval(attachment, self.model, adapter, partial(layer.uses, adapter_name))
        self.attachments[adapter_name] = attachment
        layer.adapters[adapter_name] = adapter
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._mark_only_adapters_as_trainable(model)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("A retro-fit replaces no module of its base.")  # `inject_adapter` never asks for it

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

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Use another adapter.

        Raises:
            ValueError: several are named; one retro-fit is active at a time.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        names = [name for name in names if name in self.retrofit.adapters] or names
        if len(names) > 1:
            raise ValueError(f"`adapter_name` must name one retro-fit, one is active at a time, got {names}.")
        self.retrofit.set_adapter(names, inference_mode=inference_mode)
        self.active_adapter = names[0] if names else []

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        self.retrofit.enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter away for good.

        Raises:
            ValueError: there is no such adapter.
        """
        if adapter_name not in self.retrofit.adapters:
            raise ValueError(f"`adapter_name` must be one of {list(self.retrofit.adapters)}, got {adapter_name!r}.")
        self.attachments.pop(adapter_name).remove()
        del self.peft_config[adapter_name]
        self.retrofit.delete_adapter(adapter_name)
        self.active_adapter = self.retrofit.active_adapters

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            f"{PEFT_TYPE} cannot be merged into its base: what it adds depends on the neighbours that are retrieved. "
            "`unload()` gives the base back without it."
        )

    def _unload_and_optionally_merge(  # type: ignore[override]  # PEFT says None and returns the model
        self, merge: bool = True, *args: Any, **kwargs: Any
    ) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        for name in list(self.attachments):
            self.attachments.pop(name).remove()
            del self.peft_config[name]
        if not self.peft_config and hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Weights are float32 or wider; without autocast they take the dtype of the base."""
        if not autocast_adapter_dtype:
            self.retrofit.adapters[adapter_name].to(self.model.get_input_embeddings().weight.dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(f"`adapter_names` per row is not supported by {PEFT_TYPE}: one adapter serves all rows.")
        yield

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Weights lie deep below the adapter's name, where PEFT does not look for it."""
        named = f"{WEIGHTS_PREFIX}{adapter_name}."
        return WEIGHTS_PREFIX + key.removeprefix(named) if key.startswith(named) else key


def register_with_peft() -> None:
    """Let PEFT know RetroFitConfig; again changes nothing. `register_peft_method` takes PEFT's own methods only.

    Raises:
        ImportError: this PEFT cannot be extended in this way.
    """
    mappings = ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING")
    if not all(hasattr(peft_mapping, name) for name in mappings) or not hasattr(BaseTuner, "_get_adapter_state_dict"):
        import peft

        raise ImportError(f"Retro-fit as a PEFT method needs peft 0.21 or newer, this is {peft.__version__}.")
    values: tuple[type[PeftConfig] | type[BaseTuner] | str, ...] = (
        RetroFitConfig,
        RetroFitTuner,
        RetroFitTuner.prefix,
    )
    for name, value in zip(mappings, values, strict=True):
        getattr(peft_mapping, name)[PEFT_TYPE] = value
