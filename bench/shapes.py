"""Dimensions of Llama-3.2-1B and Llama-3.1-8B, for code that needs a model's size but not its weights."""

from transformers import LlamaConfig

_NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES = {
    "1B": dict(zip(_NAMES, (2048, 8192, 16, 32, 8), strict=True)) | {"head_dim": 64, "tie_word_embeddings": True},
    "8B": dict(zip(_NAMES, (4096, 14336, 32, 32, 8), strict=True)) | {"head_dim": 128, "tie_word_embeddings": False},
}
"""Dimensions by name; "1B" is Llama-3.2-1B, "8B" Llama-3.1-8B."""


def llama_config(name: str) -> LlamaConfig:
    """Return the configuration of a shape."""
    return LlamaConfig(vocab_size=128_256, **SHAPES[name])
