"""Collect a language model's own answers to questions."""
