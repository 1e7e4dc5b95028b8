"""`retrofit(model, config)`: give a decoder people already have retrieval, until it is taken away again.

Borgeaud et al. 2021, arXiv 2112.04426, section 2.6: the decoder stays frozen; only the encoder of neighbours and the
chunked cross-attention, between attention and feed-forward of some layers, are trained.
"""

import json
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from ...atomic_files import new_file, write_json
from ..attachment import Attachment
from ..residual_tap import tappable_layers
from ..transformers_compat import cache_argument, take_cache
from .retrieval_cache import retrieval_layers
from .retriever import Retriever, check_retriever
from .retrofit_adapter import RetroFitAdapter
from .retrofit_config import RetroFitConfig
from .retrofit_hook import RetrievalHook, RetrieverLayer, install_retrieval

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
WEIGHTS_PREFIX = "base_model.retrofit.adapters."
"""Folders are PEFT's: what `RetroFit` writes `PeftModel.from_pretrained` loads, and the other way round."""


def has_retrieval(model: nn.Module) -> bool:
    """Whether a model is retro-fitted."""
    return any(isinstance(hook, RetrievalHook) for hook in model._forward_pre_hooks.values())


def make_adapter(model: PreTrainedModel, config: RetroFitConfig) -> RetroFitAdapter:
    """New weights for a decoder, on its device, in float32 or wider.

    Raises:
        TypeError, ValueError: the model's family cannot be retro-fitted; those that can are listed.
        ValueError, StrictDataclassError: the options do not fit the model.
    """
    tappable_layers(model)
    weight = model.get_input_embeddings().weight
    adapter = RetroFitAdapter(config.retro_config(model.config))
    adapter.to(torch.promote_types(weight.dtype, torch.float32))  # type: ignore[arg-type]
    is_empty = adapter.encoder.output.weight.is_meta  # as PEFT wants it just before it loads weights
    return adapter if is_empty else adapter.to(weight.device)  # type: ignore[arg-type]


def retrieval_inputs(
    model: PreTrainedModel,
    adapter: RetroFitAdapter,
    tokens: tuple[Tensor, Tensor | None],
    retriever: Retriever | None,
    others: dict[str, Any],
) -> dict[str, Any]:
    """Arguments of `model.generate` whose cache says whom to ask; see `RetroFit.inputs`.

    Raises:
        TypeError: `others` has what is neither a cache nor `position_ids`.
    """
    input_ids, attention_mask = tokens
    cache: Cache | None = take_cache(others)
    if unknown := sorted(set(others) - {"position_ids"}):
        raise TypeError(f"`inputs` takes tokens, a retriever, a cache and `position_ids`, got {unknown}.")
    if input_ids.dim() != 2:
        raise ValueError(f"`input_ids` must be (batch, prompt), got {tuple(input_ids.shape)}.")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, **others}
    check_retriever(retriever)
    if retriever is None:
        return inputs | ({} if cache is None else cache_argument(cache))
    cache = DynamicCache(config=model.config) if cache is None else cache
    layers = adapter.config.cross_attention_layers
    retrieval_layers(cache, layers, adapter.config.chunk_size)
    cache.layers[layers[0]] = RetrieverLayer(cache.layers[layers[0]], retriever)
    return inputs | cache_argument(cache)


