"""What the command lines share: types of arguments, and a parser's description with an example."""

import argparse


def describe(parser: argparse.ArgumentParser, description: str, example: str) -> argparse.ArgumentParser:
    """The parser, with what the command does and one call of it."""
    parser.description, parser.epilog = description, f"example: {example}"
    # argparse would wrap the example in the middle of the command.
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    return parser


def positive(text: str) -> int:
    """A number, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number, at least 1, got '{text}'")
    return int(text)


def count(text: str) -> int:
    """A number, at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number, got '{text}'")
    return int(text)


def part(text: str) -> tuple[int, int]:
    """``I/N``: part I, from 0, of N."""
    index, _, number = text.partition("/")
    if not (index.isdecimal() and number.isdecimal() and int(index) < int(number)):
        raise argparse.ArgumentTypeError(f"expected a part such as 0/4, from 0/4 to 3/4, got '{text}'")
    return int(index), int(number)
