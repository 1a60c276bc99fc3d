"""Mine hard negatives, by words or by an embedder."""
