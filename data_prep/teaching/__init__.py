"""Add a teacher's embeddings to shards."""
