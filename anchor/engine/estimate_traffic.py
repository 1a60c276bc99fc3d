"""Communication of a run before it is started: what every rank sends, over which links, and for how long.

**Volume**, bytes that one rank sends per step by ring algorithms: gathering or scattering n bytes over g ranks costs
``n (g - 1) / g``, summing them twice that (Rajbhandari et al. 2020, arXiv:1910.02054, section 7). What is gathered
follows DeepSpeed (`tests/engine/test_traffic.py` counts the bytes of real runs):

* ZeRO-3 gathers a weight for every use, forward and backward, unless it is used again within
  ``stage3_max_reuse_distance`` elements of the order that DeepSpeed has recorded; then it stays
  (:func:`gathered_elements`). The gradient cache, a forward without a backward, breaks that order: nothing stays.
  Gradients are scattered once per pack.
* hpZ gathers a weight over all ranks once after every update and from its second copy, inside
  ``zero_hpz_partition_size`` ranks, at every other use (Wang et al. 2023, arXiv:2306.10209, section 3.2, has one use
  forward, one backward); a frozen weight's second copy lasts for the run. Writing the copy costs nothing on the links.
* ZeRO-2 sums gradients once per pack over all ranks, although each rank keeps its part alone
  (``use_multi_rank_bucket_allreduce``), and gathers the updated weights once per step.

**Time**, if nothing overlapped: inside a node at the speed of its links; between nodes NCCL runs as many rings as there
are adapters, each over another one, so a collective has all adapters of a node, or the node's links where they are
slower. Each message also waits for its ring: 3.4 microseconds per hop inside a node, 14 between nodes (constants of
NCCL's own model for the Simple protocol, `src/graph/tuning.cc`). Messages are at least the elements over the bucket.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from anchor.engine.estimate import Setting, StepShape
from anchor.engine.gpus import Gpu
from anchor.models.shape import ModelShape

MAX_REUSE, PREFETCH, BUCKET = 1_000_000_000, 50_000_000, 500_000_000  # DeepSpeed's defaults
_HOP_SECONDS, _NODE_HOP_SECONDS = 3.4e-6, 14e-6


@dataclass(frozen=True, slots=True)
class Transfer:
    """One kind of communication.

    Attributes:
        what: for people.
        step_bytes: sent by one rank in one step.
        inside_node: over the node's links only.
        num_ranks: of a ring.
        messages: per step, at least.
        rounds: of the ring per message: 1 gathers or scatters, 2 sums.
    """

    what: str
    step_bytes: float
    inside_node: bool
    num_ranks: int
    messages: int
    rounds: int = 1


@dataclass(frozen=True, slots=True)
class Gathered:
    """Elements that ZeRO-3 gathers for one pack, its forward without gradient left out.

    Attributes:
        forward, backward: elements.
    """

    forward: int
    backward: int


def gathered_elements(shape: ModelShape, setting: Setting, step: StepShape) -> Gathered:
    """Follow one pack through the model, weight by weight, as DeepSpeed does.

    A weight that is used is gathered unless it is still there; after its use it is released unless its next use comes
    within the reuse distance. Under the gradient cache nothing stays. Small weights that are never partitioned
    (``stage3_param_persistence_threshold``) are counted like the others: norms, less than a thousandth.
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
    """(number of a weight, whether in the backward) in the order of one pack.

    The decode pass reads the encode pass's input embeddings; frozen ones have no backward.
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
    """What one rank sends per step."""
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
        # Without prefetching every weight is a message of its own.
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
    """What ranks are connected by.

    Attributes:
        node_bytes_per_second: of one GPU to the others of its node, one direction.
        adapter_bytes_per_second: of one GPU's network adapter, one direction.
        ranks_per_node: GPUs, and adapters, of a node.
    """

    node_bytes_per_second: float
    adapter_bytes_per_second: float
    ranks_per_node: int

    @property
    def network_bytes_per_second(self) -> float:
        """Of a ring that crosses nodes: all adapters of a node, at most what its links carry."""
        return min(self.node_bytes_per_second, self.ranks_per_node * self.adapter_bytes_per_second)


def links_of(gpu: Gpu, adapter_bytes_per_second: float, ranks_per_node: int) -> Links:
    """The links of a kind of GPU."""
    return Links(gpu.link_bytes_per_second, adapter_bytes_per_second, ranks_per_node)


def moving_seconds(transfer: Transfer, links: Links) -> float:
    """Volume over speed."""
    speed = links.node_bytes_per_second if transfer.inside_node else links.network_bytes_per_second
    return transfer.step_bytes / speed


def waiting_seconds(transfer: Transfer, links: Links) -> float:
    """What the messages wait for their rings, one after the other."""
    nodes = -(-transfer.num_ranks // links.ranks_per_node)
    between = nodes - 1
    inside = transfer.num_ranks - 1 - between
    hop = inside * _HOP_SECONDS + between * _NODE_HOP_SECONDS
    return transfer.messages * transfer.rounds * hop
