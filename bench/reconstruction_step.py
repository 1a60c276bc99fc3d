"""Forward and backward of one Stage I step: two packed passes against the paper's scheme of four padded ones.

    python bench/reconstruction_step.py --shards data/squad --model MODEL [--json PATH]
    python bench/reconstruction_step.py --shards data/squad --shape 8B --attention varlen,flash --checkpointing yes

The padded scheme follows the paper's description: encode queries, encode documents, decode each side from the other.
Every pass is padded to its longest text and computes full logits. Targets are the same, so the losses must agree, up to
bfloat16's noise if that is the dtype. ``--checkpointing yes`` recomputes layers on both sides: without it the padded
scheme needs more than 24 GiB for 32 SQuAD pairs and 135M parameters.

``--shape`` takes random weights with the dimensions of Llama-3.2-1B (1B) or Llama-3.1-8B (8B) instead of a model.
Several kernels, separated by commas, are one contestant each. All contestants share one copy of the weights. MFU is the
model's FLOPs (arXiv:2204.02311, appendix B; recomputation and padding add nothing) over the datasheet's peak, if the
GPU is known. ``data_prep pack`` makes shards of ``pairs`` real pairs per batch; the first batch is used.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1]))

from anchor.config.objectives import ReconstructionSection
from anchor.config.pack_recipe import PackRecipe
from anchor.config.train_recipe import TrainRecipe
from anchor.data.batches import to_tensors
from anchor.data.shards import Batch, ShardReader
from anchor.errors import exit_on_user_error
from anchor.estimate.gpus import peak_of_device
from anchor.estimate.model_shape import shape_of
from anchor.estimate.setting import setting_of
from anchor.estimate.step_shape import sampled_step
from anchor.estimate.work import work
from anchor.models.attention import implementation
from anchor.models.backbone import DTYPES, load_causal_lm
from anchor.objectives.reconstruction import ReconstructionObjective
from bench.harness import alternate, arguments, report
from bench.shapes import llama_config

IGNORE_INDEX = -100
ALPHA = 0.2


def texts(batch: Batch, role: int, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Return the ids of every segment of a role, and of its bare text."""
    whole, bodies = [], []
    for pack in batch.packs:
        starts = pack.segment_lengths.cumsum() - pack.segment_lengths
        for s in (pack.roles == role).nonzero()[0]:
            ids = torch.from_numpy(pack.input_ids[starts[s] : starts[s] + pack.segment_lengths[s]].astype("int64"))
            whole.append(ids.to(device))
            bodies.append(ids[pack.body_starts[s] : pack.body_ends[s]].to(device))
    return whole, bodies


def padded_step(model, batch: Batch, device: torch.device) -> dict[str, float]:
    """Run four padded passes with full logits."""
    sides, real, slots = [], 0, 0
    for role in (0, 1):
        whole, bodies = texts(batch, role, device)
        lengths = torch.tensor([len(ids) for ids in whole], device=device)
        ids = pad_sequence(whole, batch_first=True)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        hidden = model.base_model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        sides.append((hidden[torch.arange(len(whole)), lengths - 1], whole, bodies))
        real, slots = real + int(lengths.sum()), slots + ids.numel()
    loss = torch.zeros((), device=device)
    for (anchors, _, _), (_, whole, bodies), weight in ((*sides, ALPHA), (*sides[::-1], 1 - ALPHA)):
        body = pad_sequence(bodies, batch_first=True)
        inputs = torch.cat([anchors[:, None], model.get_input_embeddings()(body)], dim=1)
        lengths = torch.tensor([len(ids) + 1 for ids in bodies], device=device)
        mask = torch.arange(inputs.shape[1], device=device) < lengths[:, None]
        labels = [torch.cat([b, w[-1:]]) for b, w in zip(bodies, whole, strict=True)]
        target = pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)
        logits = model(inputs_embeds=inputs, attention_mask=mask.long(), use_cache=False).logits.float()
        loss = loss + weight * cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORE_INDEX)
        real, slots = real + int(lengths.sum()), slots + target.numel()
    loss.backward()
    model.zero_grad()
    return {"loss": float(loss.detach()), "padding_share": 1 - real / slots}


def packed_step(objective: ReconstructionObjective, batch: Batch, device: torch.device) -> dict[str, float]:
    """Run two packed passes per pack, with the chunked head."""
    total = 0.0
    for pack in batch.packs:
        loss = objective(to_tensors(objective.prepare(pack), device), batch).loss
        loss.backward()
        total += float(loss.detach())
    objective.zero_grad()
    return {"loss": total, "padding_share": 0.0}


def model_flops(causal_lm: PreTrainedModel, objective: ReconstructionObjective, reader: ShardReader) -> float:
    """Return the FLOPs of one step that the mathematics needs."""
    recipe = TrainRecipe.model_validate(
        {
            "output_dir": "none",
            "seed": 0,
            "data": {"shards": "none"},
            "backbone": {"path": "none", "trained": {"kind": "full"}, "attention": "segments"},
            "objective": {"kind": "reconstruction", "alpha": ALPHA},
            "optim": {"lr": 1, "warmup_steps": 0, "total_steps": 1},
            "engine": {"deepspeed": "none", "dtype": "bf16"},
        }
    )
    packing = PackRecipe.model_validate(reader.index.recipe)
    step, _ = sampled_step(objective, packing, [reader.read(0)])
    return work(shape_of(causal_lm), setting_of(recipe, {"stage": 0}), step).model


def load(options: Any, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load a model folder's weights, or make random ones of a shape."""
    if not options.shape:
        causal_lm: Any = load_causal_lm(options.model, dtype, "sdpa")
        return causal_lm.to(device)
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(llama_config(options.shape), dtype=dtype)


def main() -> None:
    options = arguments(
        __doc__ or "",
        shards="data/squad",
        model="MODEL",
        shape="",
        dtype="bf16",
        attention="segments",
        checkpointing="no",
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reader = ShardReader(Path(options.shards))
    batch = reader.read(0)
    causal_lm = load(options, DTYPES[options.dtype], device)
    objective = ReconstructionObjective(causal_lm, ReconstructionSection(kind="reconstruction", alpha=ALPHA))
    if options.checkpointing == "yes":
        causal_lm.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def packed(kernel: str) -> dict[str, float]:
        causal_lm.set_attn_implementation(implementation(kernel, device.type, DTYPES[options.dtype]))
        return packed_step(objective, batch, device)

    def padded() -> dict[str, float]:
        causal_lm.set_attn_implementation("sdpa")
        return padded_step(causal_lm, batch, device)

    kernels = options.attention.split(",")
    rows = alternate({f"packed, {k}": partial(packed, k) for k in kernels} | {"padded": padded}, options.turns)
    tokens = sum(objective.prepare(pack).num_tokens for pack in batch.packs)
    peak = peak_of_device(torch.cuda.get_device_name()) if device.type == "cuda" else None
    flops = model_flops(causal_lm, objective, reader)
    for row in rows:
        row["pairs_per_second"] = batch.num_pairs / row["seconds"]
        row["real_tokens_per_second"] = tokens / row["seconds"]
        if peak is not None:
            row["mfu"] = flops / row["seconds"] / peak
    ratios = {}
    for kernel, row in zip(kernels, rows[:-1], strict=True):
        ratios[f"{kernel}, speed"] = rows[-1]["seconds"] / row["seconds"]
        ratios[f"{kernel}, peak_memory"] = row["peak_gib"] / rows[-1]["peak_gib"]
        ratios[f"{kernel}, loss"] = row["loss"] / rows[-1]["loss"]
    report("reconstruction_step", rows, ratios, options)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
