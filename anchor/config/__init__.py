"""Recipes: the schema of every knob, and the loader that refuses what it does not know."""
