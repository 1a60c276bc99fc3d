"""Pack pairs: rows -> tokenised pairs -> batches -> shard files."""
