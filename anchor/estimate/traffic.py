"""Estimate a run's communication before it starts: the bytes that each rank sends, over which links, and how long.

**Volume**: the bytes that one rank sends per step with ring algorithms. Gathering or scattering n bytes over g ranks
costs ``n (g - 1) / g``. Summing them costs twice that (Rajbhandari et al. 2020, arXiv:1910.02054, section 7). The
gathered elements follow DeepSpeed (`tests/engine/test_traffic.py` counts the bytes of real runs):

* ZeRO-3 gathers a weight for every use, forward and backward. It keeps a weight if its next use comes within
  ``stage3_max_reuse_distance`` elements of the order that DeepSpeed has recorded (:func:`gathered_elements`). The
  gradient cache runs a forward without a backward, which breaks that order, so nothing is kept. Gradients are scattered
  once per pack.
* hpZ gathers a weight over all ranks once after every update. At every other use it gathers from its second copy,
  inside ``zero_hpz_partition_size`` ranks (Wang et al. 2023, arXiv:2306.10209, section 3.2, has one use forward and one
  backward). A frozen weight's second copy lasts for the whole run. Writing the copy sends nothing over the links.
* ZeRO-2 sums gradients over all ranks once per pack, although each rank keeps only its part
  (``use_multi_rank_bucket_allreduce``). It gathers the updated weights once per step.

**Time** assumes no overlap. Inside a node it is the volume over the speed of the links. Between nodes NCCL runs one
ring per network adapter, so a collective uses all adapters of a node, or the node's links if they are slower. Each
message also waits for its ring: 3.4 microseconds per hop inside a node, 14 between nodes (constants of NCCL's own model
for the Simple protocol, `src/graph/tuning.cc`). There are at least as many messages as elements divided by the bucket
size.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from anchor.estimate.gpus import Gpu
from anchor.estimate.model_shape import ModelShape
from anchor.estimate.setting import Setting, StepShape

MAX_REUSE, PREFETCH, BUCKET = 1_000_000_000, 50_000_000, 500_000_000  # DeepSpeed's defaults
_HOP_SECONDS, _NODE_HOP_SECONDS = 3.4e-6, 14e-6


@dataclass(frozen=True, slots=True)
class Transfer:
    """One kind of communication.

    Attributes:
        what: name for people.
        step_bytes: bytes that one rank sends in one step.
        inside_node: True if it uses only the node's links.
        num_ranks: ranks in a ring.
        messages: messages per step, at least.
        rounds: rounds of the ring per message: 1 to gather or scatter, 2 to sum.
    """

    what: str
    step_bytes: float
    inside_node: bool
    num_ranks: int
    messages: int
    rounds: int = 1


@dataclass(frozen=True, slots=True)
class Gathered:
    """Elements that ZeRO-3 gathers for one pack, without the gradient cache's extra forward.

    Attributes:
        forward, backward: elements gathered in each pass.
    """

    forward: int
    backward: int


def gathered_elements(shape: ModelShape, setting: Setting, step: StepShape) -> Gathered:
    """Count the elements gathered while one pack passes through the model, weight by weight, as DeepSpeed does.

    A weight is gathered before its use unless it is still held. After its use it is released unless its next use comes
    within the reuse distance. Under the gradient cache nothing is kept. Small weights that are never partitioned
    (``stage3_param_persistence_threshold``) count like the others: these are norms, less than a thousandth.
    """
    reuse = setting.zero.get("stage3_max_reuse_distance", MAX_REUSE)
    if step.pooled and step.num_packs > setting.num_ranks:
        reuse = 0
    uses = list(_uses(shape, setting, step))
    sizes = [p.size for p in shape.parameters]
    held: set[int] = set()
    counts = {False: 0, True: 0}
    for i, (number, backward) in enumerate(uses):
        if number not in held:
            counts[backward] += sizes[number]
        held.discard(number)
        passed = 0
        for other, _ in uses[i + 1 :]:
            if passed >= reuse:
                break
            if other == number:
                held.add(number)
                break
            passed += sizes[other]
    return Gathered(counts[False], counts[True])


def _uses(shape: ModelShape, setting: Setting, step: StepShape) -> Iterator[tuple[int, bool]]:
    """Yield (number of a weight, True in the backward) in the order in which one pack uses the weights.

    The decode pass reads the encode pass's input embeddings. Frozen input embeddings have no backward.
    """
    groups = [p.group for p in shape.parameters]
    first = [i for i, group in enumerate(groups) if group == "input embeddings"]
    head = first if shape.tied else [i for i, group in enumerate(groups) if group == "output head"]
    layers = [i for i in range(len(groups)) if i not in {*first, *head}]
    last = head if step.decode_tokens or step.predicted_tokens else []
    passes = 2 if step.decode_tokens else 1
    backward = [*last, *layers[::-1] * passes, *(first if setting.full else [])]
    yield from ((number, False) for number in (*first, *layers * passes, *last))
    yield from ((number, True) for number in backward)


def transfers(shape: ModelShape, setting: Setting, step: StepShape) -> list[Transfer]:
    """Return all transfers of one rank in one step."""
    w, e = setting.num_ranks, setting.element_bytes
    if w == 1:
        return []
    packs = max(1.0, step.num_packs / w)
    trained = shape.count(trained=True)

    def ring(
        what: str, elements: float | int, bucket: int, *, rounds: int = 1, ranks: int = w, width: int = e
    ) -> Transfer:
        size = rounds * width * elements * (ranks - 1) / ranks
        return Transfer(what, size, ranks <= setting.ranks_per_node, ranks, math.ceil(elements / bucket), rounds)

    bucket = setting.zero.get("reduce_bucket_size", BUCKET)
    out: list[Transfer] = []
    if setting.stage == 3:
        # Without prefetching, each weight is a separate message.
        ahead = setting.zero.get("stage3_prefetch_bucket_size", PREFETCH) or shape.count() // len(shape.parameters)
        gathered = gathered_elements(shape, setting, step)
        node = min(w, setting.zero.get("zero_hpz_partition_size", 1))
        cached = step.pooled and packs > 1
        if node > 1:
            uses = packs * (gathered.forward * (2 if cached else 1) + gathered.backward)
            out.append(ring("gather weights after their update", trained, ahead))
            out.append(ring("gather weights from the second copy", uses - trained, ahead, ranks=node))
        else:
            if cached:
                out.append(ring("gather weights, forward without gradient", packs * gathered.forward, ahead))
            out.append(ring("gather weights, forward", packs * gathered.forward, ahead))
            if gathered.backward:
                out.append(ring("gather weights, backward", packs * gathered.backward, ahead))
        out.append(ring("scatter gradients", packs * trained, bucket))
    elif setting.stage == 2:
        out.append(ring("sum gradients", packs * trained, bucket, rounds=2))
        out.append(ring("gather updated weights", trained, setting.zero.get("allgather_bucket_size", BUCKET)))
    else:
        out.append(ring("sum gradients", trained, bucket, rounds=2))
    if step.pooled:
        pool = step.gathered_segments * shape.embedding_size
        out.append(ring("gather embeddings", pool, BUCKET, width=4))
        out.append(ring("sum their gradients", pool, BUCKET, rounds=2, width=4))
    return out


@dataclass(frozen=True, slots=True)
class Links:
    """Links between ranks.

    Attributes:
        node_bytes_per_second: from one GPU to the others of its node, one direction.
        adapter_bytes_per_second: speed of one GPU's network adapter, one direction.
        ranks_per_node: GPUs per node, and adapters per node.
    """

    node_bytes_per_second: float
    adapter_bytes_per_second: float
    ranks_per_node: int

    @property
    def network_bytes_per_second(self) -> float:
        """Speed of a ring that crosses nodes: all adapters of a node, capped by the node's links."""
        return min(self.node_bytes_per_second, self.ranks_per_node * self.adapter_bytes_per_second)


def links_of(gpu: Gpu, adapter_bytes_per_second: float, ranks_per_node: int) -> Links:
    """Return the links of a kind of GPU."""
    return Links(gpu.link_bytes_per_second, adapter_bytes_per_second, ranks_per_node)


def moving_seconds(transfer: Transfer, links: Links) -> float:
    """Return the seconds that the volume takes at the speed of its links."""
    speed = links.node_bytes_per_second if transfer.inside_node else links.network_bytes_per_second
    return transfer.step_bytes / speed


def waiting_seconds(transfer: Transfer, links: Links) -> float:
    """Return the seconds that the messages wait for their rings, one after the other."""
    nodes = -(-transfer.num_ranks // links.ranks_per_node)
    between = nodes - 1
    inside = transfer.num_ranks - 1 - between
    hop = inside * _HOP_SECONDS + between * _NODE_HOP_SECONDS
    return transfer.messages * transfer.rounds * hop
