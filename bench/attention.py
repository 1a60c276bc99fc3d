"""Packed attention against padded SDPA on the same segments: forward and backward of one layer.

    python bench/attention.py --shards data/squad [--heads 9 --key-value-heads 3 --head-dim 64] [--calls 20]

A turn is ``calls`` forwards and backwards, because a single one is too short to time on a GPU. Segment lengths are
those of the first batch of the shards. ``varlen`` takes part on CUDA, and so does ``flash`` if the flash-attn package
is installed.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import is_flash_attn_2_available

sys.path.insert(0, str(Path(__file__).parents[1]))

from anchor.data.packing import cu_seqlens
from anchor.data.shards import ShardReader
from anchor.errors import exit_on_user_error
from anchor.models.attention import segments_attention, varlen_attention
from anchor.models.backbone import DTYPES
from bench.harness import alternate, arguments, report


def main() -> None:
    options = arguments(
        __doc__ or "", shards="data/squad", heads=9, key_value_heads=3, head_dim=64, dtype="bf16", calls=1
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    packs = ShardReader(Path(options.shards)).read(0).packs
    lengths = torch.cat([torch.from_numpy(pack.segment_lengths.copy()) for pack in packs])
    total, longest = int(lengths.sum()), int(lengths.max())
    torch.manual_seed(0)
    shape = {"query": options.heads, "key": options.key_value_heads, "value": options.key_value_heads}
    inputs = [
        torch.randn(1, heads, total, options.head_dim, device=device).to(DTYPES[options.dtype]).requires_grad_()
        for heads in shape.values()
    ]
    boundaries = torch.from_numpy(cu_seqlens(lengths.numpy())).to(device)
    scaling = options.head_dim**-0.5

    def packed(kernel):
        def call() -> dict[str, float]:
            out, _ = kernel(
                nn.Identity(), *inputs, None, cu_seq_lens_q=boundaries, max_length_q=longest, scaling=scaling
            )
            out.float().square().mean().backward()
            return {"mean_square": float(out.detach().float().square().mean())}

        return call

    def repeated(call):
        def turn() -> dict[str, float]:
            return [call() for _ in range(options.calls)][-1]

        return turn

    def flash() -> dict[str, float]:
        flash_attn: Any = importlib.import_module("flash_attn")
        q, k, v = (t[0].transpose(0, 1) for t in inputs)
        out = flash_attn.flash_attn_varlen_func(
            q, k, v, boundaries, boundaries, longest, longest, softmax_scale=scaling, causal=True
        )
        out.float().square().mean().backward()
        return {"mean_square": float(out.detach().float().square().mean())}

    mask = torch.arange(longest) < lengths[:, None]

    def padded() -> dict[str, float]:
        q, k, v = (pad_sequence(list(t[0].transpose(0, 1).split(lengths.tolist())), batch_first=True) for t in inputs)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling).transpose(1, 2)
        real = out[mask.to(device)]
        real.float().square().mean().backward()
        return {"mean_square": float(real.detach().float().square().mean())}

    contestants = {"segments": packed(segments_attention), "padded SDPA": padded}
    if device.type == "cuda":
        contestants["varlen"] = packed(varlen_attention)
        if is_flash_attn_2_available():
            contestants["flash"] = flash
    rows = alternate({name: repeated(call) for name, call in contestants.items()}, options.turns)
    by_name = {row["contestant"]: row for row in rows}
    best = min(by_name.keys() - {"padded SDPA"}, key=lambda name: by_name[name]["seconds"])
    ratios = {
        "speed": by_name["padded SDPA"]["seconds"] / by_name[best]["seconds"],
        "peak_memory": by_name[best]["peak_gib"] / by_name["padded SDPA"]["peak_gib"],
    }
    report("attention", rows, ratios, options)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
