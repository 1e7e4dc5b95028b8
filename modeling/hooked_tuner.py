"""What PEFT methods of ours share: weights that lie in one layer of the tuner and are read by hooks on the base.

No module of the base is replaced or renamed, so LoRA fits beside them. Each method says what its weights are and how
the base reads them.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftConfig
from peft import mapping as peft_mapping
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attachment import Attachment, device_of


class AdaptersByName(nn.Module, BaseTunerLayer):
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


class HookedTuner(BaseTuner):
    """Adapters of one base model, one of them active at a time.

    A subclass says the name `home` of the layer that holds the adapters, the method's name `method` for PEFT, what its
    result `depends_on`, and how an adapter is made and installed.
    """

    tuner_layer_cls = AdaptersByName
    target_module_mapping: dict[str, list[str]] = {}
    uses_shared_state = True
    home: str
    method: str
    depends_on: str

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        others = getattr(model, "peft_config", {})
        if adapter_name in others:
            raise ValueError(
                f"`adapter_name` {adapter_name!r} is used by another adapter of this model: give the {self.method} "
                f"adapter a name of its own, beside {sorted(others)}. PEFT would save both in each other's file."
            )
        super().__init__(model, peft_config, adapter_name, **kwargs)
        # A reference of our own: another method's `unload` takes the base's away.
        self.peft_config: dict[str, Any] = self.peft_config

    @abstractmethod
    def make_adapter(self, model: PreTrainedModel, config: Any, adapter_name: str) -> nn.Module:
        """New weights for `model`, or an error that says why it can have none."""

    @abstractmethod
    def install(
        self, attachment: Attachment, model: PreTrainedModel, adapter: nn.Module, is_active: Callable[[], bool]
    ) -> None:
        """Let `model` read `adapter` while `is_active()`, until `attachment` is removed."""

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Make the weights of `adapter_name` and let the base read them; arguments as in BaseTuner."""
        base: Any = model
        config: Any = self.peft_config[adapter_name]
        adapter = self.make_adapter(base, config, adapter_name)  # it refuses what is no transformers model
        if self.home not in self._modules:
            self.add_module(self.home, AdaptersByName(device_of(base)))
            self.attachments: dict[str, Attachment] = {}
        layer = self.kept
        attachment = Attachment()
        with attachment.installing():
            self.install(attachment, base, adapter, partial(layer.uses, adapter_name))
        self.attachments[adapter_name] = attachment
        layer.adapters[adapter_name] = adapter
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._mark_only_adapters_as_trainable(model)

    @property
    def kept(self) -> AdaptersByName:
        """The layer that holds the adapters."""
        return self._modules[self.home]  # type: ignore[return-value]

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        """Abstract in PEFT, whose own `inject_adapter` calls it for each module it replaces."""
        raise TypeError(f"{self.method} replaces no module of its base.")

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Use another adapter.

        Raises:
            ValueError: several are named; one is active at a time.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        names = [name for name in names if name in self.kept.adapters] or names
        if len(names) > 1:
            raise ValueError(
                f"`adapter_name` must name one {self.method} adapter, one is active at a time, got {names}."
            )
        self.kept.set_adapter(names, inference_mode=inference_mode)
        self.active_adapter = names[0] if names else []

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        self.kept.enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter away for good.

        Raises:
            ValueError: there is no such adapter.
        """
        if adapter_name not in self.kept.adapters:
            raise ValueError(f"`adapter_name` must be one of {list(self.kept.adapters)}, got {adapter_name!r}.")
        self.attachments.pop(adapter_name).remove()
        del self.peft_config[adapter_name]
        self.kept.delete_adapter(adapter_name)
        self.active_adapter = self.kept.active_adapters

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            f"{self.method} cannot be merged into its base: what it adds depends on {self.depends_on}. "
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
            self.kept.adapters[adapter_name].to(self.model.get_input_embeddings().weight.dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"`adapter_names` per row is not supported by {self.method}: one adapter serves all rows."
            )
        yield

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Weights lie deep below the adapter's name, where PEFT does not look for it."""
        prefix = f"base_model.{cls.home}.adapters."
        named = f"{prefix}{adapter_name}."
        return prefix + key.removeprefix(named) if key.startswith(named) else key


def register_tuner(config_class: type[PeftConfig], tuner: type[HookedTuner]) -> None:
    """Let PEFT know a method; again changes nothing. `register_peft_method` takes PEFT's own methods only.

    Raises:
        ImportError: this PEFT cannot be extended in this way.
    """
    mappings = ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING")
    if not all(hasattr(peft_mapping, name) for name in mappings) or not hasattr(BaseTuner, "_get_adapter_state_dict"):
        import peft

        raise ImportError(f"{tuner.method} as a PEFT method needs peft 0.21 or newer, this is {peft.__version__}.")
    values: tuple[type[PeftConfig] | type[BaseTuner] | str, ...] = (config_class, tuner, tuner.prefix)
    for name, value in zip(mappings, values, strict=True):
        getattr(peft_mapping, name)[tuner.method] = value
