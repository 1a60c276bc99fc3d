"""The part of an export that is its own with trained special tokens: they are stored alone, without their base.

``special_tokens.safetensors`` (float32) holds the rows and projections, ``config.json`` is the base's, ``anchor.json``
names the base and its fingerprint, and ``anchor_encoder.py`` lets sentence-transformers put them together.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from anchor import dist
from anchor.config.schema import TrainRecipe
from anchor.data.shards import Index
from anchor.engine.deepspeed import Engine
from anchor.engine.folder_files import write_special_tokens_files
from anchor.models.special_tokens import SpecialTokens, fingerprint, fingerprinted


@dataclass(frozen=True, slots=True)
class Collected:
    """What rank 0 writes.

    Attributes:
        weights: the special tokens' parameters by name, float32.
        fingerprint: of the base; None on other ranks.
    """

    weights: dict[str, Tensor]
    fingerprint: str | None


def collect(engine: Engine, causal_lm: PreTrainedModel, special: SpecialTokens) -> Collected:
    """Whole parameters, and the base's fingerprint; every rank calls it, rank 0 has them."""
    weights = {name: engine.gathered(parameter).float() for name, parameter in special.named_parameters()}
    base = [engine.gathered(parameter) for parameter in fingerprinted(causal_lm)]
    return Collected(weights, fingerprint(base) if dist.is_first_rank() else None)


def write(folder: Path, collected: Collected, causal_lm: PreTrainedModel, index: Index) -> None:
    """Everything but ``anchor.json`` and the model card, into a folder that already holds the tokenizer."""
    max_tokens = index.recipe["text"]["max_tokens"]
    write_special_tokens_files(folder, collected.weights, causal_lm.config, index.prompts, max_tokens)


def about(collected: Collected, special: SpecialTokens, recipe: TrainRecipe, index: Index) -> dict[str, Any]:
    """What ``anchor.json`` says more than for other objectives."""
    return {
        "base": {"path": base_path(recipe), "fingerprint": collected.fingerprint},
        "special_tokens": {"count": special.count, "first_id": special.first_id},
        "end_token_id": index.end_token_id,
        "decoder": "base",  # an adapter takes no part in decoding
        "teacher": index.teacher,
        "dimension": special.dimension,
    }


def base_path(recipe: TrainRecipe) -> str:
    """Where the base is: a folder absolute, a GGUF file as the folder it was converted to, a hub name as it is."""
    path = recipe.backbone.path
    if path.endswith(".gguf"):
        return str((recipe.output_dir / "base").absolute())
    local = Path(path).expanduser()
    return str(local.absolute()) if local.exists() else path


def model_card(recipe: TrainRecipe, special: SpecialTokens, index: Index) -> str:
    """README.md of the folder."""
    sources = ", ".join(source["name"] for source in index.sources)
    base, teacher = base_path(recipe), (index.teacher or {}).get("model")
    adapter = (
        "\nIts adapter is in `adapter/`, which needs the package peft.\n"
        if recipe.backbone.trained.kind == "lora"
        else ""
    )
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction]
base_model: {base}
---
# Text embedder (self_supervised)

{special.count} special tokens and two projections, trained by Anchor on {sources} over `{base}`, whose weights are
not in this folder. The embedding of a text ({special.dimension} dimensions, those of its teacher `{teacher}`) is read
from the states of the special tokens, which the tokenizer's post-processor appends; at most
{index.recipe["text"]["max_tokens"]} tokens.
{adapter}
```python
from sentence_transformers import SentenceTransformer

# The folder has code of its own: `anchor_encoder.py`. model_kwargs={{"base": PATH}} where the base lies elsewhere.
model = SentenceTransformer("THIS_FOLDER", trust_remote_code=True)
queries = model.encode(["what is an anchor?"], prompt_name="query")
documents = model.encode(["An anchor holds a ship in place."], prompt_name="document")
print(model.similarity(queries, documents))
```

Queries carry the prompt {index.prompts["query"]!r}; documents carry none. `anchor.json` says how it was made.
"""
