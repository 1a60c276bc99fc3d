"""Engines that answer prompts: transformers' ``generate``, or vLLM if it is installed.

Each answer has its own random generator, seeded by the run's seed and the question's text. So an answer does not
depend on the rest of its batch, except through rounding in the model's arithmetic. The two engines draw different
answers.
"""

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from anchor.data.shards import text_id
from anchor.errors import ConfigError
from anchor.models.generation import Answer, Generator, Sampling

BATCH_TOKENS = {"transformers": 16_384, "vllm": 1_048_576}
"""Default token budget of a batch. transformers computes a batch at once; vLLM splits it into its own batches."""


class Engine(Protocol):
    """Model that answers a batch of (question, token ids of its prompt)."""

    def answer(self, batch: Sequence[tuple[str, list[int]]]) -> list[Answer]: ...


def choose_engine(name: str, model: str) -> str:
    """Return ``vllm`` or ``transformers``; ``auto`` means vLLM if it is installed and can read the model.

    Raises:
        ConfigError: if vLLM is requested but not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if name == "vllm" and not installed:
        raise ConfigError("--engine vllm: the package vllm is not installed; install it or use --engine transformers")
    if name == "auto":
        return "vllm" if installed and not model.endswith(".gguf") else "transformers"
    return name


def open_engine(
    name: str, model: str, sampling: Sampling, *, dtype: str, device: str, seed: int, limits: tuple[int, int]
) -> Engine:
    """Load the model.

    Args:
        name: engine chosen by :func:`choose_engine`.
        model: folder, hub name or GGUF file.
        sampling: how to choose tokens.
        dtype: ``bf16`` or ``fp32``.
        device: torch device; vLLM ignores it and uses the GPUs it sees.
        seed: seed of the run.
        limits: longest prompt and longest answer, in tokens.
    """
    if name == "vllm":
        return _Vllm(model, sampling, dtype, seed, limits)
    return _Transformers(Generator(model, sampling, dtype, device), seed, limits[1])


class _Transformers:
    def __init__(self, generator: Generator, seed: int, max_new_tokens: int) -> None:
        self._generator, self._seed, self._max_new_tokens = generator, seed, max_new_tokens

    def answer(self, batch: Sequence[tuple[str, list[int]]]) -> list[Answer]:
        quantiles = np.stack([_random(self._seed, text).random(self._max_new_tokens) for text, _ in batch])
        return self._generator.answer([ids for _, ids in batch], quantiles)


class _Vllm:
    def __init__(self, model: str, sampling: Sampling, dtype: str, seed: int, limits: tuple[int, int]) -> None:
        self._vllm: Any = importlib.import_module("vllm")
        self._sampling, self._seed, self._max_new_tokens = sampling, seed, limits[1]
        self._model: Any = self._vllm.LLM(
            model=model,
            dtype={"bf16": "bfloat16", "fp32": "float32"}[dtype],
            max_model_len=sum(limits),
            seed=seed,
            trust_remote_code=False,
            generation_config="vllm",  # `_parameters` gives all settings
        )

    def answer(self, batch: Sequence[tuple[str, list[int]]]) -> list[Answer]:
        prompts = [{"prompt_token_ids": ids} for _, ids in batch]
        how = [self._parameters(text) for text, _ in batch]
        found = self._model.generate(prompts, how, use_tqdm=False)
        return [Answer(self._without_stop(one.outputs[0]), one.outputs[0].finish_reason == "length") for one in found]

    def _without_stop(self, output: Any) -> list[int]:
        ids = list(output.token_ids)
        return ids[:-1] if ids and ids[-1] in self._sampling.stop_ids else ids

    def _parameters(self, text: str) -> Any:
        how = self._sampling
        return self._vllm.SamplingParams(
            temperature=0.0 if how.greedy else how.temperature,
            top_k=0 if how.greedy or how.top_k is None else how.top_k,
            top_p=1.0 if how.greedy or how.top_p is None else how.top_p,
            min_p=0.0 if how.greedy or how.min_p is None else how.min_p,
            repetition_penalty=how.repetition_penalty,
            max_tokens=self._max_new_tokens,
            stop_token_ids=list(how.stop_ids),
            seed=int(_random(self._seed, text).integers(2**63)),
            detokenize=False,
        )


def _random(seed: int, text: str) -> np.random.Generator:
    """Return the random generator of a question's answer."""
    return np.random.default_rng([seed, text_id(text) + (1 << 63)])
