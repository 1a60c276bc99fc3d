"""Memory of a run before it is started: pure arithmetic, no tensors, no files.

Notation: P parameters, Pt trained ones, W ranks, e bytes of the compute dtype; T tokens of a pack, R tokens of its
decode pass (reconstruction), h hidden, f intermediate, a query and k key-value size, L layers, V vocabulary.

**State** (ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054, sections 3 and 5, figure 1). AdamW keeps 12 bytes per
trained parameter: fp32 master, momentum, variance; gradients of several packs are summed in fp32, 4 bytes. ZeRO-2
divides these 16 by W, ZeRO-3 the weights too; ZeRO-0 (fp32 only) has no master copy and divides nothing. hpZ keeps the
weights a second time, divided by the node's ranks (ZeRO++: Wang et al. 2023, arXiv:2306.10209, section 3.2).

**Activations**: what autograd saves, layer by layer, in the manner of Korthikanti et al. 2022, arXiv:2205.05198,
section 4.1, for the layer that is used here: RMSNorm in fp32, SwiGLU, grouped queries, no dropout but LoRA's, and
attention kernels that do not keep scores (their term ``5 a s^2 b`` vanishes). :func:`layer_bytes_per_token` has the
terms.
"""

from dataclasses import dataclass
from typing import Any, Literal

from anchor.models.shape import ModelShape

# DeepSpeed's defaults of what a ds_configs file leaves out.
_BUCKET, MAX_LIVE = 500_000_000, 1_000_000_000
_HEAD_CHUNK = {"cpu": 1 << 24, "cuda": 1 << 27}
_SIMILARITY_CHUNK = {"cpu": 1 << 24, "cuda": 1 << 26}


@dataclass(frozen=True, slots=True)
class StepShape:
    """One optimiser step.

    Attributes:
        num_pairs: over all ranks.
        num_packs: over all ranks, on average.
        pack_tokens: T, encoded, of the pack that memory is estimated for.
        decode_tokens: R of that pack; 0 without a decode pass.
        step_tokens: tokens of all encode passes.
        step_decode_tokens: tokens of all decode passes, which are also the head's rows.
        squared_lengths: sum over all segments of both passes of their squared length.
        step_segments: texts encoded, over all ranks.
        gathered_segments: embeddings that a pooled loss gathers from all ranks; 0 when the loss is a sum over packs.
        predicted_tokens, step_predicted_tokens: rows of the head beyond those of the decode pass, of that pack and over
            all ranks: positive without a decode pass (language model), negative where the decode pass has positions
            that predict nothing (soft prompts but the last).
    """

    num_pairs: int
    num_packs: float
    pack_tokens: int
    decode_tokens: int
    step_tokens: float
    step_decode_tokens: float
    squared_lengths: float
    step_segments: float
    gathered_segments: float
    predicted_tokens: int = 0
    step_predicted_tokens: float = 0.0

    @property
    def pooled(self) -> bool:
        """Whether the loss needs the embeddings of all packs."""
        return self.gathered_segments > 0


@dataclass(frozen=True, slots=True)
class Setting:
    """How the run is run.

    Attributes:
        num_ranks: W.
        ranks_per_node: ranks that share fast links.
        element_bytes: e, 2 for bf16, 4 for fp32.
        zero: the ``zero_optimization`` section of the ds_configs file.
        kernel: ``backbone.attention``.
        checkpointing: ``backbone.gradient_checkpointing``.
        lora_rank: r, or None without adapters.
        lora_dropout: whether adapters drop out.
        device: ``cpu`` or ``cuda``: decides the size of chunks, and of what is allocated but never touched.
        frozen: whether nothing of the model is trained, only special tokens and projections beside it.
    """

    num_ranks: int
    ranks_per_node: int
    element_bytes: int
    zero: dict[str, Any]
    kernel: str
    checkpointing: bool
    lora_rank: int | None
    lora_dropout: bool
    device: Literal["cpu", "cuda"]
    frozen: bool = False

    @property
    def full(self) -> bool:
        """Whether all of the model is trained."""
        return self.lora_rank is None and not self.frozen

    @property
    def stage(self) -> int:
        return self.zero.get("stage", 0)


