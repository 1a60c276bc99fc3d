"""Invariants: warm-up reaches the rate, decay reaches zero at the horizon, and no step is taken at rate zero."""

import pytest
import torch

from anchor.config.train_recipe import OptimSection
from anchor.engine.optim import learning_rate, parameter_groups


def test_rate_over_a_run():
    optim = OptimSection(lr=1.0, warmup_steps=4, total_steps=8)
    assert [learning_rate(s, optim) for s in range(9)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25, 0])


def test_decay_may_be_longer_than_the_run():
    """The paper decays over three epochs and stops earlier."""
    optim = OptimSection(lr=1.0, warmup_steps=0, total_steps=5, decay_steps=10)
    assert [learning_rate(s, optim) for s in (0, 4, 5)] == pytest.approx([1, 0.6, 0.5])


def test_decay_shorter_than_the_run_is_refused():
    with pytest.raises(ValueError, match=r"decay_steps \(4\) is less than total_steps \(5\)"):
        OptimSection(lr=1.0, warmup_steps=0, total_steps=5, decay_steps=4)


def test_vectors_and_frozen_parameters_are_not_decayed():
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    module[1].requires_grad_(False)
    groups = parameter_groups(module, OptimSection(lr=1.0, warmup_steps=0, total_steps=1, weight_decay=0.1))
    assert [(g["weight_decay"], [tuple(p.shape) for p in g["params"]]) for g in groups] == [
        (0.1, [(3, 2)]),
        (0.0, [(3,)]),
    ]
