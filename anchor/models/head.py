"""Fused LM head and cross-entropy: logits exist for only one chunk of rows at a time.

1. For each chunk of target rows, compute logits in the compute dtype, then softmax and negative log-likelihood in
   float32.
2. Compute the chunk's gradients in the same step (softmax minus one-hot, times the row's weight). Backward then needs
   neither the logits nor the head's weight, so ZeRO-3 may release the weight after forward.

torch's own ``linear_cross_entropy`` (2.13) sums a bfloat16 loss in bfloat16: 1,500 rows of a 49,152-token head gave
16,768 instead of 17,221 nats. This one sums in float32, takes a weight per row, and runs on older torch.
"""

from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from anchor.errors import ModelError

_CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 27}


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, row_weight: Tensor, chunk_rows: int, gradient: bool
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        row_weight = row_weight.to(wide)
        nll = torch.empty(len(target), dtype=wide, device=hidden.device)
        # Tensors report requires_grad even inside torch.no_grad().
        need_hidden, need_weight = (gradient and needed for needed in ctx.needs_input_grad[:2])
        hidden_grad = torch.empty_like(hidden) if need_hidden else None
        # Summing many chunks in bfloat16 would lose small gradients.
        weight_grad = torch.zeros_like(weight, dtype=wide) if need_weight else None
        for start in range(0, len(target), chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = (hidden[rows] @ weight.T).to(wide)
            log_norm = torch.logsumexp(logits, dim=-1)
            nll[rows] = log_norm - logits.gather(1, target[rows, None])[:, 0]
            if not (need_hidden or need_weight):
                continue
            grad = logits.sub_(log_norm[:, None]).exp_()
            grad.scatter_add_(1, target[rows, None], grad.new_full((len(log_norm), 1), -1.0))
            grad = grad.mul_(row_weight[rows, None]).to(hidden.dtype)
            if hidden_grad is not None:
                torch.mm(grad, weight, out=hidden_grad[rows])
            if weight_grad is not None:
                weight_grad += grad.T @ hidden[rows]
        ctx.hidden_grad, ctx.weight_grad, ctx.weight_dtype = hidden_grad, weight_grad, weight.dtype
        ctx.mark_non_differentiable(nll)
        return (nll * row_weight).sum(), nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        hidden, weight = ctx.hidden_grad, ctx.weight_grad
        del ctx.hidden_grad, ctx.weight_grad
        hidden = None if hidden is None else hidden.mul_(grads[0])
        weight = None if weight is None else weight.mul_(grads[0]).to(ctx.weight_dtype)
        return hidden, weight, None, None, None, None


def chunked_cross_entropy(
    hidden: Float[Tensor, "R H"],
    weight: Float[Tensor, "V H"],
    target: Int[Tensor, " R"],
    row_weight: Float[Tensor, " R"],
    *,
    chunk_rows: int | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, " R"]]:
    """Compute the weighted sum of ``-log softmax(hidden @ weight.T)[target]`` without the full logits.

    Backward may run only once, because it consumes the buffers made in forward.

    Args:
        hidden: final-norm hidden states of the target rows.
        weight: weight of the head, tied or not.
        target: token ids, int64.
        row_weight: float32; multiplies each row's term.
        chunk_rows: number of rows whose logits exist at a time; None derives it from the device and V.

    Returns:
        The weighted sum (nats times weight) and each row's unweighted term (nats, no gradient); float32 or wider.
    """
    if chunk_rows is None:
        chunk_rows = max(64, _CHUNK_ELEMENTS.get(hidden.device.type, 1 << 24) // weight.shape[0])
    gradient = torch.is_grad_enabled()
    total, nll = _ChunkedCrossEntropy.apply(hidden, weight, target, row_weight, chunk_rows, gradient)
    return total, nll


def output_layer(causal_lm: PreTrainedModel) -> nn.Linear:
    """Return the model's ``lm_head``.

    Raises:
        ModelError: the model's files have none; sentence-transformers saves models this way.
    """
    layer = causal_lm.get_output_embeddings()
    if layer is None:
        raise ModelError(
            f"{causal_lm.name_or_path}: holds no lm_head.weight, without which it embeds but predicts no tokens; give "
            "a folder with the whole causal LM"
        )
    return cast(nn.Linear, layer)


class Head(nn.Module):
    """The LM head as a separate module, so that ZeRO-3 gathers its weight around :meth:`forward`.

    Args:
        linear: the model's ``lm_head``; its weight is shared, not copied.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(
        self, hidden: Float[Tensor, "R H"], target: Int[Tensor, " R"], row_weight: Float[Tensor, " R"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " R"]]:
        """Compute :func:`chunked_cross_entropy` with the head's weight."""
        return chunked_cross_entropy(hidden, self.weight, target, row_weight)
