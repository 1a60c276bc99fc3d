"""Scripts and recipes."""
