"""Shape of one optimiser step, from a sample of batches or, as an upper bound, from a pack recipe."""

from dataclasses import replace
from typing import Any

import numpy as np

from anchor.config.objectives import (
    ContrastiveSection,
    ContrastiveTermSection,
    LanguageModelSection,
    ReconstructionSection,
    SelfSupervisedSection,
)
from anchor.config.pack_recipe import PackRecipe, SpecialTokensTemplate
from anchor.config.train_recipe import TrainRecipe
from anchor.data.records import POSITIVE, QUERY
from anchor.data.shards import Batch, Pack
from anchor.estimate.setting import StepShape
from anchor.objectives.base import Objective
from anchor.objectives.language_model import LanguageModelObjective


def _decoded_roles(recipe: TrainRecipe) -> tuple[int, ...]:
    section = recipe.objective
    if isinstance(section, SelfSupervisedSection):
        return (POSITIVE,) if section.reconstruction_weight else ()
    if not isinstance(section, ReconstructionSection):
        return ()
    return tuple(role for role, weight in ((QUERY, 1 - section.alpha), (POSITIVE, section.alpha)) if weight)


def _contrastive(recipe: TrainRecipe) -> ContrastiveTermSection | None:
    section = recipe.objective
    if isinstance(section, ContrastiveSection):
        return section
    own = (ReconstructionSection, SelfSupervisedSection)
    return section.contrastive if isinstance(section, own) else None


def _gathered(recipe: TrainRecipe, num_pairs: int, segments: float) -> float:
    """Return how many embeddings are gathered from all ranks: documents, and queries if the loss compares with them."""
    section = _contrastive(recipe)
    if section is None:
        return 0.0
    queries = any(similarity.endswith("_to_query") for similarity in section.negatives)
    return segments if queries else segments - num_pairs


def _num_prefix(objective: Objective, recipe: TrainRecipe, packing: PackRecipe) -> int:
    """Return the number of decode prefix tokens and prefix vectors at the start of a decode row."""
    own = isinstance(recipe.objective, SelfSupervisedSection)
    vectors = packing.template.tokens if own and isinstance(packing.template, SpecialTokensTemplate) else 1
    return len(getattr(objective, "decode_prefix_ids", ())) + vectors


def _encodes_queries_only(recipe: TrainRecipe) -> bool:
    section = recipe.objective
    return isinstance(section, SelfSupervisedSection) and section.contrastive is None


def _decode_lengths(objective: Objective, recipe: TrainRecipe, packing: PackRecipe, pack: Pack) -> np.ndarray:
    """Return the tokens of each row of a pack's decode pass, int64."""
    roles = _decoded_roles(recipe)
    if not roles:
        return np.zeros(0, dtype=np.int64)
    starts = pack.body_starts
    if isinstance(recipe.objective, ReconstructionSection):
        reconstructor: Any = objective.reconstructor
        starts = reconstructor.target_starts(pack)
    lengths = pack.body_ends - starts + _num_prefix(objective, recipe, packing)
    return lengths[np.isin(pack.roles, roles)].astype(np.int64)


def sampled_step(
    objective: Objective, recipe: TrainRecipe, packing: PackRecipe, sample: list[Batch]
) -> tuple[StepShape, StepShape]:
    """Return the mean step of a sample, with a full pack for the memory, and the same with the largest pack seen.

    Args:
        objective: decides which segments are read; may live on the meta device.
        recipe: the training recipe.
        packing: how the shards were packed.
        sample: some of their batches.
    """
    totals, packs, predicted, idle = np.zeros(5), [], 0.0, _num_prefix(objective, recipe, packing) - 1
    for batch in sample:
        for pack in (objective.prepare(p) for p in batch.packs):
            encoded, decoded = pack.segment_lengths.astype(np.int64), _decode_lengths(objective, recipe, packing, pack)
            if _encodes_queries_only(recipe):
                encoded = encoded[pack.roles == QUERY]
            squared = (encoded**2).sum() + (decoded**2).sum()
            packs.append((pack.num_tokens, int(encoded.sum()), int(decoded.sum())))
            predicted -= idle * len(decoded) / len(sample)
            totals += (encoded.sum(), decoded.sum(), squared, len(encoded), pack.num_tokens)
    tokens, decode_tokens, squared_lengths, segments, read = (float(total) / len(sample) for total in totals)
    if isinstance(objective, LanguageModelObjective):
        predicted = sum(sum(objective.target_tokens(batch)) for batch in sample) / len(sample)
    longest = max(packs)
    mean = StepShape(
        num_pairs=packing.batch.pairs,
        num_packs=len(packs) / len(sample),
        pack_tokens=round(packing.batch.pack_tokens * tokens / read),
        decode_tokens=round(packing.batch.pack_tokens * decode_tokens / read),
        step_tokens=tokens,
        step_decode_tokens=decode_tokens,
        squared_lengths=squared_lengths,
        step_segments=segments,
        gathered_segments=_gathered(recipe, packing.batch.pairs, segments),
        predicted_tokens=round(packing.batch.pack_tokens * predicted / read),
        step_predicted_tokens=predicted,
    )
    return mean, replace(mean, pack_tokens=longest[1], decode_tokens=longest[2])


def bounded_step(recipe: TrainRecipe, packing: PackRecipe) -> StepShape:
    """Return the largest step that a pack recipe allows: every text has ``text.max_tokens`` tokens."""
    longest, batch = packing.text.max_tokens, packing.batch
    predicted = 2 * batch.pairs * longest if isinstance(recipe.objective, LanguageModelSection) else 0
    read = batch.pairs * (2 + (packing.text.hard_negatives if _contrastive(recipe) is not None else 0))
    segments = batch.pairs if _encodes_queries_only(recipe) else read
    decoded = len(_decoded_roles(recipe)) * batch.pairs
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
        gathered_segments=_gathered(recipe, batch.pairs, float(segments)),
        predicted_tokens=batch.pack_tokens if predicted else 0,
        step_predicted_tokens=float(predicted),
    )
