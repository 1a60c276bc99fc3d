"""What is minimised. Objectives return losses and metric sums; the engine reduces and writes them."""
