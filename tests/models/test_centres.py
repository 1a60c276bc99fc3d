"""Invariants: a frame's mean is over all ranks and packs of the last batch that held it; centred vectors have RMS 1;
means survive writing and reading; a text is centred by the longest frame that fits it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import run_distributed

from anchor.data.batches import rank_packs
from anchor.data.shards import ShardReader
from anchor.errors import ModelError
from anchor.models.centres import Centres, frames_of


def states_of(pack) -> torch.Tensor:
    """Return a state per segment that depends only on the segment's text."""
    return torch.stack([torch.randn(6, generator=torch.Generator().manual_seed(int(t) % 2**31)) for t in pack.text_ids])


def updated(shards: Path, rank: int = 0, world_size: int = 1) -> dict[str, torch.Tensor]:
    batch, centres = ShardReader(shards).read(0), Centres()
    for i in rank_packs(len(batch.packs), rank, world_size):
        pack = batch.packs[i]
        centres.vectors(states_of(pack), pack, training=True)
    centres.update(batch)
    return centres.to_tensors()


def means_of_rank(ranks, shards: Path) -> dict[str, torch.Tensor]:
    return updated(shards, ranks.rank, ranks.world_size)


@pytest.fixture(scope="module")
def shards(make_shards) -> Path:
    return make_shards(pairs=8, pack_multiple=2, num_rows=8)


def test_a_mean_is_over_the_frames_queries_and_positives_of_the_batch(shards):
    batch = ShardReader(shards).read(0)
    frames, states, roles = [], [], []
    for pack in batch.packs:
        frames += frames_of(pack)
        states.append(states_of(pack))
        roles += pack.roles.tolist()
    counted = [(f, s) for f, s, role in zip(frames, torch.cat(states), roles, strict=True) if role <= 1]
    assert 2 in roles, "hard negatives share the documents' frame and must not count"
    means = updated(shards)
    assert len(means) == len({f for f, _ in counted}) == 2
    for mean in means.values():
        expected = [torch.stack([s for f, s in counted if f == frame]).mean(dim=0) for frame, _ in counted]
        assert any(torch.allclose(mean, one, atol=1e-6) for one in expected)


def test_means_do_not_depend_on_packs_or_ranks(shards, make_shards):
    expected = updated(shards)
    finer = updated(make_shards(pairs=8, pack_multiple=8, num_rows=8))
    for found in (finer, *run_distributed(means_of_rank, 2, shards)):
        assert set(found) == set(expected)
        for name, mean in expected.items():
            assert torch.allclose(found[name], mean, atol=1e-6)
            assert float(mean.abs().max()) > 0.01


def test_vectors_are_centred_by_the_means_before_the_step_and_have_rms_one(shards):
    batch, centres = ShardReader(shards).read(0), Centres()
    pack = batch.packs[0]
    before = centres.vectors(states_of(pack), pack, training=True)
    first = centres.vectors(states_of(pack), pack, training=False)
    assert torch.equal(before, first), "an unseen frame has mean zero, whatever is being counted"
    for other in batch.packs[1:]:
        centres.vectors(states_of(other), other, training=True)
    centres.update(batch)
    after = centres.vectors(states_of(pack), pack, training=False)
    rows = torch.stack(
        [state - centres.means[frame] for state, frame in zip(states_of(pack), frames_of(pack), strict=True)]
    )
    assert not torch.allclose(after, before, atol=1e-2)
    np.testing.assert_allclose(after, rows / rows.square().mean(dim=1, keepdim=True).sqrt(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after.square().mean(dim=1), np.ones(len(rows)), rtol=1e-4)


def test_a_text_is_centred_by_the_longest_frame_that_it_begins_and_ends_with(tmp_path):
    centres = Centres()
    centres.means = {((1, 2), (9,)): torch.tensor([1.0, 0.0]), ((1, 2, 5, 6), (9,)): torch.tensor([0.0, 1.0])}
    assert centres.match([1, 2, 5, 6, 7, 9]) == ((1, 2, 5, 6), (9,))
    assert centres.match([1, 2, 5, 7, 9]) == ((1, 2), (9,))
    assert centres.match([1, 2, 5, 7]) is None
    vectors = centres.matched(torch.ones(3, 2), [[1, 2, 5, 6, 7, 9], [1, 2, 7, 9], [3, 9]])
    np.testing.assert_allclose(vectors, [[2**0.5, 0], [0, 2**0.5], [1, 1]], atol=1e-5)


def test_means_are_read_as_they_were_written(shards, tmp_path):
    from safetensors.torch import save_file

    means, file = updated(shards), tmp_path / "centres.safetensors"
    save_file(means, file)
    centres = Centres()
    centres.read(file)
    assert {name: mean.tolist() for name, mean in centres.to_tensors().items()} == {
        name: mean.tolist() for name, mean in means.items()
    }
    save_file({"frame": torch.zeros(2)}, file)
    with pytest.raises(ModelError, match=r"centres.safetensors: missing or unreadable \(JSONDecodeError\)"):
        centres.read(file)
