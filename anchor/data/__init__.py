"""Pairs, templates, packing and the on-disk format; everything but `batches` works without torch."""