def layer_bytes_per_token(shape: ModelShape, setting: Setting) -> int:
    """Bytes that autograd saves per token in one transformer layer.

    * two norms: the input in fp32 (the residual itself when e = 4), one factor, and, where the weight is trained, the
      normalised input: ``2 (4 h + 4 + e h)``; Qwen3 has two more over a + k;
    * inputs of trained matrices: ``e (h + a + h + f)`` for q/k/v, o, gate/up, down; a frozen matrix saves none, but
      each adapter of it ``e (i + r)`` of its own dropped-out input of size i and ``i`` bytes of mask
      (``e i`` on a CPU);
    * attention: ``e`` times q, k, v (k and v repeated to a by ``segments`` and ``varlen``) and output, 4 bytes per
      head; ``segments`` also joins its outputs anew, which is the input of o counted above;
    * SwiGLU: ``3 e f``: gate, its activation, up.
    """
    e, h, f, a, k = (
        setting.element_bytes,
        shape.hidden_size,
        shape.intermediate_size,
        shape.query_size,
        shape.key_value_size,
    )
    full = setting.full
    norms, normed_rows = 2 * h, 2
    if shape.model_type == "qwen3":
        norms, normed_rows = norms + a + k, normed_rows + shape.num_heads * (a + k) // a
    total = norms * (4 + (e if full else 0)) + 4 * normed_rows
    if full:
        total += e * (2 * h + f) + (e * a if setting.kernel == "segments" else 0)
    elif setting.lora_dropout:
        mask = e if setting.device == "cpu" else 1
        total += sum((e + mask) * i + e * (setting.lora_rank or 0) for i in shape.adapter_inputs)
    elif not setting.frozen:
        inputs = 2 * h + f + (a if setting.kernel == "segments" else 0)
        total += e * inputs + sum(e * (setting.lora_rank or 0) for _ in shape.adapter_inputs)
    keys_and_values = 2 * k if setting.kernel == "flash" else 2 * a
    total += e * (2 * a + keys_and_values) + 4 * shape.num_heads
    return total + 3 * e * f


def activation_bytes(shape: ModelShape, setting: Setting, step: StepShape, *, checkpointing: bool) -> int:
    """Saved by the passes of one pack: encode, and decode where there is one.

    With checkpointing only each layer's input stays, ``e h`` per token (arXiv:2205.05198, section 5), and one layer is
    whole at a time. Added to both: input embeddings, final norm, and gradients in flight, ``3 e f`` per token.
    """
    tokens, e, h = step.pack_tokens + step.decode_tokens, setting.element_bytes, shape.hidden_size
    layer = layer_bytes_per_token(shape, setting)
    longest = max(step.pack_tokens, step.decode_tokens)
    whole = tokens * shape.num_layers * layer
    layers = tokens * shape.num_layers * e * h + longest * layer if checkpointing else whole
    ends = tokens * (4 + 2 * e) * h
    return int(layers + ends + longest * 3 * e * shape.intermediate_size)


