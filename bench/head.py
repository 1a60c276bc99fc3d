"""LM head with cross-entropy, forward and backward: ours, torch's chunked one, Liger's, and full logits.

    python bench/head.py [--rows 2048 --hidden 576 --vocabulary 49152 --dtype bf16] [--json PATH]

``loss_error`` is relative to float64 on the same (rounded) inputs. Liger's fused kernel takes part on CUDA if
``liger_kernel`` is installed.
"""

import importlib.util
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from anchor.errors import exit_on_user_error
from anchor.models.backbone import DTYPES
from anchor.models.head import chunked_cross_entropy
from bench.harness import alternate, arguments, report


def main() -> None:
    options = arguments(__doc__ or "", rows=2048, hidden=576, vocabulary=49152, dtype="bf16")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    hidden = torch.randn(options.rows, options.hidden, device=device).to(DTYPES[options.dtype]).requires_grad_()
    weight = torch.randn(options.vocabulary, options.hidden, device=device).mul_(0.05).to(DTYPES[options.dtype])
    weight.requires_grad_()
    target = torch.randint(0, options.vocabulary, (options.rows,), device=device)
    ones = torch.ones(options.rows, device=device)
    with torch.no_grad():
        exact = sum(
            float(torch.nn.functional.cross_entropy(h.double() @ weight.double().T, t, reduction="sum"))
            for h, t in zip(hidden.split(256), target.split(256), strict=True)
        )

    def run(function):
        def turn() -> dict[str, float]:
            hidden.grad = weight.grad = None
            loss = function()
            loss.backward()
            return {"loss_error": abs(float(loss.detach()) / exact - 1)}

        return turn

    def full() -> torch.Tensor:
        return torch.nn.functional.cross_entropy((hidden @ weight.T).float(), target, reduction="sum")

    contestants = {"ours": lambda: chunked_cross_entropy(hidden, weight, target, ones)[0], "full logits": full}
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        contestants["torch chunked"] = lambda: torch.nn.functional.linear_cross_entropy(
            hidden, weight, target, reduction="sum", options=torch.nn.LinearCrossEntropyOptions()
        )
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None:
        fused = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(reduction="sum")
        contestants["Liger"] = lambda: fused(weight, hidden, target)
    rows = alternate({name: run(function) for name, function in contestants.items()}, options.turns)
    by_name = {row["contestant"]: row for row in rows}
    mine = by_name.pop("ours")
    ratios = {f"speed over {name}": row["seconds"] / mine["seconds"] for name, row in by_name.items()}
    ratios |= {f"peak_memory over {name}": mine["peak_gib"] / row["peak_gib"] for name, row in by_name.items()}
    report("head", rows, ratios, options)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
