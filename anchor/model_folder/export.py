"""Export a trained model as a folder that every consumer reads the same way.

The folder holds the whole causal LM with its head (LoRA merged in float32; ``adapter/`` beside it) and the tokenizer
with the template in its post-processor. It also holds the sentence-transformers modules (last-token pooling,
normalisation), ``anchor.json`` (what the model is and where it comes from) and a model card. It is written under a
temporary name and renamed. Trained special tokens are stored without the causal LM, see
:mod:`anchor.model_folder.special_tokens_export`.
"""

import itertools
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from anchor import dist
from anchor.config.train_recipe import LoraTraining, TrainRecipe
from anchor.data.decode_prefix import decode_prefix_of
from anchor.data.index import Index
from anchor.data.tokenizer_files import name_pieces
from anchor.errors import TrainingError, disk_refusal
from anchor.json_files import read_object
from anchor.model_folder import special_tokens_export
from anchor.model_folder.consumer_files import (
    prompts_line,
    write_consumer_files,
    write_json_files,
)
from anchor.model_folder.special_tokens_export import Gathered
from anchor.models.backbone import DTYPES, lora_config
from anchor.models.centres import CENTRES_NAME
from anchor.models.embedder import Embedder
from anchor.models.special_tokens import SpecialTokens
from anchor.objectives.base import Objective

log = logging.getLogger(__name__)

_MERGED = ".base_layer.weight"
_SCORES = "mteb"
"""Folder that the evaluation writes to by default."""


def export_model(
    objective: Objective,
    gathered: Gathered,
    folder: Path,
    recipe: TrainRecipe,
    index: Index,
    shards: Path,
    provenance: dict[str, Any],
) -> None:
    """Write the model folder; every rank calls it, rank 0 writes.

    Args:
        objective: holds the trained model.
        gathered: returns a whole parameter on the CPU of rank 0; every rank calls it.
        folder: the folder to write; an earlier export of the same run is replaced.
        recipe: the run's recipe.
        index: index of the shards trained on.
        shards: their folder; its tokenizer is copied.
        provenance: what ``anchor.json`` records about the run.
    """
    modules = list(objective.modules())
    causal_lm = next(m.causal_lm for m in modules if isinstance(m, Embedder))
    special = next((m for m in modules if isinstance(m, SpecialTokens)), None)
    if special is None:
        weights, adapter = _collect(gathered, causal_lm, recipe)
        alone = None
    else:
        weights, adapter = {}, _adapter(gathered, causal_lm)
        alone = special_tokens_export.collect(gathered, causal_lm, special)
    if dist.is_first_rank():
        beside = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(beside, ignore_errors=True)
        about = {
            "objective": recipe.objective.kind,
            "template": index.template,
            "anchor_token_id": index.anchor_token_id,
            "prompts": index.prompts,
            "max_tokens": index.recipe["text"]["max_tokens"],
            **provenance,
        }
        with _refused_in_one_line(beside):
            beside.mkdir(parents=True)
            shutil.copytree(shards / "tokenizer", beside, dirs_exist_ok=True)
            name_pieces(beside)
            about |= _write_decoding(beside, objective, recipe)
            if special is None or alone is None:
                _write_weights(beside, causal_lm, weights, recipe)
                write_consumer_files(beside, causal_lm.config.hidden_size, index)
                card = _model_card(recipe, index)
            else:
                special_tokens_export.write(beside, alone, causal_lm, index)
                about |= special_tokens_export.about(alone, special, recipe, index)
                card = special_tokens_export.model_card(recipe, special, index)
            _write_adapter(beside, adapter, recipe)
            (beside / "README.md").write_text(card, encoding="utf-8")
            write_json_files(beside, {"anchor.json": about})
        _keep_scores(folder)
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
    dist.barrier()


def _write_decoding(folder: Path, objective: Objective, recipe: TrainRecipe) -> dict[str, Any]:
    """Write the means that a decoder needs; return the fields of ``anchor.json`` that say how it decodes."""
    if recipe.objective.kind not in ("reconstruction", "self_supervised"):
        return {}
    about: dict[str, Any] = {"decode_prefix_token_ids": list(decode_prefix_of(recipe))}
    if objective.centres is not None:
        about["anchor_vector"] = "centred"
        save_file(objective.centres.to_tensors(), folder / CENTRES_NAME)
    return about


@contextmanager
def _refused_in_one_line(beside: Path) -> Iterator[None]:
    """Turn a disk's refusal into a one-line error, and delete what has been written."""
    try:
        yield
    except Exception as error:
        refusal = disk_refusal(error)
        if refusal is None:
            raise
        shutil.rmtree(beside, ignore_errors=True)
        raise TrainingError(f"cannot export: {refusal}; the same command goes on with the export") from error


