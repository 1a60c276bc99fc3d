"""Load a folder of trained special tokens in sentence-transformers >= 6. The export copies this file into the folder.

``SentenceTransformer(FOLDER, trust_remote_code=True)`` loads the base model that ``anchor.json`` names and the special
tokens' input embeddings and projections. To load the base from elsewhere, pass ``model_kwargs={"base": PATH}``.

The embedding of a text is ``mean over P of W_align(W_rec(h))``, where h are the final-norm hidden states of the P
special tokens that the tokenizer appends.

A base other than the one used in training is refused. Computing its fingerprint needs the xxhash package.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file
from sentence_transformers.sentence_transformer.modules import InputModule
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

log = logging.getLogger(__name__)

_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")


class AnchorEncoder(InputModule):
    """Encoder from token ids to ``sentence_embedding``, not normalised.

    Args:
        folder: the model folder.
        base: the base model's decoder, with its adapter if it has one.
        about: content of ``anchor.json``.
        weights: tensors of ``special_tokens.safetensors``.
    """

    def __init__(self, folder: Path, base: nn.Module, about: dict[str, Any], weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.folder, self.base = folder, base.requires_grad_(False)
        self.count, self.first_id = about["special_tokens"]["count"], about["special_tokens"]["first_id"]
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.max_seq_length: int = about["max_tokens"]
        self.rows = nn.Parameter(weights["rows"])
        self.reconstruction = _linear(weights, "reconstruction")
        self.alignment = _linear(weights, "alignment")

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> "AnchorEncoder":  # pyright: ignore[reportIncompatibleMethodOverride]
        """Load a folder or a hub repository.

        ``model_kwargs`` are passed to the base model, except ``base``, which says where to load it from.

        Raises:
            ValueError: the special tokens were trained with another base.
        """
        hub = {key: kwargs[key] for key in ("token", "cache_folder", "revision", "local_files_only") if key in kwargs}
        folder = Path(str(cls.load_dir_path(model_name_or_path, subfolder=subfolder, **hub)))
        about = json.loads((folder / "anchor.json").read_text(encoding="utf-8"))
        options = dict(kwargs.get("model_kwargs") or {})
        place = options.pop("base", None) or about["base"]["path"]
        # The user trusts this class, not the base's own code.
        own, base = (AutoConfig.from_pretrained(one, trust_remote_code=False) for one in (folder, place))
        for key in _SHAPE:
            if getattr(own, key) != getattr(base, key):
                raise ValueError(f"{place}: {key} is {getattr(base, key)}, expected {getattr(own, key)} by {folder}")
        if "torch_dtype" not in options:
            options.setdefault("dtype", "auto")
        options.setdefault("trust_remote_code", False)
        model: Any = AutoModelForCausalLM.from_pretrained(place, **options)
        _check_fingerprint(model.base_model, base.dtype, about["base"]["fingerprint"], place, folder)
        if (folder / "adapter").is_dir():
            try:
                from peft import PeftModel
            except ImportError as error:
                raise ImportError(f"{folder}: has an adapter, which needs the package peft; install it") from error
            model = PeftModel.from_pretrained(model, str(folder / "adapter")).get_base_model()
        return cls(folder, model.base_model, about, load_file(folder / "special_tokens.safetensors")).eval()

    def get_embedding_dimension(self) -> int:
        """Return the dimension of the embeddings."""
        return self.alignment.out_features

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **_: Any) -> dict[str, Any]:
        """Tokenise and pad texts; truncate to ``max_seq_length`` but keep the special tokens."""
        texts = [(prompt or "") + text for text in inputs]
        limit = {"truncation": True, "max_length": self.max_seq_length}
        return dict(self.tokenizer(texts, padding=True, return_tensors="pt", **limit))

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Add ``sentence_embedding`` to the features. Padding may be on either side."""
        ids, mask = features["input_ids"], features["attention_mask"]
        inputs = self.base.get_input_embeddings()(ids.clamp(max=self.first_id - 1))  # pyright: ignore[reportCallIssue]
        special = ids >= self.first_id
        inputs[special] = self.rows[ids[special] - self.first_id].to(inputs.dtype)
        places = (mask.cumsum(dim=1) - 1).clamp(min=0)
        hidden = self.base(
            inputs_embeds=inputs, attention_mask=mask, position_ids=places, use_cache=False
        ).last_hidden_state
        states = hidden[special].view(len(ids), self.count, -1).to(self.reconstruction.weight.dtype)
        features["sentence_embedding"] = self.alignment(self.reconstruction(states).mean(dim=1))
        return features

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Copy the loaded files; this module trains nothing."""
        for path in self.folder.iterdir():
            if path.name in ("anchor.json", "config.json", "special_tokens.safetensors"):
                shutil.copy(path, output_path)
        if (self.folder / "adapter").is_dir():
            shutil.copytree(self.folder / "adapter", Path(output_path) / "adapter", dirs_exist_ok=True)
        self.tokenizer.save_pretrained(output_path)


def _linear(weights: dict[str, Tensor], name: str) -> nn.Linear:
    weight = weights[f"{name}.weight"]
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.load_state_dict({"weight": weight, "bias": weights[f"{name}.bias"]})
    return linear


def _check_fingerprint(decoder: Any, stored: object, expected: str, place: str, folder: Path) -> None:
    """Refuse another base; only warn if its weights are on the meta device or rounded to another dtype."""
    weights = [decoder.norm.weight, decoder.get_input_embeddings().weight, decoder.layers[-1].self_attn.q_proj.weight]
    exact = (torch.float32, torch.bfloat16, stored)
    if any(weight.is_meta or weight.dtype not in exact for weight in weights):
        log.warning(
            "%s: loaded as %s, so whether it is the base of %s is not checked", place, weights[-1].dtype, folder
        )
        return
    found = _fingerprint(weights)
    if found != expected:
        raise ValueError(
            f"{place}: not the base of {folder}: fingerprint {found}, expected {expected}; give that model"
        )


def _fingerprint(parameters: Sequence[Tensor]) -> str:
    """Return the fingerprint of ``anchor.model_folder.description``, which a model folder lacks."""
    digest = xxhash.xxh3_64()
    for parameter in parameters:
        rows = parameter if parameter.dim() == 1 else parameter[:64]
        rounded = rows.detach().to("cpu", torch.bfloat16).float().contiguous()
        digest.update(rounded.numpy().astype("<f4").tobytes())
    return digest.hexdigest()
