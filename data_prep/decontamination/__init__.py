"""Find training pairs that repeat evaluation texts."""
