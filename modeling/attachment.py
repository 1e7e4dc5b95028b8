"""Everything done to a model someone else wrote, undone in reverse order.

All wings share one registered attention function, "graft". A served attention module gets a copied config that names
it, and a chain of steps. A step sees what attention sees and either computes the answer or proceeds to the next one;
steps that only watch come first, the implementation that the module had before comes last. Nothing is patched: the
module's class, forward and weights stay, and when the last step is taken out the original config object is put back.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

AttentionOutput = tuple[Tensor, Tensor | None]
AttentionFunction = Callable[..., AttentionOutput]
AttentionStep = Callable[..., AttentionOutput]
"""`step(proceed, module, query, key, value, attention_mask, **kwargs)`; `proceed(module, query, ...)` is the rest."""

IMPLEMENTATION = "graft"
_CHAIN = "graft_attention_chain"


class AttentionChain:
    """The steps of one attention module, first to last, and the config it had before us."""

    def __init__(self, original: PreTrainedConfig) -> None:
        self.original = original
        self.watching: list[AttentionStep] = []
        self.answering: list[AttentionStep] = []

    @property
    def steps(self) -> list[AttentionStep]:
        """All of them: what one answers, those that watch have seen, whichever was put in first."""
        return self.watching + self.answering

    def answers_alone(self, step: AttentionStep) -> bool:
        """Whether behind `step` there is only the implementation that the module had."""
        return not self.answering and bool(self.watching) and self.watching[-1] == step

    def base(self, module: nn.Module) -> AttentionFunction:
        """What the module would call without us; looked up at each call, so `set_attn_implementation` still acts."""
        eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        return ALL_ATTENTION_FUNCTIONS.get_interface(self.original._attn_implementation, eager)

    def proceed(self, position: int) -> AttentionFunction:
        """The attention function made of the steps from `position` on."""

        def rest(module: nn.Module, *args: Any, **kwargs: Any) -> AttentionOutput:
            steps = self.steps
            if position == len(steps):
                return self.base(module)(module, *args, **kwargs)
            return steps[position](self.proceed(position + 1), module, *args, **kwargs)

        return rest


def chained_attention(module: nn.Module, *args: Any, **kwargs: Any) -> AttentionOutput:
    """The attention function registered as "graft": run the module's chain from its first step."""
    chain: AttentionChain = getattr(module, _CHAIN)
    return chain.proceed(0)(module, *args, **kwargs)


AttentionInterface.register(IMPLEMENTATION, chained_attention)


def serve(module: nn.Module, step: AttentionStep, watches: bool = False) -> Callable[[], None]:
    """Put `step` in front of the attention of `module`; return what takes the same step out again.

    Args:
        module: of attention.
        step: what is to be asked.
        watches: whether `step` leaves the answer to others; then it is also in front of all steps that may answer.

    Raises:
        TypeError: the module does not dispatch its attention through its config.
    """
    chain = getattr(module, _CHAIN, None)
    if chain is None:
        config = getattr(module, "config", None)
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(
                f"{type(module).__name__} has no config, so its attention cannot be served: it must be a transformers "
                "attention module that calls ALL_ATTENTION_FUNCTIONS."
            )
        chain = AttentionChain(config)
        served = copy.copy(config)
        served._attn_implementation_internal = IMPLEMENTATION
        setattr(module, _CHAIN, chain)
        module.config = served  # type: ignore[assignment]
    steps = chain.watching if watches else chain.answering
    steps.insert(0, step)

    def take_out() -> None:
        position = next(i for i, other in enumerate(steps) if other is step)
        del steps[position]
        if not chain.steps:
            module.config = chain.original  # type: ignore[assignment]
            delattr(module, _CHAIN)

    return take_out


def stands_before(module: nn.Module, step: AttentionStep, implementation: str) -> bool:
    """Whether `step` proceeds to nothing but the module's own attention, and that is `implementation`.

    Then a step that watches may answer in its place: nobody else would have been asked.
    """
    chain: AttentionChain = getattr(module, _CHAIN)
    return chain.original._attn_implementation == implementation and chain.answers_alone(step)


def serves(module: nn.Module, step: AttentionStep) -> bool:
    """Whether `step` is in the chain of `module`."""
    chain = getattr(module, _CHAIN, None)
    return chain is not None and any(other is step for other in chain.steps)


class Attachment:
    """All that was done to a model, undone in reverse order by `remove()` or at the end of a `with`."""

    def __init__(self) -> None:
        self._undo = ExitStack()
        self.is_attached = True

    def __enter__(self) -> Self:
        self.check_attached()
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    @contextmanager
    def installing(self) -> Iterator[None]:
        """Install inside this `with`: an exception undoes what was done so far."""
        try:
            yield
        except BaseException:
            self.remove()
            raise

    def serve(
        self,
        module: nn.Module,
        step: AttentionStep,
        hook: Callable[..., Any] | None = None,
        watches: bool = False,
    ) -> None:
        """Put `step` in front of the attention of `module`, with `hook` as forward pre-hook, until removal.

        The hook is called as `hook(module, args, kwargs)` and may return new ones: it hands the step what attention
        functions are not given, such as the layer of the cache. For `watches` see the function `serve`.
        """
        self._undo.callback(serve(module, step, watches))
        if hook is not None:
            self.before(module, hook)

    def on_removal(self, function: Callable[..., Any], *args: Any) -> None:
        """Call `function(*args)` when this is removed."""
        self._undo.callback(function, *args)

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, kwargs)` before each forward of `module` until removal; it may return new ones."""
        self._undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, kwargs, output)` after each forward until removal; it may return a new output."""
        self._undo.callback(module.register_forward_hook(hook, with_kwargs=True).remove)

    def remove(self) -> None:
        """Undo everything; the model is then what it was, bit for bit. A second call does nothing."""
        self.is_attached = False
        self._undo.close()

    def check_attached(self) -> None:
        """Raise RuntimeError if `remove()` was called."""
        if not self.is_attached:
            raise RuntimeError("This attachment was removed from its model: attach again to use it.")


def device_of(model: PreTrainedModel) -> torch.device:
    """Where the input embeddings of `model` lie, so where its inputs belong."""
    device: torch.device = model.get_input_embeddings().weight.device  # type: ignore[assignment]
    return device
