"""Sample a causal LM's answers to prompts, each from its own random numbers.

1. :func:`read_sampling` reads the sampling settings from a model's ``generation_config.json``, without the weights.
2. :class:`Generator` runs transformers' batched ``generate`` over left-padded prompts. The caller supplies each
   prompt's random numbers, one per new token. Each number picks the token at that quantile of the distribution, after
   the configured temperature, top-k, top-p and min-p. So an answer does not depend on the rest of its batch or on
   interruptions, except for rounding differences due to padding.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from anchor.config.model_path import resolve_model_path
from anchor.errors import ConfigError, ModelError, first_line
from anchor.models.backbone import DTYPES, load_causal_lm, read_config
from anchor.models.head import output_layer

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "typical_p": (None, 1.0),
    "top_h": (None,),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "num_beams": (None, 1),
    "guidance_scale": (None, 1.0),
}
"""Unsupported settings, and the values at which they do nothing."""
DEFAULT_TOP_K = 50
"""Default of transformers' ``generate`` when a sampling configuration does not set ``top_k``."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling settings.

    Attributes:
        greedy: always take the likeliest token; of the other settings only ``repetition_penalty`` then applies.
        temperature: divides the logits.
        top_k: number of likeliest tokens to sample from; None for all.
        top_p: probability mass of the likeliest tokens to sample from; None for all.
        min_p: smallest probability to sample from, relative to the likeliest token's; None for all.
        repetition_penalty: penalty on tokens already in the prompt or answer (Keskar et al. 2019, arXiv:1909.05858).
        stop_ids: tokens that end an answer.
    """

    greedy: bool
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    stop_ids: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"stop_ids": list(self.stop_ids)}


def read_sampling(path: str, tokenizer: Any) -> Sampling:
    """Read a model's sampling settings as transformers' ``generate`` would; greedy if the model has none.

    Args:
        path: model folder, hub name or GGUF file.
        tokenizer: the model's tokenizer; its end-of-text token also ends an answer.

    Raises:
        ModelError: the model is missing, uses an unsupported sampling setting, or names no token that ends an answer.
    """
    location, config = resolve_model_path(path), read_config(path)
    found = GenerationConfig.from_model_config(config)  # for a GGUF file, or a folder without generation_config.json
    if location.gguf_file is None:
        with suppress(OSError):
            found = GenerationConfig.from_pretrained(location.name)
    for name, neutral in _NEUTRAL.items():
        if getattr(found, name, None) not in neutral:
            raise ModelError(
                f"{path}: generation_config.json sets {name} to {getattr(found, name)}, which is not supported; "
                "remove it"
            )
    ends = found.eos_token_id
    stops = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    if not stops:
        raise ModelError(f"{path}: neither generation_config.json nor the tokenizer names a token that ends a text")
    greedy = not found.do_sample or found.temperature == 0.0
    return Sampling(
        greedy=greedy,
        temperature=found.temperature or 1.0,
        top_k=None if greedy else DEFAULT_TOP_K if found.top_k is None else found.top_k or None,
        top_p=found.top_p,
        min_p=found.min_p,
        repetition_penalty=found.repetition_penalty or 1.0,
        stop_ids=tuple(sorted(cast(set[int], stops))),
    )


def device_kind(name: str) -> str:
    """Return the type of a usable device: ``cpu``, ``cuda``, ...

    Args:
        name: torch's name of the device.

    Raises:
        ConfigError: the device cannot be used here.
    """
    try:
        return torch.zeros(1, device=name).device.type
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: cannot be used: {first_line(error)}") from error


class _Quantile(LogitsProcessor):
    """Logits processor that allows only the token at each row's next quantile.

    Args:
        quantiles: one number in [0, 1) per row and new token.
    """

    def __init__(self, quantiles: Float[Tensor, "B N"]) -> None:
        self._quantiles = quantiles
        self._step = 0

    def __call__(self, input_ids: Int[Tensor, "B T"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        mass = scores.double().softmax(dim=-1).cumsum(dim=-1)
        wanted = self._quantiles[:, self._step, None] * mass[:, -1:]
        self._step += 1
        # The first token whose cumulative mass exceeds the quantile, so a token of zero probability is never chosen.
        chosen = torch.searchsorted(mass, wanted, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


@dataclass(frozen=True, slots=True)
class Answer:
    """Token ids of an answer, without its end token.

    Attributes:
        ids: the token ids.
        cut: the answer reached the length limit without an end token.
    """

    ids: list[int]
    cut: bool


class Generator:
    """A causal LM that answers prompts.

    Args:
        path: model folder, hub name or GGUF file.
        sampling: settings from :func:`read_sampling`.
        dtype: ``bf16`` or ``fp32``.
        device: torch's name of the device.

    Raises:
        ModelError: the model is missing, or its architecture is unsupported.
    """

    def __init__(self, path: str, sampling: Sampling, dtype: str, device: str) -> None:
        model = load_causal_lm(path, DTYPES[dtype], "sdpa")
        output_layer(model)
        self._model = model.to(device).eval()  # pyright: ignore[reportArgumentType]
        self._sampling = sampling

    def answer(self, prompts: Sequence[list[int]], quantiles: np.ndarray) -> list[Answer]:
        """Answer a batch of prompts.

        Args:
            prompts: token ids of each prompt.
            quantiles: float64 ``B N`` in [0, 1): each prompt's random numbers, one per new token. N limits the answer.
        """
        device, pad = self._model.device, self._sampling.stop_ids[0]
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        out: Any = cast(Any, self._model).generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=GenerationConfig(
                max_new_tokens=quantiles.shape[1],
                do_sample=False,
                repetition_penalty=self._sampling.repetition_penalty,
                eos_token_id=list(self._sampling.stop_ids),
                pad_token_id=pad,
            ),
            logits_processor=self._processors(quantiles, device),
        )
        return [_until_stop(row, self._sampling.stop_ids) for row in out[:, longest:].tolist()]

    def _processors(self, quantiles: np.ndarray, device: torch.device) -> LogitsProcessorList:
        """Return the processors in the order of `generate`; the last turns its argmax into a draw."""
        how, out = self._sampling, LogitsProcessorList()
        if how.greedy:
            return out
        out.append(TemperatureLogitsWarper(how.temperature))
        if how.top_k is not None:
            out.append(TopKLogitsWarper(how.top_k))
        if how.top_p is not None:
            out.append(TopPLogitsWarper(how.top_p))
        if how.min_p is not None:
            out.append(MinPLogitsWarper(how.min_p))
        out.append(_Quantile(torch.from_numpy(quantiles).to(device)))
        return out


def _until_stop(ids: list[int], stops: Sequence[int]) -> Answer:
    for position, token in enumerate(ids):
        if token in stops:
            return Answer(ids[:position], cut=False)
    return Answer(ids, cut=True)
