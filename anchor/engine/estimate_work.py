"""Work, time, communication and disk of a run before it is started; the notation is that of ``estimate.py``.

**Work** (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): 2 FLOPs per matrix element and token forward, 4
backward (2 where the matrix is frozen), and attention ``4 a l^2`` forward, twice that backward, per layer and segment
of l tokens, causal halving not counted. Computing again (checkpointing, gradient cache) is work, but no model work.

**Communication**, bytes that one rank sends per step, ring algorithms: gathering or scattering n bytes over W ranks
costs ``n (W - 1) / W`` (Rajbhandari et al. 2020, arXiv:1910.02054, section 7). ZeRO-3 gathers the weights for every
forward and again for its backward and scatters gradients once per pack; hpZ gathers for the backward inside the node
(Wang et al. 2023, arXiv:2306.10209, section 3.2). A model that fits ``stage3_max_live_parameters`` and
``stage3_max_reuse_distance`` stays gathered from the first forward of a pack to the end of its backward. The two
backbone passes of reconstruction are two forwards.
"""

from dataclasses import dataclass

from anchor.engine.estimate import MAX_LIVE, Setting, StepShape
from anchor.engine.gpus import INTER_NODE_BYTES_PER_SECOND, Gpu
from anchor.models.shape import ADAPTERS, ModelShape

MAX_REUSE = 1_000_000_000  # DeepSpeed's default


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs of one step over all ranks.

    Attributes:
        model: what the mathematics asks for.
        again: computed a second time by checkpointing and gradient cache.
    """

    model: float
    again: float

    @property
    def executed(self) -> float:
        return self.model + self.again


def work(shape: ModelShape, setting: Setting, step: StepShape) -> Work:
    """FLOPs of one step (arXiv:2204.02311, appendix B, with the head on its own rows and frozen matrices at 4)."""
    tokens = step.step_tokens + step.step_decode_tokens
    layers = shape.count("attention") + shape.count("mlp")
    forward = 2 * layers * tokens + 4 * shape.num_layers * shape.query_size * step.squared_lengths
    adapters = 2 * shape.count(ADAPTERS) * tokens
    head = 2 * shape.vocabulary_size * shape.hidden_size * (step.step_decode_tokens + step.step_predicted_tokens)
    full = setting.lora_rank is None
    attention = 4 * shape.num_layers * shape.query_size * step.squared_lengths
    backward = 2 * forward if full else 2 * layers * tokens + 2 * attention
    model = forward + backward + 3 * adapters + (3 if full else 2) * head
    again = (forward + adapters) if setting.checkpointing else 0.0
    if step.pooled and step.num_packs > setting.num_ranks:
        encode = step.step_tokens / tokens
        again += (forward + adapters) * encode
    return Work(model, again)


def step_seconds(done: Work, gpu: Gpu, num_ranks: int, mfu: float) -> float | None:
    """Executed FLOPs over ``mfu`` of the ranks' peak; None where the peak is unknown."""
    return None if gpu.bf16_flops is None else done.executed / (num_ranks * gpu.bf16_flops * mfu)


@dataclass(frozen=True, slots=True)
class Transfer:
    """One kind of communication.

    Attributes:
        what: for people.
        step_bytes: sent by one rank in one step.
        inside_node: over the node's links only.
    """

    what: str
    step_bytes: float
    inside_node: bool


def transfers(shape: ModelShape, setting: Setting, step: StepShape) -> list[Transfer]:
    """What one rank sends per step."""
    w, e = setting.num_ranks, setting.element_bytes
    if w == 1:
        return []
    ring, inside = (w - 1) / w, w <= setting.ranks_per_node
    packs = max(1.0, step.num_packs / w)
    weights, gradients = e * shape.count() * ring, e * shape.count(trained=True) * ring
    out: list[Transfer] = []
    if setting.stage == 3:
        passes = 2 if step.decode_tokens else 1
        limits = {"stage3_max_live_parameters": MAX_LIVE, "stage3_max_reuse_distance": MAX_REUSE}
        kept = shape.count() <= min(setting.zero.get(name, default) for name, default in limits.items())
        first = packs * (1 if kept else passes)
        if step.pooled and packs > 1:
            out.append(Transfer("gather weights, forward without gradient", packs * weights, inside))
        out.append(Transfer("gather weights, forward", first * weights, inside))
        if not kept:
            node = setting.zero.get("zero_hpz_partition_size", 1)
            again = e * shape.count() * ((node - 1) / node if node > 1 else ring)
            out.append(Transfer("gather weights, backward", packs * passes * again, inside or node > 1))
        out.append(Transfer("scatter gradients", packs * gradients, inside))
    elif setting.stage == 2:
        out.append(Transfer("scatter gradients", packs * gradients, inside))
        out.append(Transfer("gather updated weights", gradients, inside))
    else:
        out.append(Transfer("sum gradients", 2 * gradients, inside))
    if step.pooled:
        pool = step.step_segments * shape.hidden_size * 4 * ring
        out.append(Transfer("gather embeddings, sum their gradients", 3 * pool, inside))
    return out


def transfer_seconds(sent: list[Transfer], gpu: Gpu) -> float:
    """Time on the links if nothing overlapped: the node's links inside, 50 GB/s per GPU between nodes."""
    speeds = {True: gpu.link_bytes_per_second, False: INTER_NODE_BYTES_PER_SECOND}
    return sum((t.step_bytes / speeds[t.inside_node] for t in sent), start=0.0)


def checkpoint_bytes(num_trained: int, element_bytes: int, zero_stage: int) -> int:
    """One checkpoint over all ranks: fp32 master, momentum and variance of trained parameters; weights unless ZeRO-3.

    Under ZeRO-3 the weights are the master copy; frozen parameters are never written.

    Args:
        num_trained: trained parameters.
        element_bytes: bytes of a weight.
        zero_stage: 0 to 3.
    """
    return num_trained * (12 + (0 if zero_stage == 3 else element_bytes))


def export_bytes(shape: ModelShape, setting: Setting) -> int:
    """The exported folder: the whole causal LM in the compute dtype, adapters merged and beside it."""
    adapters = shape.count(ADAPTERS)
    return setting.element_bytes * (shape.count() - adapters) + setting.element_bytes * adapters
