"""Small files that every exported folder has."""

import json
from pathlib import Path
from typing import Any

from anchor.data.shards import Index


def write_json_files(folder: Path, files: dict[str, Any]) -> None:
    """Write ``{name: content}`` as JSON; names may have one folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def prompts_and_limit(folder: Path, index: Index) -> dict[str, Any]:
    """Prompts as sentence-transformers reads them, and the tokenizer's own limit.

    Args:
        folder: a model folder that already holds the tokenizer.
        index: index of the shards trained on.
    """
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer_config["model_max_length"] = index.recipe["text"]["max_tokens"]
    return {
        "config_sentence_transformers.json": {
            "prompts": index.prompts,
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        "tokenizer_config.json": tokenizer_config,
    }
