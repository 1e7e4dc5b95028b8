"""`retrofit(model, config)`: give a decoder people already have retrieval, until it is taken away again.

Borgeaud et al. 2021, arXiv 2112.04426, section 2.6: the decoder stays frozen; only the encoder of neighbours and the
chunked cross-attention, between attention and feed-forward of some layers, are trained.
"""

from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..attachment import Attachment
from .retriever import Retriever
from .retrofit_adapter import make_adapter
from .retrofit_config import RetroFitConfig
from .retrofit_files import load_weights, read_options, write_retrofit
from .retrofit_hook import has_retrieval, install_retrieval
from .retrofit_inputs import retrieval_inputs


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
            self.on_removal(parameter.requires_grad_, True)

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
        described = self.config.to_dict() | {"base_model_name_or_path": self.model.name_or_path or None}
        write_retrofit(folder, self.adapter, described)
        return folder

    @classmethod
    def from_pretrained(cls, model: PreTrainedModel, folder: str | Path) -> Self:
        """Attach what `save_pretrained` of this class or of a PEFT model wrote.

        Raises:
            ValueError: a file is missing, or its weights are not those of this model's retro-fit; names one.
        """
        folder = Path(folder)
        handle = cls(model, RetroFitConfig(**read_options(folder)))
        with handle.installing():
            load_weights(handle.adapter, folder)
        return handle


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
