"""Turn texts into vectors with a model folder, packed, over ranks: what evaluation and mining share."""
