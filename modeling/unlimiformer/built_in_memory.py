"""What the permanent classes share: attention served from the start, documents remembered, code saved with weights."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..attachment import serve
from ..cpu_linear import with_fast_linears
from ..remote_code import SavesItsCode
from .attend import offer_memory
from .memory import Memory
from .memory_attentions import memory_attentions
from .memory_size import MemorySize, documents_of
from .read_documents import append, remember, size_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Model
else:
    _Model = object


class BuiltInMemory(SavesItsCode, _Model):
    """Goes before a model with a language-modelling head in the bases; the config holds `unlimiformer_config`."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        with_fast_linears(self)
        attentions, step = memory_attentions(self, config.unlimiformer_config)
        for attention in attentions:
            serve(attention, step)
            attention.register_forward_pre_hook(offer_memory, with_kwargs=True)

    def remember(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        progress: bool = False,
        prefix_ids: Tensor | None = None,
        prefix_mask: Tensor | None = None,
    ) -> Memory:
        """Read documents (documents, longest) of any length once; any number of questions may be asked of them.

        `prefix_ids` (documents, tokens) stand in front of every window of an encoder.
        """
        return remember(
            self, self.config.unlimiformer_config, (input_ids, attention_mask), progress, (prefix_ids, prefix_mask)
        )

    def append(
        self, memory: Memory, input_ids: Tensor, attention_mask: Tensor | None = None, progress: bool = False
    ) -> Memory:
        """The memory of the same documents with `input_ids` (len(memory), longest) behind them."""
        return append(self, memory, self.config.unlimiformer_config, (input_ids, attention_mask), progress)

    def estimate(self, tokens: int | Sequence[int], prefix: int = 0) -> MemorySize:
        """Bytes of the memory of documents of so many tokens, and the windows to be read, `prefix` more in each."""
        return size_of(self, self.config.unlimiformer_config, documents_of(tokens, prefix))
