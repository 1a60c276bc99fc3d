"""Dry run: what a recipe will need, without a GPU or weights."""
