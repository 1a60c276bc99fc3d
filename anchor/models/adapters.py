"""A model with its LoRA adapters switched off, also where layers are computed again in the backward pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """The model as it was before its adapter, if it has one, was added."""
    with _switched_off([module for module in model.modules() if isinstance(module, BaseTunerLayer)]):
        yield


@contextmanager
def _switched_off(layers: Sequence[BaseTunerLayer]) -> Iterator[None]:
    # peft's own switch also takes the gradient from the adapters, which the pass before this one still needs.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def checkpoint_contexts(model: nn.Module) -> Callable[[], tuple[AbstractContextManager, AbstractContextManager]]:
    """``context_fn`` of torch's checkpointing: a layer is computed again with its adapters as they were.

    Args:
        model: with its adapters in place.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        off = any(layer.disable_adapters for layer in layers[:1])
        return nullcontext(), _switched_off(layers) if off else nullcontext()

    return contexts
