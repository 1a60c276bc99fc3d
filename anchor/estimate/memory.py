"""Estimate a run's memory before it starts: pure arithmetic, no tensors, no files.

Notation: P parameters, Pt trained parameters, W ranks, e bytes of the compute dtype; T tokens of a pack, R tokens of
its decode pass (reconstruction), h hidden, f intermediate, a query and k key-value size, L layers, V vocabulary.

**State** (ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054, sections 3 and 5, figure 1). AdamW keeps 12 bytes per
trained parameter: fp32 master weight, momentum and variance. The gradients of several packs are summed in fp32, 4 bytes
more. ZeRO-2 divides these 16 bytes by W, and ZeRO-3 divides the weights too. ZeRO-0 (fp32 only) has no master copy and
divides nothing. hpZ keeps a second copy of the weights, divided by the ranks of a node (ZeRO++: Wang et al. 2023,
arXiv:2306.10209, section 3.2).

**Activations**: the tensors that autograd saves, layer by layer, as in Korthikanti et al. 2022, arXiv:2205.05198,
section 4.1. The layer here has RMSNorm in fp32, SwiGLU, grouped queries, and no dropout except LoRA's. Its attention
kernels do not keep scores, so the paper's term ``5 a s^2 b`` vanishes. :func:`layer_bytes_per_token` lists the terms.
"""

from dataclasses import dataclass

from anchor.estimate.model_shape import ModelShape
from anchor.estimate.setting import Setting, StepShape

# DeepSpeed's defaults for settings that a ds_configs file leaves out.
_BUCKET, MAX_LIVE = 500_000_000, 1_000_000_000
_HEAD_CHUNK = {"cpu": 1 << 24, "cuda": 1 << 27}
_SIMILARITY_CHUNK = {"cpu": 1 << 24, "cuda": 1 << 26}


def layer_bytes_per_token(shape: ModelShape, setting: Setting) -> int:
    """Return the bytes that autograd saves per token in one transformer layer.

    * two norms: the input in fp32 (the residual itself when e = 4), one factor, and, if the weight is trained, the
      normalised input: ``2 (4 h + 4 + e h)``. Qwen3 has two more, over a + k.
    * inputs of trained matrices: ``e (h + a + h + f)`` for q/k/v, o, gate/up, down. A frozen matrix saves nothing. Each
      of its adapters saves ``e (i + r)`` for its own dropped-out input of size i, and ``i`` bytes of mask (``e i`` on a
      CPU).
    * attention: ``e`` times q, k, v and the output, plus 4 bytes per head. ``segments`` and ``varlen`` repeat k and v
      to size a. ``segments`` also concatenates its outputs, which gives the input of o counted above.
    * SwiGLU: ``3 e f`` for the gate, its activation, and up.
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
    """Return the bytes saved by the passes of one pack: encode, and decode if there is one.

    With checkpointing only each layer's input stays, ``e h`` per token (arXiv:2205.05198, section 5), plus one whole
    layer at a time. Both cases add the input embeddings, the final norm, and gradients in flight, ``3 e f`` per token.
    """
    tokens, e, h = step.pack_tokens + step.decode_tokens, setting.element_bytes, shape.hidden_size
    layer = layer_bytes_per_token(shape, setting)
    longest = max(step.pack_tokens, step.decode_tokens)
    whole = tokens * shape.num_layers * layer
    layers = tokens * shape.num_layers * e * h + longest * layer if checkpointing else whole
    ends = tokens * (4 + 2 * e) * h
    return int(layers + ends + longest * 3 * e * shape.intermediate_size)


def head_bytes(shape: ModelShape, setting: Setting, step: StepShape) -> int:
    """Return the bytes of the chunked head: a chunk of logits, and the gradients of hidden states and weight.

    The chunk exists twice in fp32 (logits, exponentials). The weight's gradient is summed in fp32 and then cast:
    ``(4 + e) V h``, only if the head is trained. The hidden states and their gradient take ``2 e h`` per row
    (:mod:`anchor.models.head`).
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
    """Return the bytes of a pooled loss: fp32 embeddings and gradients, the gathered pool, and a chunk of similarities.

    Three arrays of a chunk exist at once (logits, exponentials, gradient). The gradient cache adds nothing: it holds
    the embeddings of this rank's packs and their gradient (Gao et al. 2021, arXiv:2101.06983, section 3.2).
    """
    if not step.pooled:
        return 0
    embeddings = step.step_segments * shape.embedding_size * 4
    similarities = min(_SIMILARITY_CHUNK[setting.device], step.num_pairs / setting.num_ranks * step.step_segments)
    return int(2 * embeddings + 2 * embeddings / setting.num_ranks + 3 * 4 * similarities)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one GPU; memory offloaded to the host is listed separately.

    Attributes:
        weights, gradients, optimiser, master: state, held throughout the run.
        gathered: whole parameters under ZeRO-3, and hpZ's second copy.
        buckets: reduction buffers and the largest gradient.
        activations, head, pool: bytes for one pack.
        update: flat copy of the gradients that DeepSpeed makes in the update, when the activations are gone.
        host: state offloaded to this rank's share of the host's memory.
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
        """Bytes held throughout the run."""
        return self.weights + self.gradients + self.optimiser + self.master

    @property
    def peak(self) -> int:
        """Peak of forward and backward, or of the update, whichever is higher."""
        working = self.gathered + self.buckets + self.activations + self.head + self.pool
        return self.state + max(working, self.update)


def state_bytes(shape: ModelShape, setting: Setting) -> dict[str, int]:
    """Return ``weights``, ``gradients``, ``optimiser`` and ``master`` of one rank (arXiv:1910.02054, figure 1).

    ZeRO-3 pads every parameter to a multiple of W, which is included. ZeRO-2 pads its two flat groups by at most 2 W
    elements, which are left out.
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
    """Return the bytes of ZeRO-3's whole parameters and of hpZ's second copy; a single rank gathers nothing.

    At most ``stage3_max_live_parameters`` are whole at a time.
    """
    if setting.stage != 3 or setting.num_ranks == 1:
        return 0
    live = min(shape.count(), setting.zero.get("stage3_max_live_parameters", MAX_LIVE))
    second = setting.zero.get("zero_hpz_partition_size", 1)
    return setting.element_bytes * (live + (shape.count() // second if second > 1 else 0))


def _bucket_bytes(shape: ModelShape, setting: Setting) -> int:
    """Return the bytes of the reduction buffers and of the largest gradient before its reduction.

    From ZeRO-2 on there is one buffer, or two when ZeRO-2 overlaps communication. A GPU allocates the whole buffer. A
    CPU uses only the part that is touched, at most the trained parameters.
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
    """Estimate the peak memory of one rank.

    State and saved activations are exact (``tests/engine/test_estimate.py``). The peak is an underestimate: 4.02 of
    4.32 GiB in Stage I with full fine-tuning, and 1.95 of 2.50 GiB in Stage II with LoRA. Those are comparisons with
    the resident memory of real steps on a CPU (``bench/memory_estimate.py``, SmolLM2-135M, bf16, ZeRO-3, one rank). The
    estimate leaves out library buffers, CUDA's context and fragmentation. It has not been compared on a GPU or on
    several ranks.
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
