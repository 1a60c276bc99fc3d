"""Recipe schemas, and a loader that refuses unknown keys."""
