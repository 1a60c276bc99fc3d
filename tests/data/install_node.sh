#!/usr/bin/env bash
# Install the JavaScript reader of tokenizer.json into FOLDER/node_modules, for tests/data/test_readers_agree.py.
set -euo pipefail
FOLDER=${1:?usage: install_node.sh FOLDER}
mkdir -p "$FOLDER"
npm install --prefix "$FOLDER" --silent --no-audit --no-fund --ignore-scripts @huggingface/tokenizers@0.2.0
