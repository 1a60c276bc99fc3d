"""Training objectives. They return losses and metric sums; the engine reduces and writes them."""
