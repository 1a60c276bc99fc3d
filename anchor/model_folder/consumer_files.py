"""Files of exported folders besides the model's weights and tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from anchor.data.index import Index
from anchor.models.special_tokens import WEIGHTS_NAME

_ENCODER = "anchor_encoder"


def write_json_files(folder: Path, files: dict[str, Any]) -> None:
    """Write ``{name: content}`` as JSON; a name may include one folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def prompts_and_limit(folder: Path, prompts: dict[str, str], max_tokens: int) -> dict[str, Any]:
    """Return the JSON files with sentence-transformers' prompts and the tokenizer's length limit.

    Args:
        folder: a model folder that already holds the tokenizer.
        prompts: prompts by name.
        max_tokens: longest text, in tokens.
    """
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer_config["model_max_length"] = max_tokens
    # For a model that also reads images, sentence-transformers would look for an image processor.
    tokenizer_config.pop("processor_class", None)
    return {
        "config_sentence_transformers.json": {
            "prompts": prompts,
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        "tokenizer_config.json": tokenizer_config,
    }


def prompts_line(prompts: dict[str, str]) -> str:
    """Return the model card's sentence on the prompts of queries and documents."""
    query, document = (repr(prompts[name]) if prompts.get(name) else None for name in ("query", "document"))
    queries = "Queries carry none" if query is None else f"Queries carry the prompt {query}"
    return f"{queries}; documents {'carry none' if document is None else document}."


def config_for_all(folder: Path) -> dict[str, Any]:
    """Return ``config.json`` with two settings repeated where readers other than transformers 5 look for them.

    Without ``rope_theta`` at the top level, transformers 4 and libraries built on it silently assume 10,000, and
    text-embeddings-inference refuses the folder. For bidirectional attention, transformers and vLLM read ``is_causal``.
    text-embeddings-inference reads ``use_bidirectional_attention`` for Llama, Mistral and Qwen3.

    Args:
        folder: a model folder that already holds ``config.json``.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not config.get("is_causal", True):
        config["use_bidirectional_attention"] = True
    rope = dict(config.get("rope_parameters") or {})
    theta, kind = rope.pop("rope_theta", None), rope.get("rope_type", "default")
    if theta is None:
        return config
    return {**config, "rope_theta": theta, **({} if kind == "default" else {"rope_scaling": rope})}


def write_special_tokens_files(
    folder: Path, weights: dict[str, Tensor], config: Any, prompts: dict[str, str], max_tokens: int
) -> None:
    """Write the weights and modules of trained special tokens into a folder that already holds the tokenizer.

    Args:
        folder: the folder.
        weights: the special tokens' parameters by name, float32.
        config: the base's configuration, as transformers holds it.
        prompts: prompts by name.
        max_tokens: longest text, in tokens.
    """
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(folder)
    # Copied but not imported: it needs sentence-transformers.
    shutil.copy(Path(__file__).parent / "remote_code" / f"{_ENCODER}.py", folder)
    modules = [
        ("", f"{_ENCODER}.AnchorEncoder"),
        ("2_Normalize", "sentence_transformers.sentence_transformer.modules.Normalize"),
    ]
    listed = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(modules)]
    files = {"modules.json": listed, "2_Normalize/config.json": {}, **prompts_and_limit(folder, prompts, max_tokens)}
    write_json_files(folder, files)


def write_consumer_files(folder: Path, hidden_size: int, index: Index) -> None:
    """Write the files of sentence-transformers and servers, and the length limit for every consumer's tokenizer.

    Args:
        folder: a model folder that already holds ``config.json`` and the tokenizer.
        hidden_size: dimension of the embeddings.
        index: index of the shards trained on.
    """
    modules = [
        ("0", "", "sentence_transformers.models.Transformer"),
        ("1", "1_Pooling", "sentence_transformers.models.Pooling"),
        ("2", "2_Normalize", "sentence_transformers.models.Normalize"),
    ]
    listed = [{"idx": int(name), "name": name, "path": path, "type": kind} for name, path, kind in modules]
    # Write all flags: some servers (text-embeddings-inference) have no defaults for absent ones.
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    flags = {f"pooling_mode_{mode}": mode == "lasttoken" for mode in modes}
    pooling = {"word_embedding_dimension": hidden_size, **flags, "include_prompt": True}
    files = {
        "modules.json": listed,
        "1_Pooling/config.json": pooling,
        "2_Normalize/config.json": {},
        "sentence_bert_config.json": {"max_seq_length": index.recipe["text"]["max_tokens"], "do_lower_case": False},
        "config.json": config_for_all(folder),
        **prompts_and_limit(folder, index.prompts, index.recipe["text"]["max_tokens"]),
    }
    write_json_files(folder, files)
