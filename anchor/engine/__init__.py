"""The training engine: the only layer that knows DeepSpeed."""