def _keep_scores(folder: Path) -> None:
    """Move evaluation scores out of an earlier export: they took hours and do not describe the new weights."""
    scores, about = folder / _SCORES, folder / "anchor.json"
    if scores.is_dir() and about.is_file():
        try:
            name = f"{_SCORES}-step-{read_object(about)['recipe']['optim']['total_steps']:08d}"
        except (ValueError, KeyError, TypeError):  # damaged
            name = f"{_SCORES}-step-unknown"
        names = (name if i == 1 else f"{name}-{i}" for i in itertools.count(1))
        kept = next(folder.parent / name for name in names if not (folder.parent / name).exists())
        scores.rename(kept)
        log.info("scores of the export before: %s", kept)


def _adapter(gathered: Gathered, causal_lm: PreTrainedModel) -> dict[str, Tensor]:
    """Gather the adapters' whole parameters on rank 0; every rank calls it."""
    return {name: gathered(p) for name, p in causal_lm.named_parameters() if "lora_" in name}


def _collect(
    gathered: Gathered, causal_lm: PreTrainedModel, recipe: TrainRecipe
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gather on rank 0 all parameters by the causal LM's own names with adapters merged, and the adapter alone."""
    whole = {name: gathered(parameter) for name, parameter in causal_lm.named_parameters()}
    adapter = {name: tensor for name, tensor in whole.items() if "lora_" in name}
    merged: dict[str, Tensor] = {}
    if not dist.is_first_rank():
        return merged, adapter
    for name, tensor in whole.items():
        if name in adapter:
            continue
        if name.endswith(_MERGED):
            stem = name.removesuffix(_MERGED)
            merged[f"{stem}.weight"] = _merge(tensor, whole, stem, recipe)
        else:
            merged[name.replace(".base_layer.", ".")] = tensor
    return merged, adapter


def _merge(base: Tensor, whole: dict[str, Tensor], stem: str, recipe: TrainRecipe) -> Tensor:
    """Return ``W + alpha / r * B A``, computed in float32 and cast to the export's dtype."""
    section = recipe.backbone.trained
    if not isinstance(section, LoraTraining):
        raise TypeError("a base_layer without LoRA")
    a, b = (whole[f"{stem}.lora_{side}.default.weight"].float() for side in "AB")
    return (base.float() + section.alpha / section.r * (b @ a)).to(DTYPES[recipe.engine.dtype])


def _write_weights(folder: Path, causal_lm: PreTrainedModel, weights: dict[str, Tensor], recipe: TrainRecipe) -> None:
    with torch.device("meta"):
        shell = type(causal_lm)(causal_lm.config)
    shell.config.dtype = DTYPES[recipe.engine.dtype]
    shell.generation_config = causal_lm.generation_config
    shell.save_pretrained(folder, state_dict=dict(_in_order(shell, weights)))


def _write_adapter(folder: Path, adapter: dict[str, Tensor], recipe: TrainRecipe) -> None:
    if adapter and isinstance(recipe.backbone.trained, LoraTraining):
        (folder / "adapter").mkdir()
        named = {f"base_model.model.{k.replace('.default.', '.')}": v.contiguous() for k, v in adapter.items()}
        save_file(named, folder / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
        config = lora_config(recipe.backbone.trained)
        config.base_model_name_or_path = recipe.backbone.path
        config.save_pretrained(str(folder / "adapter"))


def _in_order(shell: nn.Module, weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights in the order of the shell's state; a tied matrix appears once."""
    for name in shell.state_dict():
        if name in weights:
            yield name, weights[name].contiguous()


def _model_card(recipe: TrainRecipe, index: Index) -> str:
    sources = ", ".join(source["name"] for source in index.sources)
    done = f"Trained by Anchor from `{recipe.backbone.path}` on {sources}."
    if recipe.optim.total_steps == 0:
        done = f"Untrained: the weights of `{recipe.backbone.path}` with a template for embedding."
    bidirectional = recipe.backbone.direction == "bidirectional"
    # Older versions of transformers would silently read the folder and attend causally.
    needs = (
        "\nAttention is bidirectional: transformers >= 5.2 and text-embeddings-inference read it from `config.json`.\n"
        if bidirectional
        else ""
    )
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction]
---
# Text embedder ({recipe.objective.kind})

{done}

The embedding of a text is the hidden state of its last token, which the tokenizer's post-processor appends; at most
{index.recipe["text"]["max_tokens"]} tokens.
{needs}
```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("THIS_FOLDER")
queries = model.encode(["what is an anchor?"], prompt_name="query")
documents = model.encode(["An anchor holds a ship in place."], prompt_name="document")
print(model.similarity(queries, documents))
```

{prompts_line(index.prompts)} `anchor.json` says how it was made.
"""
