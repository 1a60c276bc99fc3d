"""Description of a folder of special tokens in ``anchor.json``, and the fingerprint of the base that it needs."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from transformers import PreTrainedModel

from anchor.errors import ModelError
from anchor.json_files import read_model_json

_FINGERPRINT_ROWS = 64


@dataclass(frozen=True, slots=True)
class Description:
    """Description of special tokens and their base in ``anchor.json``, read back by :func:`read_description`.

    Attributes:
        base: folder or hub name of the base.
        fingerprint: the base's fingerprint.
        count, first_id, dimension: as in :class:`SpecialTokens`.
    """

    base: str
    fingerprint: str
    count: int
    first_id: int
    dimension: int

    def to_json(self) -> dict[str, Any]:
        """Return the keys that describe the special tokens in ``anchor.json``."""
        return {
            "base": {"path": self.base, "fingerprint": self.fingerprint},
            "special_tokens": {"count": self.count, "first_id": self.first_id},
            "decoder": "base",  # decoding does not use the adapter
            "dimension": self.dimension,
        }


def read_description(folder: Path) -> Description:
    """Read the description in an exported folder.

    Raises:
        ModelError: ``anchor.json`` is missing or unreadable, comes from another objective, or lacks a field.
    """
    file = folder / "anchor.json"
    about = read_model_json(file)
    if "special_tokens" not in about:
        raise ModelError(f"{folder}: anchor.json names no special tokens; its objective is {about.get('objective')!r}")

    def field(kind: type, *names: str) -> Any:
        found: Any = about
        for name in names:
            found = found.get(name) if isinstance(found, dict) else None
        if type(found) is not kind or (kind is int and found < 1):
            expected = "a text" if kind is str else "a number, at least 1"
            raise ModelError(f"{file}: {'.'.join(names)} is {found!r}, expected {expected}; export again")
        return found

    return Description(
        base=field(str, "base", "path"),
        fingerprint=field(str, "base", "fingerprint"),
        count=field(int, "special_tokens", "count"),
        first_id=field(int, "special_tokens", "first_id"),
        dimension=field(int, "dimension"),
    )


def fingerprinted(causal_lm: PreTrainedModel) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """Return the parameters to fingerprint: final norm, input embeddings, and the last layer's query projection.

    The query projection reveals a merged adapter, which leaves the other two unchanged.
    """
    model: Any = causal_lm
    # A layer wrapped in an adapter still exposes the base's weight.
    last = model.base_model.layers[-1].self_attn.q_proj.weight
    return model.base_model.norm.weight, model.get_input_embeddings().weight, last


def fingerprint(parameters: Iterable[Tensor]) -> str:
    """Hash the first 64 rows of each parameter (xxh3, hex), to tell one base from another.

    The rows are rounded to bfloat16 first, so that the hash does not depend on whether the base was loaded in bfloat16
    or float32. They are hashed as little-endian float32.
    """
    digest = xxhash.xxh3_64()
    for parameter in parameters:
        rows = parameter if parameter.dim() == 1 else parameter[:_FINGERPRINT_ROWS]
        rounded = rows.detach().to("cpu", torch.bfloat16).float().contiguous()
        digest.update(rounded.numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def base_fingerprint(causal_lm: PreTrainedModel) -> str:
    """Return the :func:`fingerprint` of a base whose parameters are not partitioned."""
    return fingerprint(fingerprinted(causal_lm))


def check_base(causal_lm: PreTrainedModel, base: str, folder: Path) -> None:
    """Refuse a base other than the one that a folder's special tokens were trained with.

    Args:
        causal_lm: the base, not partitioned.
        base: the path or name from which it was loaded.
        folder: the model folder.

    Raises:
        ModelError: the fingerprints differ.
    """
    said, found = read_description(folder), base_fingerprint(causal_lm)
    if found != said.fingerprint:
        raise ModelError(
            f"{base}: not the base of {folder}: fingerprint {found}, expected {said.fingerprint} of {said.base}; give "
            "that model"
        )