def head_bytes(shape: ModelShape, setting: Setting, step: StepShape) -> int:
    """The chunked head: a chunk of logits in fp32 twice (logits, exponentials), gradients of hidden states and weight.

    The weight's gradient is summed in fp32 and then cast: ``(4 + e) V h``, only where the head is trained; the hidden
    states and their gradient are ``2 e h`` per row (:mod:`anchor.models.head`).
    """
    predicted = step.decode_tokens + step.predicted_tokens
    if not predicted:
        return 0
    rows = min(predicted, max(64, _HEAD_CHUNK[setting.device] // shape.vocabulary_size))
    weight = shape.vocabulary_size * shape.hidden_size if setting.full else 0
    e = setting.element_bytes
    chunk = rows * shape.vocabulary_size * 8
    return chunk + (4 + (e if e < 4 else 0)) * weight + 2 * e * shape.hidden_size * predicted


def pool_bytes(shape: ModelShape, setting: Setting, step: StepShape) -> int:
    """A pooled loss: fp32 embeddings of the step and their gradients, the gathered pool, and a chunk of similarities.

    Three arrays of a chunk exist at once (logits, exponentials, gradient). The gradient cache holds nothing else: the
    embeddings of this rank's packs and their gradient (Gao et al. 2021, arXiv:2101.06983, section 3.2).
    """
    if not step.pooled:
        return 0
    embeddings = step.step_segments * shape.embedding_size * 4
    similarities = min(_SIMILARITY_CHUNK[setting.device], step.num_pairs / setting.num_ranks * step.step_segments)
    return int(2 * embeddings + 2 * embeddings / setting.num_ranks + 3 * 4 * similarities)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one GPU; the host's share under offloading is apart.

    Attributes:
        weights, gradients, optimiser, master: state, all through the run.
        gathered: whole parameters under ZeRO-3, and hpZ's second copy.
        buckets: buffers of reductions and the largest gradient.
        activations, head, pool: of one pack.
        update: the flat copy of gradients that DeepSpeed makes in the update, when activations are gone.
        host: state that is offloaded to this rank's share of the host's memory.
    """

    weights: int
    gradients: int
    optimiser: int
    master: int
    gathered: int
    buckets: int
    activations: int
    head: int
    pool: int
    update: int
    host: int

    @property
    def state(self) -> int:
        """All through the run."""
        return self.weights + self.gradients + self.optimiser + self.master

    @property
    def peak(self) -> int:
        """Forward and backward, or the update, whichever is higher."""
        working = self.gathered + self.buckets + self.activations + self.head + self.pool
        return self.state + max(working, self.update)


def state_bytes(shape: ModelShape, setting: Setting) -> dict[str, int]:
    """``weights``, ``gradients``, ``optimiser``, ``master`` of one rank (arXiv:1910.02054, figure 1), padding included.

    ZeRO-3 pads every parameter to a multiple of W, ZeRO-2 its two flat groups to at most 2 W elements more, left out.
    """
    w, e = setting.num_ranks, setting.element_bytes
    whole, trained = shape.count(), shape.count(trained=True)
    if setting.stage == 0:
        return {"weights": e * whole, "gradients": 4 * trained, "optimiser": 8 * trained, "master": 0}
    if setting.stage == 3:
        whole = sum(-(-p.size // w) for p in shape.parameters)
        part = sum(-(-p.size // w) for p in shape.parameters if p.trained)
    else:
        part = -(-trained // w)
    return {"weights": e * whole, "gradients": 4 * part, "optimiser": 8 * part, "master": 4 * part}


def _gathered_bytes(shape: ModelShape, setting: Setting) -> int:
    """ZeRO-3's whole parameters, at most ``stage3_max_live_parameters`` at a time; one rank gathers nothing."""
    if setting.stage != 3 or setting.num_ranks == 1:
        return 0
    live = min(shape.count(), setting.zero.get("stage3_max_live_parameters", MAX_LIVE))
    second = setting.zero.get("zero_hpz_partition_size", 1)
    return setting.element_bytes * (live + (shape.count() // second if second > 1 else 0))


def _bucket_bytes(shape: ModelShape, setting: Setting) -> int:
    """Reduction buffers, one or (ZeRO-2 overlapping) two, and the largest gradient before it is reduced.

    A GPU allocates the whole buffer; a CPU only what is touched, at most the trained parameters.
    """
    trained = [p.size for p in shape.parameters if p.trained]
    largest = setting.element_bytes * max(trained)
    if setting.stage < 2:
        return largest
    bucket = setting.zero.get("reduce_bucket_size", _BUCKET)
    if setting.device == "cpu":
        bucket = min(bucket, sum(trained))
    copies = 2 if setting.stage == 2 and setting.zero.get("overlap_comm") else 1
    return largest + copies * setting.element_bytes * bucket


def memory(shape: ModelShape, setting: Setting, step: StepShape) -> Memory:
    """Peak memory of one rank.

    State and saved activations are exact (``tests/engine/test_estimate.py``). The peak is low: beside the resident
    memory of real steps on a CPU (``bench/memory_estimate.py``, SmolLM2-135M, bf16, ZeRO-3, one rank) it is 4.02 of
    4.32 GiB in Stage I with full fine-tuning and 1.95 of 2.50 GiB in Stage II with LoRA. It leaves out buffers of
    libraries, CUDA's context and fragmentation, and was not compared on a GPU or on several ranks.
    """
    state = state_bytes(shape, setting)
    host = 0
    update = state["gradients"]
    if "offload_optimizer" in setting.zero:
        host += state["gradients"] + state["optimiser"] + state["master"]
        state |= {"gradients": 0, "optimiser": 0, "master": 0}
        update = 0
    if "offload_param" in setting.zero:
        host += state["weights"]
        state["weights"] = 0
    return Memory(
        **state,
        gathered=_gathered_bytes(shape, setting),
        buckets=_bucket_bytes(shape, setting),
        activations=activation_bytes(shape, setting, step, checkpointing=setting.checkpointing),
        head=head_bytes(shape, setting, step),
        pool=pool_bytes(shape, setting, step),
        update=update if setting.stage else 0,
        host=host,
    )
