"""Invariants: the chunked head equals full logits in loss and gradient, for any chunk size and row weights, and
sums in float32 whatever the compute dtype."""

import pytest
import torch

from anchor.models.head import chunked_cross_entropy


def _inputs(dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(50, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    target = torch.randint(0, 50, (37,), generator=generator)
    row_weight = torch.rand(37, generator=generator)
    return hidden, weight, target, row_weight


@pytest.mark.parametrize("chunk_rows", [1, 7, 37, 100])
def test_loss_and_gradient_equal_full_logits(chunk_rows):
    hidden, weight, target, row_weight = _inputs()
    total, nll = chunked_cross_entropy(hidden, weight, target, row_weight, chunk_rows=chunk_rows)
    (3.0 * total).backward()
    ours = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    rows = torch.nn.functional.cross_entropy(hidden @ weight.T, target, reduction="none")
    (3.0 * (rows * row_weight).sum()).backward()
    torch.testing.assert_close(nll.double(), rows.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total.double(), (rows * row_weight).sum(), rtol=1e-5, atol=1e-5)
    assert float(hidden.grad.norm()) > 1
    assert float(weight.grad.norm()) > 1
    torch.testing.assert_close(ours[0], hidden.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[1], weight.grad, rtol=1e-4, atol=1e-5)


def test_a_bfloat16_loss_is_summed_in_float32():
    """torch 2.13's linear_cross_entropy sums in bfloat16, which costs percents of the loss over thousands of rows."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(4000, 16, generator=generator).bfloat16()
    weight = torch.randn(300, 16, generator=generator).bfloat16()
    target = torch.randint(0, 300, (4000,), generator=generator)
    exact = torch.nn.functional.cross_entropy(hidden.float() @ weight.float().T, target, reduction="sum")
    total, _ = chunked_cross_entropy(hidden, weight, target, torch.ones(4000), chunk_rows=64)
    assert total.dtype == torch.float32
    assert abs(float(total / exact) - 1) < 1e-3


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, target, row_weight = _inputs()
    weight = weight.detach()
    total, _ = chunked_cross_entropy(hidden, weight, target, row_weight, chunk_rows=5)
    total.backward()
    assert float(hidden.grad.norm()) > 0
    assert weight.grad is None


def test_without_gradient_none_is_made(monkeypatch):
    """Regression: held-out evaluation computed the head's gradient: tensors report requires_grad inside no_grad too."""
    made = []
    zeros_like = torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda *a, **k: made.append("weight") or zeros_like(*a, **k))
    monkeypatch.setattr(torch, "mm", lambda *a, **k: made.append("hidden"))
    hidden, weight, target, row_weight = _inputs()
    with torch.no_grad():
        total, _ = chunked_cross_entropy(hidden, weight, target, row_weight, chunk_rows=5)
    assert made == []
    with_, _ = chunked_cross_entropy(hidden, weight, target, row_weight, chunk_rows=5)
    assert set(made) == {"weight", "hidden"}
    assert float(total) == float(with_.detach()) > 0


def test_rows_of_weight_zero_count_for_nothing():
    hidden, weight, target, row_weight = _inputs()
    row_weight[10:] = 0
    total, _ = chunked_cross_entropy(hidden, weight, target, row_weight, chunk_rows=4)
    total.backward()
    alone, _ = chunked_cross_entropy(hidden[:10], weight, target[:10], row_weight[:10])
    torch.testing.assert_close(total, alone)
    assert float(hidden.grad[10:].abs().max()) == 0