class RetroFit(Attachment):
    """A frozen decoder with retrieval: trained by `trainable_parameters`, undone by `remove()` or the end of a `with`.

    Attributes:
        adapter: all new weights; a module of its own, for the decoder stays what it was.
    """

    def __init__(self, model: PreTrainedModel, config: RetroFitConfig) -> None:
        super().__init__()
        self.adapter = make_adapter(model, config)
        self.model, self.config = model, config
        if has_retrieval(model):
            raise RuntimeError("`model` has retrieval already: `remove()` the other attachment first.")
        with self.installing():
            self._freeze()
            install_retrieval(self, model, self.adapter, lambda: self.is_attached)

    def _freeze(self) -> None:
        """Let no weight of the model have a gradient, until removal."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
            self._undo.callback(parameter.requires_grad_, True)

    def __repr__(self) -> str:
        config = self.adapter.config
        layers = f"layers {config.cross_attention_layers} of {config.num_hidden_layers}, chunks of {config.chunk_size}"
        state = "" if self.is_attached else ", removed"
        return f"RetroFit({type(self.model).__name__}, {layers}, {self.trainable_share:.1%} of all weights new{state})"

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The new weights, in the order of their names: what an optimizer is given."""
        return list(self.adapter.parameters())

    @property
    def trainable_share(self) -> float:
        """New weights by all weights."""
        new = sum(parameter.numel() for parameter in self.adapter.parameters())
        return new / (new + sum(parameter.numel() for parameter in self.model.parameters()))

    def inputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        retriever: Retriever | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        """What to give to `model.generate(...)`; make it anew for each generation.

            model.generate(**handle.inputs(ids, retriever=retriever), max_new_tokens=50)
            model.generate(**handle.inputs(**memory.inputs(ids), retriever=retriever))  # behind a memory

        Args:
            input_ids: (batch, prompt), left-padded if prompts differ in length, with their mask.
            attention_mask: like `input_ids`, 1 for real tokens.
            retriever: asked when a chunk is complete, for all rows whose chunk is; None generates without retrieval.
            others: a fresh cache to use, under transformers' name for it, and `position_ids`, such as a memory makes.

        Raises:
            TypeError: `retriever` is not callable, or an argument is unknown.
            ValueError: the cache holds tokens already.
            RuntimeError: the attachment was removed.
        """
        self.check_attached()
        return retrieval_inputs(self.model, self.adapter, (input_ids, attention_mask), retriever, others)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the options and the new weights alone; `PeftModel.from_pretrained` loads them as well."""
        folder = Path(folder)
        weights = {WEIGHTS_PREFIX + name: tensor.contiguous() for name, tensor in self.adapter.state_dict().items()}
        described = self.config.to_dict() | {"base_model_name_or_path": self.model.name_or_path or None}
        with new_file(folder / WEIGHTS_FILE) as temporary:
            save_file(weights, temporary, metadata={"format": "pt"})
        write_json(folder / CONFIG_FILE, described)
        return folder

    @classmethod
    def from_pretrained(cls, model: PreTrainedModel, folder: str | Path) -> Self:
        """Attach what `save_pretrained` of this class or of a PEFT model wrote.

        Raises:
            ValueError: a file is missing, or its weights are not those of this model's retro-fit; names one.
        """
        folder = Path(folder)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise ValueError(f"`folder` {folder} holds no retro-fit: it lacks {name}.")
        options = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
        handle = cls(model, RetroFitConfig(**options))
        with handle.installing():
            handle._load(folder / WEIGHTS_FILE)
        return handle

    def _load(self, path: Path) -> None:
        weights = {name.removeprefix(WEIGHTS_PREFIX): tensor for name, tensor in load_file(path).items()}
        own = self.adapter.state_dict()
        for name in sorted(own.keys() | weights.keys()):
            found = tuple(weights[name].shape) if name in weights else None
            wanted = tuple(own[name].shape) if name in own else None
            if found != wanted:
                raise ValueError(f"{path} has {name} of shape {found}, a retro-fit of this model has {wanted}.")
        self.adapter.load_state_dict(weights)


def retrofit(model: PreTrainedModel, config: RetroFitConfig | None = None) -> RetroFit:
    """Let a decoder read neighbours of its own chunks until the attachment is removed. Its weights are frozen.

        handle = retrofit(model, RetroFitConfig(chunk_size=32))
        optimizer = torch.optim.AdamW(handle.trainable_parameters(), lr=1e-3)
        loss = model(input_ids, labels=labels, retrieved=retrieved).loss
        model.generate(**handle.inputs(input_ids, retriever=retriever))

    Without `retrieved` and without a retriever the model is the stock one, bit for bit.

    Args:
        model: a decoder whose layers add attention and feed-forward one after the other.
        config: the options, `RetroFitConfig()` by default.

    Raises:
        TypeError: `model` is no transformers model.
        ValueError: its family cannot be retro-fitted; those that can are listed. Or an option does not fit it.
        RuntimeError: the model has retrieval already.
    """
    return RetroFit(model, config or RetroFitConfig())
