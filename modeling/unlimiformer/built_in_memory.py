"""What the permanent classes share: attention served from the start, documents remembered, code saved with weights."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..attachment import serve
from ..remote_code import SavesItsCode
from .attach import memory_attentions, remember
from .attend import offer_memory
from .memory import Memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Model
else:
    _Model = object


class BuiltInMemory(SavesItsCode, _Model):
    """Goes before a model with a language-modelling head in the bases; the config holds `unlimiformer_config`."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        attentions, step = memory_attentions(self, config.unlimiformer_config)
        for attention in attentions:
            serve(attention, step)
            attention.register_forward_pre_hook(offer_memory, with_kwargs=True)

    def remember(self, input_ids: Tensor, attention_mask: Tensor | None = None, progress: bool = False) -> Memory:
        """Read documents (documents, longest) of any length once; any number of questions may be asked of them."""
        options = self.config.unlimiformer_config
        return remember(self, options, (input_ids, attention_mask), progress)
