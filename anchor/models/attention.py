"""Packed attention: one forward pass per pack, in which no token attends to another segment.

The recipe chooses one of three kernels. There is no fallback from one to another:

* ``segments``: one scaled-dot-product call per segment, on any device;
* ``varlen``: ``torch.nn.attention.varlen``, CUDA only, no extra package;
* ``flash``: the flash-attn package through transformers.

transformers passes ``cu_seq_lens_q`` and the other keywords of a model call on to the kernel. The mask functions
registered next to the kernels stop it from building a mask that no kernel reads.

A model whose ``config.is_causal`` is False passes ``is_causal=False`` to every kernel, flash included (transformers
>= 5.2, ``merge_with_config_defaults``). The attribute is saved with the model, so a loaded folder attends the same way.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import is_flash_attn_2_available

from anchor.errors import ModelError

IMPLEMENTATIONS = {"segments": "anchor_segments", "varlen": "anchor_varlen", "flash": "flash_attention_2"}
"""Recipe name -> transformers' ``attn_implementation``."""


def default_kernel(device_type: str, dtype: torch.dtype) -> str:
    """Return the default kernel for evaluating a model folder: ``varlen`` where it can run, else ``segments``."""
    return "varlen" if device_type == "cuda" and dtype != torch.float32 else "segments"


def implementation(kernel: str, device_type: str, dtype: torch.dtype) -> str:
    """Return transformers' name of a kernel; refuse a kernel that cannot run here.

    Raises:
        ModelError: ``flash`` without the package or CUDA, ``varlen`` without CUDA, or either in float32.
    """
    if kernel == "flash" and (device_type != "cuda" or not is_flash_attn_2_available()):
        raise ModelError(
            "backbone.attention is 'flash', which needs CUDA and the flash-attn package (requirements-gpu.txt); "
            "install it, or use 'varlen' on CUDA or 'segments' anywhere"
        )
    if kernel == "varlen" and device_type != "cuda":
        raise ModelError("backbone.attention is 'varlen', which needs CUDA; use 'segments' on this machine")
    if kernel != "segments" and dtype == torch.float32:
        raise ModelError(f"attention is '{kernel}', whose kernel knows no fp32; use bf16, or 'segments'")
    return IMPLEMENTATIONS[kernel]


def packed_kwargs(cu_seqlens: Tensor, max_length: int) -> dict[str, Any]:
    """Return the keywords that carry the segment boundaries from a model call to the kernel."""
    return {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max_length,
        "max_length_k": max_length,
        "use_cache": False,
    }


def _check_window(sliding_window: int | None, max_length: int) -> None:
    if sliding_window is not None and max_length > sliding_window:
        raise ModelError(
            f"the model attends {sliding_window} tokens back, a segment has {max_length}; "
            "pack again with text.max_tokens within the window"
        )


def segments_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool = True,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within each segment, with one SDPA call per segment.

    Args:
        module: the attention layer (unused).
        query: ``1 H T D``.
        key, value: ``1 G T D``, with G key-value heads.
        attention_mask: None; the boundaries are in ``cu_seq_lens_q``.
        cu_seq_lens_q: int32 ``S + 1``.
        max_length_q: tokens in the longest segment.
        scaling: multiplies the scores.
        dropout: dropout probability of the attention weights.
        sliding_window: the model's window, in tokens; longer segments are refused.
        is_causal: if True, a token attends only to itself and earlier tokens; if False, to its whole segment.

    Returns:
        The output ``1 T H D``, and None for the attention weights.
    """
    _check_window(sliding_window, max_length_q)
    lengths = cu_seq_lens_q.diff().tolist()
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    parts = [
        nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=is_causal, scale=scaling)
        for q, k, v in zip(*(t.split(lengths, dim=2) for t in (query, key, value)), strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


@functools.cache
def _takes_groups(kernel: Callable[..., Any]) -> bool:
    """Return whether torch's kernel supports fewer key heads than query heads; 2.13 does, the first version did not."""
    return "enable_gqa" in inspect.signature(kernel).parameters


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool = True,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within each segment with torch's variable-length flash kernel.

    The arguments are those of :func:`segments_attention`.
    """
    from torch.nn.attention.varlen import varlen_attn  # exists in CUDA builds only

    _check_window(sliding_window, max_length_q)
    if dropout:
        raise ModelError("backbone.attention 'varlen' has no attention dropout; use 'segments' or 'flash'")
    groups = query.shape[1] // key.shape[1]
    grouped: dict[str, Any] = {}
    if groups > 1 and _takes_groups(varlen_attn):
        grouped = {"enable_gqa": True}
    elif groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    q, k, v = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))
    # How many tokens each token sees before and after itself; -1 means all.
    window = (-1, 0) if is_causal else (-1, -1)
    out: Any = varlen_attn(
        q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling, window_size=window, **grouped
    )
    return out[None], None


def _no_mask(*_: Any, **__: Any) -> None:
    return None


for _name, _kernel in (("segments", segments_attention), ("varlen", varlen_attention)):
    AttentionInterface.register(IMPLEMENTATIONS[_name], _kernel)
    AttentionMaskInterface.register(IMPLEMENTATIONS[_name], _no_mask)
