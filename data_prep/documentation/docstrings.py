"""Docstrings of a source file, split into a summary and a body cleaned to prose.

1. :func:`docstrings_of` parses a file, without importing it, and walks its public definitions.
2. :func:`split_docstring` splits off the first paragraph and rejects docstrings without a usable summary or body.
3. :func:`clean_body` removes markup, code, directives and sections that point elsewhere.
"""

import ast
import inspect
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

_SUMMARY_WORDS, _SUMMARY_CHARACTERS = 4, 200
_BODY_WORDS, _BODY_CHARACTERS = 25, 1200
# Sections without prose about the object itself: pointers, people, code.
_DROPPED_SECTIONS = {
    *("see also", "reference", "references", "author", "authors"),
    *("example", "examples", "usage", "doctest", "doctests"),
}
_GOOGLE_SECTIONS = _DROPPED_SECTIONS | {
    "args",
    "arguments",
    "parameters",
    "returns",
    "raises",
    "yields",
    "note",
    "notes",
}
_BOILERPLATE = {"Read more in the User Guide.", "Explanation"}  # most scikit-learn classes, most of sympy

_UNDERLINE = re.compile(r"^\s*([-=~^\"*])\1{2,}\s*$")
_RULE = re.compile(r"^[\s+|=~^\"*-]*[=~^\"*-]{3,}[\s+|=~^\"*-]*$")
_DIRECTIVE = re.compile(r"^(\s*)\.\. ")
_ROLE = re.compile(r":(?:[a-zA-Z]+:)?[a-zA-Z]+:`(?:~|!)?([^`]*?)(?:\s*<[^`<>]*>)?`")
_CITATION = re.compile(r"\s*\[(?:\d+|[A-Za-z]+\d+)\]_")
_BOLD = re.compile(r"(?<![\w*])\*\*(\w[^*\n]*\w)\*\*(?![\w*])")
_PLACEHOLDER = re.compile(r"%\(\w+\)[sd]|\$\{\w+\}|(?<![\w\\^_}])\{\w+\}")
_STUB = re.compile(r"^\W*(deprecated|alias (of|for)|see\b|same as\b|this (is an? )?(internal|private))", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Docstring:
    """Docstring of a class or function, split into parts.

    Attributes:
        summary: first paragraph, on one line.
        body: the rest, cleaned.
        module: path of the source file from site-packages on, with slashes.
        scope: name of the enclosing class, or "" at module level.
        name: dotted name inside the module.
    """

    summary: str
    body: str
    module: str
    scope: str
    name: str


def docstrings_of(source: bytes, module: str) -> list[Docstring]:
    """Return the usable docstrings of a source file: public classes, functions and methods, at any public depth.

    The list is empty if this Python cannot parse the file (a template, or code for another version).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's files
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    out: list[Docstring] = []
    for scope, node in _public_definitions(tree, ""):
        parts = split_docstring(ast.get_docstring(node, clean=False) or "")
        if parts is not None:
            name = f"{scope}.{node.name}" if scope else node.name
            out.append(Docstring(*parts, module=module, scope=scope, name=name))
    return out


def _public_definitions(
    node: ast.Module | ast.ClassDef, scope: str
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    for child in node.body:
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or child.name.startswith("_"):
            continue
        yield scope, child
        if isinstance(child, ast.ClassDef):
            yield from _public_definitions(child, f"{scope}.{child.name}" if scope else child.name)


def split_docstring(docstring: str) -> tuple[str, str] | None:
    """Return the summary and body of a docstring, or None if one of them is unusable."""
    if _PLACEHOLDER.search(docstring):  # a template, filled in when the package is imported
        return None
    summary, _, rest = inspect.cleandoc(docstring).partition("\n\n")
    summary = _inline(" ".join(summary.split()))
    if len(summary.split()) < _SUMMARY_WORDS or len(summary) > _SUMMARY_CHARACTERS:
        return None
    if _STUB.match(summary) or not _mostly_letters(summary) or summary.startswith((">>>", "..", "-", "*")):
        return None
    body = clean_body(rest)
    if len(body.split()) < _BODY_WORDS or not _mostly_letters(body) or _STUB.match(body):
        return None
    return summary, body


def clean_body(text: str) -> str:
    """Return the prose of a docstring's body: no markup, code, directives or sections that point elsewhere."""
    lines = inspect.cleandoc(text).split("\n")
    kept: list[str] = []
    dropping = False  # inside a dropped section
    code_indent: int | None = None  # indentation of the line that began a code block or directive
    for number, line in enumerate(lines):
        stripped = line.strip()
        following = lines[number + 1] if number + 1 < len(lines) else ""
        if stripped and _UNDERLINE.match(following):
            dropping, code_indent = stripped.lower().rstrip(":") in _DROPPED_SECTIONS, None
        elif line[:1].strip() and stripped.endswith(":") and stripped[:-1].lower() in _GOOGLE_SECTIONS:
            dropping, code_indent = stripped[:-1].lower() in _DROPPED_SECTIONS, None
        if dropping or _RULE.match(line):
            continue
        indent = len(line) - len(line.lstrip())
        if code_indent is not None and (not stripped or indent > code_indent):
            if not stripped:
                kept.append("")
            continue
        code_indent = None
        if _DIRECTIVE.match(line):  # note, math, plot, versionadded: drop the block below too
            code_indent = indent
            continue
        if stripped.startswith((">>>", "...", "$ ", "|")):
            # Output follows a doctest until the next blank line.
            code_indent = -1 if stripped.startswith(">>>") else None
            continue
        if stripped.endswith("::"):
            code_indent = indent
            line = line.rstrip()[:-1]
        plain = _inline(line.rstrip())
        if plain.strip() not in _BOILERPLATE:
            kept.append(plain)
    body = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()
    return _cut(body)


def _inline(text: str) -> str:
    """Remove inline markup: roles, literals, citations, emphasis."""
    text = _CITATION.sub("", _ROLE.sub(r"\1", text))
    return _BOLD.sub(r"\1", text.replace("``", "`"))


def _cut(text: str) -> str:
    if len(text) <= _BODY_CHARACTERS:
        return text
    return text[: _BODY_CHARACTERS + 1].rsplit(None, 1)[0]


def _mostly_letters(text: str) -> bool:
    visible = [c for c in text if not c.isspace()]
    return sum(c.isalpha() for c in visible) > 0.6 * len(visible)
