"""Offline data preparation: raw pairs -> packed shards. No torch is needed."""
