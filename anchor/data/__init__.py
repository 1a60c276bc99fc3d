"""Pairs, templates, packing and the on-disk format. Only `batches` needs torch."""
