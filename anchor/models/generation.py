"""Answers of a causal LM to prompts, sampled so that each is a function of its own random numbers.

1. What a model's ``generation_config.json`` says about sampling is read by :func:`read_sampling`, without the weights.
2. :class:`Generator` runs transformers' batched ``generate`` over left-padded prompts. The random numbers of a prompt
   are the caller's, one per new token: the token is the one at that quantile of the distribution (temperature, top-k,
   top-p and min-p applied as the configuration says). So neither batch mates nor an interruption change an answer, but
   for what padding does to the rounding of the model's arithmetic.
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
"""Settings that are not built here, and the values at which they do nothing."""
DEFAULT_TOP_K = 50
"""What transformers' ``generate`` takes where a configuration that samples does not state ``top_k``."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        greedy: the likeliest token always; then nothing else but ``repetition_penalty`` counts.
        temperature: divides the logits.
        top_k: only so many likeliest tokens; all when None.
        top_p: only the likeliest tokens of this mass together; all when None.
        min_p: only tokens of at least this share of the likeliest one's probability; all when None.
        repetition_penalty: of tokens that stand in the prompt or the answer (Keskar et al. 2019, arXiv:1909.05858).
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
    """What a model's generation configuration says to transformers' ``generate``; greedy where it has none.

    Args:
        path: model folder, hub name or GGUF file.
        tokenizer: of the model; its end-of-text token ends an answer too.

    Raises:
        ModelError: no such model, a way of sampling that is not built here, or no token that ends an answer.
    """
    location, config = resolve_model_path(path), read_config(path)
    found = GenerationConfig.from_model_config(config)  # of a GGUF file, and of a folder that has no other
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
    """``cpu``, ``cuda``, ... of a device that can be used.

    Args:
        name: as torch names it.

    Raises:
        ConfigError: no such device here.
    """
    try:
        return torch.zeros(1, device=name).device.type
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: cannot be used: {first_line(error)}") from error


class _Quantile(LogitsProcessor):
    """Makes the token at each row's next quantile the only one that is possible.

    Args:
        quantiles: in [0, 1), per row and new token.
    """

    def __init__(self, quantiles: Float[Tensor, "B N"]) -> None:
        self._quantiles = quantiles
        self._step = 0

    def __call__(self, input_ids: Int[Tensor, "B T"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        mass = scores.double().softmax(dim=-1).cumsum(dim=-1)
        wanted = self._quantiles[:, self._step, None] * mass[:, -1:]
        self._step += 1
        # The first token with more mass up to it than the quantile: it has some of its own.
        chosen = torch.searchsorted(mass, wanted, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


@dataclass(frozen=True, slots=True)
class Answer:
    """Token ids of an answer, without the one that ended it; ``cut``: none did, the limit was reached."""

    ids: list[int]
    cut: bool


class Generator:
    """A causal LM that answers.

    Args:
        path: model folder, hub name or GGUF file.
        sampling: of :func:`read_sampling`.
        dtype: ``bf16`` or ``fp32``.
        device: as torch names it.

    Raises:
        ModelError: no such model, or of an unsupported architecture.
    """

    def __init__(self, path: str, sampling: Sampling, dtype: str, device: str) -> None:
        model = load_causal_lm(path, DTYPES[dtype], "sdpa")
        output_layer(model)
        self._model = model.to(device).eval()  # pyright: ignore[reportArgumentType]
        self._sampling = sampling

    def answer(self, prompts: Sequence[list[int]], quantiles: np.ndarray) -> list[Answer]:
        """Answer a batch of prompts.

        Args:
            prompts: token ids.
            quantiles: float64 ``B N`` in [0, 1): random numbers of each prompt, one per new token; N is the limit.
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
        """In the order in which `generate` itself would apply them; the last one makes its argmax a draw."""
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
