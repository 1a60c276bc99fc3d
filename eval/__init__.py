"""Embed texts with a model folder and score it."""
