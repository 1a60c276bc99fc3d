"""Estimate a run's work, time and disk before it starts, in the notation of ``memory.py``.

**Work** (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): 2 FLOPs per matrix element and token forward, 4 backward
(2 if the matrix is frozen). Attention costs ``4 a l^2`` forward and twice that backward, per layer and segment of l
tokens, without halving for the causal mask. Recomputation (checkpointing, gradient cache) is work, but not model work.
"""

from dataclasses import dataclass

from anchor.estimate.gpus import Gpu
from anchor.estimate.model_shape import ADAPTERS, SPECIAL_TOKENS, ModelShape
from anchor.estimate.setting import Setting, StepShape


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs of one step over all ranks.

    Attributes:
        model: FLOPs that the mathematics needs.
        again: FLOPs that checkpointing and the gradient cache recompute.
    """

    model: float
    again: float

    @property
    def executed(self) -> float:
        return self.model + self.again


def work(shape: ModelShape, setting: Setting, step: StepShape) -> Work:
    """Return the FLOPs of one step.

    Follows arXiv:2204.02311, appendix B, with the head on its own rows and frozen matrices at 4.
    """
    tokens = step.step_tokens + step.step_decode_tokens
    layers = shape.count("attention") + shape.count("mlp")
    forward = 2 * layers * tokens + 4 * shape.num_layers * shape.query_size * step.squared_lengths
    adapters = 2 * shape.count(ADAPTERS) * tokens
    head = 2 * shape.vocabulary_size * shape.hidden_size * (step.step_decode_tokens + step.step_predicted_tokens)
    full = setting.full
    attention = 4 * shape.num_layers * shape.query_size * step.squared_lengths
    backward = 2 * forward if full else 2 * layers * tokens + 2 * attention
    model = forward + backward + 3 * adapters + (3 if full else 2) * head
    again = (forward + adapters) if setting.checkpointing else 0.0
    if step.pooled and step.num_packs > setting.num_ranks:
        encode = step.step_tokens / tokens
        again += (forward + adapters) * encode
    return Work(model, again)


def step_seconds(done: Work, gpu: Gpu, num_ranks: int, mfu: float) -> float | None:
    """Return the executed FLOPs over ``mfu`` of the ranks' peak, or None if the peak is unknown."""
    return None if gpu.bf16_flops is None else done.executed / (num_ranks * gpu.bf16_flops * mfu)


def checkpoint_bytes(num_trained: int, element_bytes: int, zero_stage: int) -> int:
    """Return the bytes of one checkpoint over all ranks.

    It holds fp32 master, momentum and variance of the trained parameters, and their weights unless under ZeRO-3, where
    the weights are the master copy. Frozen parameters are never written.

    Args:
        num_trained: trained parameters.
        element_bytes: bytes of a weight.
        zero_stage: 0 to 3.
    """
    return num_trained * (12 + (0 if zero_stage == 3 else element_bytes))


def export_bytes(shape: ModelShape, setting: Setting) -> int:
    """Return the bytes of the exported folder.

    It holds the whole causal LM in the compute dtype with adapters merged, and the adapters again beside it. Special
    tokens are exported in float32, without the causal LM.
    """
    adapters = shape.count(ADAPTERS)
    if shape.count(SPECIAL_TOKENS):
        return 4 * shape.count(SPECIAL_TOKENS) + setting.element_bytes * adapters
    return setting.element_bytes * (shape.count() - adapters) + setting.element_bytes * adapters
