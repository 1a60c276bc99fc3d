"""Read pairs: E5 files, other trainers' layouts, hub datasets, and how a source is cut into units."""
