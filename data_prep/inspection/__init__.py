"""Report on a folder of shards, and verify it."""
