"""Invariants: an answer is a function of its prompt and its own random numbers, not of its batch; tokens are drawn from
the distribution that the generation configuration describes; what is not supported is refused by name.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    TopKLogitsWarper,
)

from anchor.errors import ModelError
from anchor.models.generation import Generator, Sampling, read_sampling

SAMPLED = Sampling(False, 0.7, 20, 0.9, None, 1.0, (2,))
GREEDY = Sampling(True, 1.0, None, None, None, 1.0, (2,))
PROMPTS = [[5, 9, 30, 31], [40, 41], [7, 8, 9, 10, 11, 12, 13], [60]]


def quantiles(rows: int, tokens: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((rows, tokens))


def test_an_answer_does_not_depend_on_its_batch(tiny_model_dir: Path) -> None:
    generator = Generator(str(tiny_model_dir), SAMPLED, "fp32", "cpu")
    numbers = quantiles(4)
    together = generator.answer(PROMPTS, numbers)
    alone = [generator.answer([prompt], numbers[[i]])[0] for i, prompt in enumerate(PROMPTS)]
    assert together == alone
    assert len({tuple(answer.ids) for answer in together}) == 4
    assert generator.answer(PROMPTS, quantiles(4, seed=1)) != together


def test_greedy_answers_are_those_of_transformers(tiny_model_dir: Path) -> None:
    generator = Generator(str(tiny_model_dir), GREEDY, "fp32", "cpu")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    found = generator.answer(PROMPTS, quantiles(4, 8))
    for prompt, answer in zip(PROMPTS, found, strict=True):
        ids = list(prompt)
        for _ in range(8):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        expected = ids[len(prompt) :]
        assert answer.ids == (expected[: expected.index(2)] if 2 in expected else expected)
        assert answer.cut == (2 not in expected)


def test_tokens_are_drawn_from_the_distribution_that_is_asked_for(tiny_model_dir: Path) -> None:
    how = Sampling(False, 0.05, 8, 0.95, None, 1.0, (2,))
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    logits = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].double() / how.temperature
    best = logits.topk(8)
    share = best.values.softmax(0)
    kept = int((share.cumsum(0) < 0.95).sum()) + 1
    assert kept > 1
    expected = dict(zip(best.indices[:kept].tolist(), (share[:kept] / share[:kept].sum()).tolist(), strict=True))
    draws = 4000
    # Equally spaced quantiles: the counts are the probabilities, but for one at each border.
    numbers = ((np.arange(draws) + 0.5) / draws)[:, None]
    generator = Generator(str(tiny_model_dir), how, "fp32", "cpu")
    found = [answer.ids for answer in generator.answer([PROMPTS[0]] * draws, numbers)]
    assert {ids[0] for ids in found if ids} == {token for token in expected if token != 2}
    for token, probability in expected.items():
        assert sum(ids == [token] for ids in found) == pytest.approx(probability * draws, abs=12)


def test_the_settings_are_those_of_the_generation_configuration(tmp_path: Path, tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    folder = shutil.copytree(tiny_model_dir, tmp_path / "m")
    file = folder / "generation_config.json"
    stored = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [0, 2]}
    file.write_text(json.dumps(stored))
    assert read_sampling(str(folder), tokenizer) == Sampling(False, 0.6, 20, 0.95, None, 1.0, (0, 2))
    file.unlink()
    assert read_sampling(str(folder), tokenizer) == GREEDY
    file.write_text(json.dumps({"do_sample": True, "typical_p": 0.5}))
    with pytest.raises(ModelError) as caught:
        read_sampling(str(folder), tokenizer)
    assert str(caught.value) == (
        f"{folder}: generation_config.json sets typical_p to 0.5, which is not supported; remove it"
    )


@pytest.mark.parametrize("stated", [{}, {"top_k": None}, {"top_k": 0}, {"top_k": 7}])
def test_top_k_is_what_transformers_takes_where_the_configuration_is_silent(
    tmp_path: Path, tiny_model_dir: Path, stated: dict[str, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: only a stated top-k was applied; `generate` keeps the 50 likeliest tokens by default."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, **stated}))
    model = AutoModelForCausalLM.from_pretrained(folder)
    taken: list[LogitsProcessorList] = []
    monkeypatch.setattr(
        type(model), "_sample", lambda _, ids, logits_processor, **__: taken.append(logits_processor) or ids
    )
    model.generate(input_ids=torch.tensor(PROMPTS[:1]), max_new_tokens=2)
    theirs = [one.top_k for one in taken[0] if isinstance(one, TopKLogitsWarper)]
    sampling = read_sampling(str(folder), AutoTokenizer.from_pretrained(folder))
    ours = [] if sampling.top_k is None else [sampling.top_k]
    assert ours == theirs
    assert ours == {None: [50], 0: [], 7: [7]}[stated.get("top_k")]


def test_a_repetition_penalty_is_that_of_transformers_whatever_pads_the_batch(tiny_model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    expected = [alone(model, prompt, 1.3) for prompt in PROMPTS]
    assert expected != [alone(model, prompt, 1.0) for prompt in PROMPTS]
    # What pads is a stop token: each token that is said, as the one that pads, must not be penalised for it.
    for stop in {token for ids in expected for token in ids}:
        how = Sampling(True, 1.0, None, None, None, 1.3, (stop,))
        found = Generator(str(tiny_model_dir), how, "fp32", "cpu").answer(PROMPTS, quantiles(4))
        assert [one.ids for one in found] == [ids[: ids.index(stop)] if stop in ids else ids for ids in expected]


def alone(model: torch.nn.Module, prompt: list[int], penalty: float) -> list[int]:
    """Return transformers' own greedy answer to one prompt, without an end token."""
    how = GenerationConfig(max_new_tokens=12, do_sample=False, repetition_penalty=penalty, pad_token_id=0)
    ids = model.generate(input_ids=torch.tensor([prompt]), generation_config=how)
    return ids[0, len(prompt) :].tolist()
