"""Files of a retrieval task in MTEB's folder layout, and the README.md that describes them to `datasets`."""

RETRIEVAL_FILES = ("corpus.jsonl", "queries.jsonl", "qrels/test.jsonl")
BEIR_JUDGEMENTS = "qrels/test.tsv"
"""Judgements file of BEIR's own folders, with the columns ``query-id``, ``corpus-id`` and ``score``."""
RETRIEVAL_README = """---
configs:
- config_name: default
  data_files:
  - split: test
    path: qrels/test.jsonl
- config_name: corpus
  data_files:
  - split: corpus
    path: corpus.jsonl
- config_name: queries
  data_files:
  - split: queries
    path: queries.jsonl
---
"""
