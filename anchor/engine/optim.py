"""Parameter groups of the optimiser, and the learning rate as a pure function of the step."""

from typing import Any

from torch import nn

from anchor.config.train_recipe import OptimSection


def learning_rate(step: int, optim: OptimSection) -> float:
    """Return the learning rate: linear warm-up to ``lr``, then linear decay to zero at ``decay_steps``.

    Args:
        step: number of the step about to be taken, from 0; the first step already has a rate above 0.
        optim: the recipe's section.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    horizon = optim.decay_steps if optim.decay_steps is not None else optim.total_steps
    return optim.lr * max(0.0, (horizon - step) / max(1, horizon - optim.warmup_steps))


def parameter_groups(module: nn.Module, optim: OptimSection) -> list[dict[str, Any]]:
    """Return the trained parameters in torch's groups, without weight decay on vectors (norms and biases)."""
    matrices, vectors = [], []
    for parameter in module.parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 empties the tensor itself
            (matrices if len(shape) > 1 else vectors).append(parameter)
    groups = ((matrices, optim.weight_decay), (vectors, 0.0))
    return [{"params": group, "weight_decay": decay} for group, decay in groups if group]
