"""Shared parts of the command lines: argument types, and a parser description with an example."""

import argparse

from anchor.errors import shortened

_MOST = (1 << 31) - 1


def describe(parser: argparse.ArgumentParser, description: str, example: str) -> argparse.ArgumentParser:
    """Add a description and an example call to a parser, and return it."""
    parser.description, parser.epilog = description, f"example: {example}"
    # The default formatter would wrap the example command.
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    return parser


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    return _number(text, 1)


def count(text: str) -> int:
    """Parse a whole number of at least 0."""
    return _number(text, 0)


def part(text: str) -> tuple[int, int]:
    """Parse ``I/N``: part I of N, counted from 0."""
    index, _, number = (_read(word) for word in text.partition("/"))
    if index is None or number is None or index >= number:
        raise argparse.ArgumentTypeError(f"expected a part such as 0/4, from 0/4 to 3/4, got {shortened(text)}")
    return index, number


def _number(text: str, least: int) -> int:
    number = _read(text)
    if number is None and text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number, at most {_MOST}, got {shortened(text)}")
    if number is None or number < least:
        expected = f"a number, at least {least}" if least else "a number"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {shortened(text)}")
    return number


def _read(text: str) -> int | None:
    """Parse digits; return None for other text and for a number so large that a run could overflow."""
    return int(text) if text.isdecimal() and len(text) <= len(str(_MOST)) and int(text) <= _MOST else None
