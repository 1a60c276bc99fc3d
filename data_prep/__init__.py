"""Offline data preparation: raw pairs -> packed shards. Packing needs no torch."""
