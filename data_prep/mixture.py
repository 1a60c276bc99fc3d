"""Which batches an epoch has: pure arithmetic of the recipe, the seed and the number of pairs of each source.

1. A *pass* over a source is its pairs in an order of its own, cut into batches; the remainder of the pass is dropped.
   The passes follow one another, so batch k of a source is batch ``k mod b`` of pass ``k div b``.
2. The mixture says how many batches ``q`` of each source an epoch has. Epoch e has the batches ``e q ... (e+1) q``:
   what one epoch leaves out comes in the next, and no pair comes again before the others of its pass.
3. The batches of an epoch are permuted, and the epochs written one after another.
"""

import zlib
from dataclasses import dataclass

import numpy as np

from anchor.config.schema import CappedMixture, PackRecipe, TemperatureMixture


@dataclass(frozen=True, slots=True)
class Share:
    """A source's part of the mixture.

    Attributes:
        pairs: kept pairs of the source.
        per_pass: batches of one pass.
        per_epoch: batches of one epoch.
        remainder_pairs: pairs that fill no batch of a pass.
        passes: passes begun by the last epoch.
    """

    pairs: int
    per_pass: int
    per_epoch: int
    remainder_pairs: int
    passes: int


def shares(pairs: dict[str, int], weights: dict[str, float], recipe: PackRecipe) -> dict[str, Share]:
    """Batches per epoch of each source; a source with one batch or more gives at least one.

    Args:
        pairs: kept pairs by source.
        weights: of the sources.
        recipe: for the mixture, the size of a batch and the number of epochs.
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
    """What shuffles a pass. Seeded by name, so that adding a source does not reshuffle the others."""
    return np.random.default_rng([seed, zlib.crc32(source.encode()), number])


def epoch_batches(shares: list[Share], seed: int, epoch: int) -> np.ndarray:
    """Batches of an epoch in the order in which they are written.

    Returns:
        int64 ``batches x 2``: position of the source in ``shares``, number of the batch in the source.
    """
    parts = [
        np.stack([np.full(share.per_epoch, source), epoch * share.per_epoch + np.arange(share.per_epoch)], axis=1)
        for source, share in enumerate(shares)
    ]
    found = np.concatenate(parts).astype(np.int64)
    return found[np.random.default_rng([seed, epoch]).permutation(len(found))]
