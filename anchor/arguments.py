"""What the command lines share: types of arguments, and a parser's description with an example."""

import argparse

from anchor.errors import shortened

_MOST = (1 << 31) - 1


def describe(parser: argparse.ArgumentParser, description: str, example: str) -> argparse.ArgumentParser:
    """The parser, with what the command does and one call of it."""
    parser.description, parser.epilog = description, f"example: {example}"
    # argparse would wrap the example in the middle of the command.
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    return parser


def positive(text: str) -> int:
    """A number, at least 1."""
    return _number(text, 1)


def count(text: str) -> int:
    """A number, at least 0."""
    return _number(text, 0)


def part(text: str) -> tuple[int, int]:
    """``I/N``: part I, from 0, of N."""
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
    """A number that no run overflows at; None for a larger one, and for what is no number."""
    return int(text) if text.isdecimal() and len(text) <= len(str(_MOST)) and int(text) <= _MOST else None
