"""Low-rank updates of a frozen base, trained together with what a retro-fit adds to it: LoRA.

    y = W x + (alpha / r) B A x        A (r, in) begins at random, B (out, r) at 0 (Hu et al. 2021, arXiv 2106.09685)

Hooks add them behind the linear maps of the base's decoder layers. They are weights of the retro-fit: one folder holds
both, and whatever switches the retro-fit off switches them off.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..attachment import Attachment
from ..residual_tap import tappable_layers
from .retrofit_options import RetroFitOptions


class LowRankUpdate(nn.Module):
    """(alpha / r) B A x for one linear map."""

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=False)
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        update: Tensor = self.scale * self.up(self.down(x))
        return update


def _sizes(module: Any) -> tuple[int, int]:
    """What a linear map takes and gives."""
    sizes = (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)
    return int(sizes[0]), int(sizes[1])


def linear_maps(model: PreTrainedModel, names: list[str] | tuple[str, ...] | None) -> dict[str, nn.Module]:
    """The linear maps of a base's decoder layers, by a name that a module's child may have, such as "0-mlp-up_proj".

    Args:
        names: last parts of those wanted; None is all.

    Raises:
        ValueError: a name is that of no map, or the layers have PEFT's LoRA already.
    """
    layers = tappable_layers(model)
    if any(hasattr(module, "lora_A") for module in layers.modules()):
        raise ValueError(
            "`lora_rank` is for a base without LoRA, and this one has it: leave `lora_rank` out, or unload the LoRA."
        )
    maps = {name: module for name, module in layers.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    known = {name.rpartition(".")[2] for name in maps}
    if names is not None and (unknown := sorted(set(names) - known)):
        raise ValueError(f"`lora_targets` must be of {', '.join(sorted(known))}, got {unknown}.")
    wanted = known if names is None else set(names)
    return {name.replace(".", "-"): module for name, module in maps.items() if name.rpartition(".")[2] in wanted}


def low_rank_updates(model: PreTrainedModel, options: RetroFitOptions) -> nn.ModuleDict:
    """An update for each map that the options name; none without `lora_rank`.

    Raises:
        ValueError: see `linear_maps`.
    """
    updates = nn.ModuleDict()
    if options.lora_rank is not None:
        for name, module in linear_maps(model, options.lora_targets).items():
            updates[name] = LowRankUpdate(*_sizes(module), options.lora_rank, options.lora_alpha)
    return updates


def install_updates(
    attachment: Attachment, model: PreTrainedModel, updates: nn.ModuleDict, is_active: Callable[[], bool]
) -> None:
    """Let the maps of `model` be updated until `attachment` is removed."""
    maps = linear_maps(model, None) if len(updates) else {}
    for name, update in updates.items():
        attachment.after(maps[name], partial(_add, update, is_active))  # copied with a copy of the model


def _add(
    update: Any,
    is_active: Callable[[], bool],
    module: nn.Module,
    args: tuple[Tensor, ...],
    keywords: dict[str, Any],
    output: Tensor,
) -> Tensor | None:
    """What the map gives, with its update, which is computed in its own dtype as the other new weights are."""
    if not is_active():
        return None
    weight = update.up.weight
    added: Tensor = update(args[0].to(weight.device, weight.dtype))
    return output + added.to(output.device, output.dtype)
