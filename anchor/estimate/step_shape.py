"""Shape of one optimiser step, from a sample of batches or, as an upper bound, from a pack recipe."""

from dataclasses import replace

import numpy as np

from anchor.config.pack_recipe import PackRecipe
from anchor.config.train_recipe import TrainRecipe
from anchor.data.shards import Batch
from anchor.estimate.setting import StepShape
from anchor.objectives.base import Objective
from anchor.objectives.contrastive import gathered_segments


def sampled_step(objective: Objective, packing: PackRecipe, sample: list[Batch]) -> tuple[StepShape, StepShape]:
    """Return the mean step of a sample, with a full pack for the memory, and the same with the largest pack seen.

    Args:
        objective: tells the work of each pack; may live on the meta device.
        packing: how the shards were packed.
        sample: some of their batches.
    """
    totals, packs = np.zeros(6), []
    for batch in sample:
        for pack in (objective.prepare(p) for p in batch.packs):
            shape = objective.step_shape(pack)
            encoded, decoded = int(shape.encoded.sum()), int(shape.decoded.sum())
            squared = (shape.encoded**2).sum() + (shape.decoded**2).sum()
            packs.append((pack.num_tokens, encoded, decoded))
            totals += (
                encoded,
                decoded,
                squared,
                len(shape.encoded),
                pack.num_tokens,
                shape.head_rows - decoded,
            )
    tokens, decode_tokens, squared_lengths, segments, read, predicted = (float(t) / len(sample) for t in totals)
    pooled, pairs = objective.pooled_loss, packing.batch.pairs
    longest = max(packs)
    mean = StepShape(
        num_pairs=pairs,
        num_packs=len(packs) / len(sample),
        pack_tokens=round(packing.batch.pack_tokens * tokens / read),
        decode_tokens=round(packing.batch.pack_tokens * decode_tokens / read),
        step_tokens=tokens,
        step_decode_tokens=decode_tokens,
        squared_lengths=squared_lengths,
        step_segments=segments,
        gathered_segments=0.0 if pooled is None else pooled.gathered_segments(pairs, segments),
        predicted_tokens=round(packing.batch.pack_tokens * predicted / read),
        step_predicted_tokens=predicted,
    )
    return mean, replace(mean, pack_tokens=longest[1], decode_tokens=longest[2])


def bounded_step(recipe: TrainRecipe, packing: PackRecipe) -> StepShape:
    """Return the largest step that a pack recipe allows: every text has ``text.max_tokens`` tokens."""
    longest, batch, section = packing.text.max_tokens, packing.batch, recipe.objective
    term = section.contrastive_term
    read = batch.pairs * (2 + (packing.text.hard_negatives if term is not None else 0))
    segments = read if section.encodes_documents else batch.pairs
    decoded = section.num_decoded_sides * batch.pairs
    packed_tokens = batch.pairs * (2 + packing.text.hard_negatives) * longest
    return StepShape(
        num_pairs=batch.pairs,
        num_packs=float(batch.pack_multiple * max(1, -(-packed_tokens // (batch.pack_tokens * batch.pack_multiple)))),
        pack_tokens=round(batch.pack_tokens * segments / read),
        decode_tokens=round(batch.pack_tokens * decoded / read),
        step_tokens=float(segments * longest),
        step_decode_tokens=float(decoded * longest),
        squared_lengths=float((segments + decoded) * longest**2),
        step_segments=float(segments),
        gathered_segments=0.0 if term is None else gathered_segments(term, batch.pairs, float(segments)),
        predicted_tokens=batch.pack_tokens if section.predicts_encoded else 0,
        step_predicted_tokens=float(2 * batch.pairs * longest) if section.predicts_encoded else 0.0,
    )
