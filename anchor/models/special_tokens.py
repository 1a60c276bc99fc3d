"""P trained special tokens and two projections over a frozen causal LM (LLM2Vec-Gen, arXiv:2603.10913).

1. The special tokens' ids are ``first_id ... first_id + P - 1``, after the base tokenizer's. Their input embeddings
   are ``rows``; all other tokens keep the base's. The base's embedding matrix is neither copied nor enlarged.
2. Every text ends in the P special tokens; h are their final-norm hidden states.
3. Soft prompts are ``p = W_rec h``. The embedding is ``e = mean over P of W_align p``, which equals ``W_align`` of the
   mean because ``W_align`` is affine.

A model folder stores only these parameters, in ``special_tokens.safetensors`` under their ``state_dict`` names.
``anchor.json`` names their base, which :func:`base_fingerprint` identifies.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from anchor.data.batches import PackTensors
from anchor.errors import ModelError
from anchor.json_files import load_json
from anchor.models.embedder import Embedder, unit_vectors

WEIGHTS_NAME = "special_tokens.safetensors"
_FINGERPRINT_ROWS = 64
_INITIAL_NOISE = 0.1
_CHUNK_ROWS = 8192


class SpecialTokens(nn.Module):
    """Input embeddings of the P special tokens, ``W_rec`` and ``W_align``.

    Args:
        count: P.
        hidden_size: H, the base's hidden size.
        dimension: D, the dimension of the teacher's embeddings and ours.
        first_id: token id of the first special token; the others follow.

    Attributes:
        rows: input embeddings of the special tokens, ``P H``.
        reconstruction: ``W_rec``, ``H -> H`` with bias.
        alignment: ``W_align``, ``H -> D`` with bias.
    """

    def __init__(self, count: int, hidden_size: int, dimension: int, first_id: int) -> None:
        super().__init__()
        self.first_id = first_id
        self.rows = nn.Parameter(torch.zeros(count, hidden_size))
        self.reconstruction = nn.Linear(hidden_size, hidden_size)
        self.alignment = nn.Linear(hidden_size, dimension)
        # Keep the sizes, because ZeRO-3 leaves the parameters empty.
        self.count, self.hidden_size, self.dimension = count, hidden_size, dimension

    def forward(self, input_ids: Int[Tensor, " T"], embed: Callable[[Tensor], Tensor]) -> Float[Tensor, "T H"]:
        """Return input embeddings: special tokens from ``rows``, all others from the base.

        Only this method reads ``rows``, so that ZeRO-3 gathers it around the call.

        Args:
            input_ids: token ids.
            embed: the base's input embedding; never called with a special token's id.
        """
        base = embed(input_ids.clamp(max=self.first_id - 1))
        own = self.rows[(input_ids - self.first_id).clamp(min=0)].to(base.dtype)
        return torch.where((input_ids >= self.first_id)[:, None], own, base)

    def read_out(
        self, hidden: Float[Tensor, "T H"], cu_seqlens: Int[Tensor, " S1"]
    ) -> tuple[Float[Tensor, "S P H"], Float[Tensor, "S D"]]:
        """Return soft prompts and embeddings (not normalised) of segments that end in the P special tokens.

        Args:
            hidden: final-norm hidden states of packed segments.
            cu_seqlens: boundaries of the segments.
        """
        places = cu_seqlens[1:, None].long() + torch.arange(-self.count, 0, device=hidden.device)
        prompts = self.reconstruction(hidden[places])
        return prompts, self.alignment(prompts.mean(dim=1))

    @torch.no_grad()
    def initialise(self, embeddings: Float[Tensor, "V H"], seed: int) -> None:
        """Set the rows near the mean of the base's embeddings, and the projections as torch initialises linear layers.

        transformers also puts new tokens at the mean. The noise makes the rows differ; in each dimension it is a tenth
        of the embeddings' standard deviation. The result depends on the seed and the embeddings only.

        Args:
            embeddings: the base's input embeddings; only rows before ``first_id`` are used.
            seed: seed of the noise and the projections.
        """
        total, squares = (torch.zeros(self.hidden_size, device=embeddings.device) for _ in range(2))
        known = embeddings[: self.first_id]
        for chunk in known.split(_CHUNK_ROWS):  # a float32 copy of all rows may take gigabytes
            total += chunk.float().sum(dim=0)
            squares += chunk.float().square().sum(dim=0)
        mean = total / len(known)
        deviation = (squares / len(known) - mean.square()).clamp(min=0).sqrt()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            noise = torch.randn(self.count, self.hidden_size)
            self.reconstruction.reset_parameters()
            self.alignment.reset_parameters()
        self.rows.copy_(mean.cpu() + _INITIAL_NOISE * deviation.cpu() * noise)


class SpecialTokensEmbedder(nn.Module):
    """A base with special tokens: packs -> soft prompts and embeddings. Training and serving use the same code.

    Args:
        causal_lm: the base, with a packed attention kernel and possibly adapters.
        special: the special tokens and projections.
    """

    def __init__(self, causal_lm: PreTrainedModel, special: SpecialTokens) -> None:
        super().__init__()
        self.embedder = Embedder(causal_lm)
        self.special = special

    def embed_tokens(self, input_ids: Int[Tensor, " T"]) -> Float[Tensor, "T H"]:
        """Return input embeddings, including those of special tokens."""
        return self.special(input_ids, self.embedder.embed_tokens)

    def encode(
        self, pack: PackTensors, inputs: Float[Tensor, "T H"] | None = None
    ) -> tuple[Float[Tensor, "S P H"], Float[Tensor, "S D"]]:
        """Return soft prompts and embeddings (not normalised) of all segments of a pack.

        Args:
            pack: segments that end in the P special tokens.
            inputs: their input embeddings; computed if None.
        """
        inputs = self.embed_tokens(pack.input_ids) if inputs is None else inputs
        hidden = self.embedder.hidden_states(inputs, pack.position_ids, pack.cu_seqlens, pack.max_length)
        return self.special.read_out(hidden.to(self.special.reconstruction.weight.dtype), pack.cu_seqlens)

    def forward(self, pack: PackTensors) -> Float[Tensor, "S D"]:
        """Return the unit vectors of all segments, float32 or wider."""
        return unit_vectors(self.encode(pack)[1])


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
    about = read_json(file)
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


def load_special_tokens(folder: Path) -> SpecialTokens:
    """Load the special tokens of an exported folder, in float32.

    Raises:
        ModelError: a file is missing or unreadable, or a tensor's shape contradicts ``anchor.json`` or
            ``config.json``.
    """
    said, hidden_size = read_description(folder), read_json(folder / "config.json").get("hidden_size")
    if not isinstance(hidden_size, int):
        raise ModelError(f"{folder / 'config.json'}: hidden_size is {hidden_size!r}, expected a number; export again")
    special = SpecialTokens(said.count, hidden_size, said.dimension, said.first_id)
    file = folder / WEIGHTS_NAME
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: missing or unreadable ({type(error).__name__}); export again") from error
    for name, tensor in special.state_dict().items():
        found, expected = shape_text(stored.get(name)), shape_text(tensor)
        if found != expected:
            raise ModelError(
                f"{file}: {name} is {found}, expected {expected} by anchor.json and config.json; export again"
            )
    special.load_state_dict({name: stored[name].float() for name in special.state_dict()})
    return special


def read_json(file: Path) -> dict[str, Any]:
    """Read the object in a JSON file of a model folder.

    Raises:
        ModelError: the file is missing or malformed, or does not hold an object.
    """
    try:
        content = load_json(file)
    except OSError as error:
        raise ModelError(f"{file}: not readable: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{file}: malformed JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: expected an object")
    return content


def shape_text(tensor: object) -> str:
    """Format a tensor's shape as ``"3 x 32"``; for any other value, return ``"missing"`` (None) or its type."""
    if isinstance(tensor, Tensor):
        return " x ".join(map(str, tensor.shape)) or "one number"
    return "missing" if tensor is None else type(tensor).__name__


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
