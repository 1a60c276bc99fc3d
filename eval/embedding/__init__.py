"""Embed texts into a folder of vectors."""
