"""Load a model's LoRA adapters, and switch them off, including when checkpointed layers are recomputed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from anchor.errors import UNSAFE_PICKLE, ModelError, weights_line


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Switch the model's adapters off inside the context; a no-op for a model without adapters."""
    with _switched_off([module for module in model.modules() if isinstance(module, BaseTunerLayer)]):
        yield


@contextmanager
def _switched_off(layers: Sequence[BaseTunerLayer]) -> Iterator[None]:
    # peft's own switch also turns off the adapters' gradients, which the preceding pass still needs.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def checkpoint_contexts(model: nn.Module) -> Callable[[], tuple[AbstractContextManager, AbstractContextManager]]:
    """Return a ``context_fn`` for torch's checkpointing that recomputes a layer with its adapters on or off as before.

    Args:
        model: the model, with its adapters already injected.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        off = any(layer.disable_adapters for layer in layers[:1])
        return nullcontext(), _switched_off(layers) if off else nullcontext()

    return contexts


def load_adapter(causal_lm: PreTrainedModel, folder: Path) -> None:
    """Add the adapter's layers to the model without merging: in bfloat16, merging would round the adapter away.

    Raises:
        ModelError: the adapter is unreadable or does not fit the model.
    """
    try:
        PeftModel.from_pretrained(causal_lm, str(folder), autocast_adapter_dtype=False)
    except (OSError, ValueError, RuntimeError, KeyError, *UNSAFE_PICKLE) as error:
        raise ModelError(f"{folder}: the adapter could not be loaded: {weights_line(error)}") from error
    causal_lm.requires_grad_(False)
