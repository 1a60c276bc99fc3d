"""Convert folders in LLM2Vec-Gen's published layout."""
