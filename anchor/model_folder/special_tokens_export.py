"""Export of trained special tokens, which are stored without their base model.

``special_tokens.safetensors`` (float32) holds the rows and projections, and ``config.json`` is the base's.
``anchor.json`` names the base and its fingerprint. ``anchor_encoder.py`` lets sentence-transformers put them together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from anchor import dist
from anchor.config.train_recipe import TrainRecipe
from anchor.data.index import Index
from anchor.model_folder.consumer_files import prompts_line, write_special_tokens_files
from anchor.model_folder.description import Description, fingerprint, fingerprinted
from anchor.models.special_tokens import SpecialTokens

Gathered = Callable[[nn.Parameter], Tensor]
"""Returns a whole parameter on the CPU of rank 0; every rank calls it."""


@dataclass(frozen=True, slots=True)
class Collected:
    """Tensors and fingerprint for rank 0 to write.

    Attributes:
        weights: the special tokens' parameters by name, float32.
        fingerprint: fingerprint of the base; None on other ranks.
    """

    weights: dict[str, Tensor]
    fingerprint: str | None


def collect(gathered: Gathered, causal_lm: PreTrainedModel, special: SpecialTokens) -> Collected:
    """Gather the whole parameters and the base's fingerprint on rank 0; every rank calls it."""
    weights = {name: gathered(parameter).float() for name, parameter in special.named_parameters()}
    base = [gathered(parameter) for parameter in fingerprinted(causal_lm)]
    return Collected(weights, fingerprint(base) if dist.is_first_rank() else None)


def write(folder: Path, collected: Collected, causal_lm: PreTrainedModel, index: Index) -> None:
    """Write all files but ``anchor.json`` and the model card into a folder that already holds the tokenizer."""
    max_tokens = index.recipe["text"]["max_tokens"]
    write_special_tokens_files(folder, collected.weights, causal_lm.config, index.prompts, max_tokens)


def about(collected: Collected, special: SpecialTokens, recipe: TrainRecipe, index: Index) -> dict[str, Any]:
    """Return the fields that ``anchor.json`` has beyond those of other objectives; rank 0 calls it."""
    return {
        **_description(collected.fingerprint or "", special, recipe).to_json(),
        "end_token_id": index.end_token_id,
        "teacher": index.teacher,
    }


def _description(base_fingerprint: str, special: SpecialTokens, recipe: TrainRecipe) -> Description:
    return Description(base_path(recipe), base_fingerprint, special.count, special.first_id, special.dimension)


def base_path(recipe: TrainRecipe) -> str:
    """Return where the base is: an absolute folder, a GGUF file's converted folder, or a hub name unchanged."""
    path = recipe.backbone.path
    if path.endswith(".gguf"):
        return str((recipe.output_dir / "base").absolute())
    local = Path(path).expanduser()
    return str(local.absolute()) if local.exists() else path


def model_card(recipe: TrainRecipe, special: SpecialTokens, index: Index) -> str:
    """Return the README.md of a trained folder."""
    sources = ", ".join(source["name"] for source in index.sources)
    origin = f"trained by Anchor on {sources} with the teacher `{(index.teacher or {}).get('model')}`"
    if recipe.optim.total_steps == 0:
        origin = "untrained"
    adapter = recipe.backbone.trained.kind == "lora"
    said, max_tokens = _description("", special, recipe), index.recipe["text"]["max_tokens"]
    return card("self_supervised", said, origin, index.prompts, max_tokens, adapter=adapter)


def card(title: str, said: Description, origin: str, prompts: dict[str, str], max_tokens: int, *, adapter: bool) -> str:
    """Return the README.md of any folder of special tokens.

    Args:
        title: text in brackets behind "Text embedder".
        said: the content of ``anchor.json``.
        origin: where the special tokens come from.
        prompts: the ``query`` prompt and optionally the ``document`` prompt.
        max_tokens: longest text, in tokens.
        adapter: True if the folder has an adapter.
    """
    needs = "xxhash; its adapter, in `adapter/`, needs peft" if adapter else "xxhash"
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction]
base_model: {said.base}
---
# Text embedder ({title})

{said.count} special tokens and two projections over `{said.base}`, whose weights are not in this folder; {origin}.
The embedding of a text ({said.dimension} dimensions) is read from the states of the special tokens, which the
tokenizer's post-processor appends; at most {max_tokens} tokens.

`python -m eval` reads the folder without running code that it holds. sentence-transformers also needs {needs}:

```python
from sentence_transformers import SentenceTransformer

# The folder has code of its own: `anchor_encoder.py`. model_kwargs={{"base": PATH}} where the base lies elsewhere.
model = SentenceTransformer("THIS_FOLDER", trust_remote_code=True)
queries = model.encode(["what is an anchor?"], prompt_name="query")
documents = model.encode(["An anchor holds a ship in place."], prompt_name="document")
print(model.similarity(queries, documents))
```

{prompts_line(prompts)} `anchor.json` says how it was made.
"""
