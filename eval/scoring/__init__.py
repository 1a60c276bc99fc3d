"""Score a model on mteb tasks, local retrieval folders and AdvBench-IR."""
