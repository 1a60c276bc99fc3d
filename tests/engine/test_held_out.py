"""Invariants: held-out loss and retrieval do not depend on the ranks and do not touch training; nDCG@10 equals the
naive one; equal vectors score nothing."""

import json
import math

import numpy as np
import pytest
import torch
from distributed import run_distributed
from test_train import CONTRASTIVE, losses, train_ranks, write_recipe

from anchor.engine.held_out import _retrieval, _Side
from anchor.errors import ShardError


@pytest.fixture(scope="module")
def packed(make_shards):
    shape = {"pairs": 16, "pack_multiple": 2, "pack_tokens": 1024}
    return make_shards(**shape, num_rows=64), make_shards(**shape, num_rows=48, seed=5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model_dir, packed):
    """A run for each objective and number of ranks, with and without evaluation."""
    train, held_out = packed
    found = {}
    for kind, world_size, evaluates in (
        ("reconstruction", 1, True),
        ("reconstruction", 2, True),
        ("reconstruction", 1, False),
        ("contrastive", 2, True),
        ("contrastive", 1, True),
    ):
        changes = {"optim__total_steps": 4} | ({"objective": CONTRASTIVE} if kind == "contrastive" else {})
        if evaluates:
            changes["evaluation"] = {"shards": str(held_out), "every_steps": 2, "max_batches": 2}
        recipe = write_recipe(tmp_path_factory.mktemp("run"), tiny_model_dir, train, **changes)
        run_distributed(train_ranks, world_size, recipe, False)
        found[kind, world_size, evaluates] = recipe.parent / "run"
    return found


def rows(run):
    return [json.loads(line) for line in (run / "held_out.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["reconstruction", "contrastive"])
def test_held_out_metrics_do_not_depend_on_the_number_of_ranks(runs, kind):
    one, two = (rows(runs[kind, world_size, True]) for world_size in (1, 2))
    assert [row["step"] for row in one] == [0, 2, 4]
    assert {"held_out/loss_total_nats", "held_out/ndcg_at_10", "held_out/accuracy_at_1"} <= set(one[0])
    assert one[0]["held_out/loss_total_nats"] != one[-1]["held_out/loss_total_nats"]
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_evaluating_does_not_touch_training(runs):
    with_, without = (losses(runs["reconstruction", 1, evaluates]) for evaluates in (True, False))
    assert with_ == without
    assert not (runs["reconstruction", 1, False] / "held_out.jsonl").exists()


def side(vectors, text_ids, scores):
    return _Side(torch.tensor(vectors, dtype=torch.float32), torch.tensor(text_ids), torch.tensor(scores))


def test_ndcg_equals_the_naive_one():
    draw = np.random.default_rng(0)
    queries, documents = (draw.normal(size=(30, 4)).astype(np.float32) for _ in range(2))
    queries, documents = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (queries, documents))
    ids = [min(i, 27) for i in range(30)]  # the last three documents are copies
    documents[28:] = documents[27]
    gains, hits = [], []
    for q, query in enumerate(queries):
        scores = documents @ query
        order = [d for d in np.argsort(-scores) if d == q or ids[d] != ids[q]]
        rank = order.index(q)
        gains.append(1 / math.log2(rank + 2) if rank < 10 else 0.0)
        hits.append(rank == 0)
    positives = (queries * documents).sum(axis=1)
    found = _retrieval(
        side(queries, ids, positives), side(documents, ids, np.ones(30, np.float32)), torch.device("cpu")
    )
    assert 0 < np.mean(gains) < 1
    assert found["held_out/ndcg_at_10"] == pytest.approx(np.mean(gains), abs=1e-6)
    assert found["held_out/accuracy_at_1"] == pytest.approx(np.mean(hits))


def test_equal_vectors_score_nothing():
    same = [[1.0, 0.0]] * 20
    found = _retrieval(
        side(same, list(range(20)), [1.0] * 20), side(same, list(range(20)), [1.0] * 20), torch.device("cpu")
    )
    assert found == {"held_out/ndcg_at_10": 0.0, "held_out/accuracy_at_1": 0.0}


def test_vectors_that_are_no_numbers_score_nothing():
    """Regression: NaN vectors scored 1.0, since nothing is at least as similar as NaN."""
    ids, none = list(range(20)), [[math.nan, math.nan]] * 20
    found = _retrieval(side(none, ids, [math.nan] * 20), side(none, ids, [1.0] * 20), torch.device("cpu"))
    assert found == {"held_out/ndcg_at_10": 0.0, "held_out/accuracy_at_1": 0.0}


def test_held_out_shards_of_another_template_are_refused(tmp_path, tiny_model_dir, packed, make_shards):
    from anchor.config.load import load_recipe
    from anchor.config.train_recipe import TrainRecipe
    from anchor.engine.plan import make_plan

    other = make_shards(pairs=16, pack_multiple=2, pack_tokens=1024, template={"kind": "preset", "name": "plain"})
    changes = {"evaluation": {"shards": str(other), "every_steps": 2}}
    recipe = write_recipe(tmp_path, tiny_model_dir, packed[0], **changes)
    with pytest.raises(ShardError, match=r"evaluation.shards .* different tokenizers or templates"):
        make_plan(load_recipe(recipe, TrainRecipe), str(recipe), 1)
