"""The one owner of an exported model folder: write it, read it, check it, describe it."""
