"""Anchor: turn a decoder-only LLM into a text embedder, at cluster scale."""

__version__ = "0.1.0"
