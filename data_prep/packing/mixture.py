"""Batches of an epoch: pure arithmetic on the recipe, the seed and each source's number of pairs.

1. A *pass* over a source is its pairs in the pass's own order, cut into ``b`` batches; the remainder is dropped. Passes
   follow one another, so batch k of a source is batch ``k mod b`` of pass ``k div b``.
2. The mixture sets the number of batches ``q`` of each source in an epoch. Epoch e has the batches ``e q ... (e+1) q``.
   What one epoch leaves out comes in the next, and no pair repeats before the rest of its pass.
3. The batches of an epoch are permuted, and the epochs are written one after another.
"""

import zlib
from dataclasses import dataclass

import numpy as np

from anchor.config.pack_recipe import CappedMixture, PackRecipe, TemperatureMixture


@dataclass(frozen=True, slots=True)
class Share:
    """A source's part of the mixture.

    Attributes:
        pairs: kept pairs of the source.
        per_pass: batches in a pass.
        per_epoch: batches in an epoch.
        remainder_pairs: pairs of a pass that fill no batch.
        passes: passes begun by the end of the last epoch.
    """

    pairs: int
    per_pass: int
    per_epoch: int
    remainder_pairs: int
    passes: int


def shares(pairs: dict[str, int], weights: dict[str, float], recipe: PackRecipe) -> dict[str, Share]:
    """Return each source's share; a source with at least one batch gives at least one per epoch.

    Args:
        pairs: number of kept pairs, by source.
        weights: weight of each source.
        recipe: gives the mixture, the batch size and the number of epochs.
    """
    size, mixture = recipe.batch.pairs, recipe.mixture
    per_pass = {name: count // size for name, count in pairs.items()}
    wanted = {name: weights[name] * count for name, count in per_pass.items()}
    if isinstance(mixture, CappedMixture):
        wanted = {name: min(count, mixture.max_pairs // size) for name, count in wanted.items()}
    elif isinstance(mixture, TemperatureMixture):
        scaled = {name: weights[name] * pairs[name] ** mixture.exponent if per_pass[name] else 0.0 for name in pairs}
        total = sum(per_pass.values()) / (sum(scaled.values()) or 1.0)
        wanted = {name: value * total for name, value in scaled.items()}
    out = {}
    for name, batches in per_pass.items():
        per_epoch = max(1, int(wanted[name] + 0.5)) if batches else 0
        passes = -(-recipe.epochs * per_epoch // batches) if batches else 0
        out[name] = Share(pairs[name], batches, per_epoch, pairs[name] - batches * size, passes)
    return out


def pass_order(seed: int, source: str, number: int) -> np.random.Generator:
    """Return the random generator that shuffles a pass.

    Its seed includes the source's name, so adding a source does not reshuffle the others.
    """
    return np.random.default_rng([seed, zlib.crc32(source.encode()), number])


def epoch_batches(shares: list[Share], seed: int, epoch: int) -> np.ndarray:
    """Return the batches of an epoch, in the order they are written.

    Returns:
        int64 ``batches x 2``: position of the source in ``shares``, number of the batch in the source.
    """
    parts = [
        np.stack([np.full(share.per_epoch, source), epoch * share.per_epoch + np.arange(share.per_epoch)], axis=1)
        for source, share in enumerate(shares)
    ]
    found = np.concatenate(parts).astype(np.int64)
    return found[np.random.default_rng([seed, epoch]).permutation(len(found))]
