"""A model folder -> embeddings and scores."""
