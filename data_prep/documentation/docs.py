"""``python -m data_prep docs``: real text without a network, from the documentation of installed packages.

1. Parse the packages' source files, without importing them, and take every public docstring. Its first paragraph is
   the query; the cleaned rest is the document.
2. Drop duplicates over the whole corpus: equal queries, equal documents, documents with equal beginnings.
3. Take the next docstring of the same class, else of the same module, as the hard negative. Drop docstrings without
   such a sibling.
4. Hold out whole module files, in an order drawn from the seed, until the held-out set is full.
5. Write training pairs in the layout of the E5 mix, and the held-out part in the layout of an MTEB retrieval task.

The result is a pure function of the installed versions and the arguments.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchor.errors import ConfigError, DataError
from anchor.progress import tracked
from data_prep.documentation.docstrings import Docstring, docstrings_of
from data_prep.documentation.retrieval_task import write_jsonl, write_retrieval_task
from data_prep.packing.spool import read_json

log = logging.getLogger(__name__)

DEFAULT_PACKAGES = ("scipy", "sklearn", "pandas", "networkx", "sympy", "torch", "numpy", "matplotlib")
"""Packages with long docstrings that come with the project's own requirements."""

SOURCE_NAME = "package_docs"
INSTRUCTION = "Given a summary of a function or class, retrieve its documentation"
"""Instruction for these pairs in a pack recipe."""

_SAME_BEGINNING_CHARACTERS = 200
_SKIPPED_FOLDERS = {"tests", "testing", "test", "externals", "_vendor", "vendor", "extern", "_vendored", "benchmarks"}
_MARK = "docs.json"
_FILES = (f"pairs/{SOURCE_NAME}.jsonl", *(f"heldout/{name}.jsonl" for name in ("corpus", "queries", "qrels/test")))


@dataclass(frozen=True, slots=True)
class DocsPair:
    """A query, its document and a sibling's document as the hard negative."""

    docstring: Docstring
    negative: str


@dataclass(frozen=True, slots=True)
class DocsSplit:
    """Training pairs, held-out pairs, and held-out documents, starting with those of the held-out pairs."""

    training: list[DocsPair]
    heldout: list[DocsPair]
    documents: list[Docstring]


def write_docs(
    output: Path,
    packages: Sequence[str] | None = None,
    *,
    heldout_pairs: int = 300,
    heldout_documents: int = 400,
    max_pairs: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Run the command.

    Args:
        output: folder to write; new, or finished by the same call.
        packages: import names; None takes the installed ones of :data:`DEFAULT_PACKAGES`.
        heldout_pairs: queries of the held-out task.
        heldout_documents: documents of the held-out task, including those of its queries.
        max_pairs: maximum number of training pairs, drawn by the seed; None takes all.
        seed: seed of the split and the order.

    Returns:
        The content of ``docs.json``: arguments, versions and counts.

    Raises:
        ConfigError: if there are fewer held-out documents than queries, or a count is not positive.
        DataError: if a named package is not installed, docstrings are too few, or the folder holds something else.
    """
    if not 0 < heldout_pairs <= heldout_documents:
        raise ConfigError(
            f"--heldout-pairs is {heldout_pairs} and --heldout-documents {heldout_documents}; "
            "each held-out pair needs a document, so give 0 < pairs <= documents"
        )
    if max_pairs is not None and max_pairs < 1:
        raise ConfigError(f"--max-pairs is {max_pairs}; give a positive number or leave it out")
    roots = find_packages(packages)
    about: dict[str, Any] = {
        "packages": {name: _version(name) for name in roots},
        "heldout_pairs": heldout_pairs,
        "heldout_documents": heldout_documents,
        "max_pairs": max_pairs,
        "seed": seed,
    }
    if output.exists():
        return _finished(output, about)
    found = [doc for name, root in roots.items() for doc in read_package(name, root)]
    kept = drop_duplicates(found)
    pairs = with_siblings(kept)
    where = ", ".join(roots)
    split = split_by_module(pairs, heldout_pairs, heldout_documents, max_pairs, seed, where)
    about["counts"] = {
        "docstrings": len(found),
        "distinct": len(kept),
        "pairs": len(pairs),
        "training_pairs": len(split.training),
        "heldout_queries": len(split.heldout),
        "heldout_documents": len(split.documents),
    }
    _write(output, split, about)
    log.info("%s: %d training pairs, %d held-out queries", output, len(split.training), len(split.heldout))
    return about


# 1. Take docstrings.


def find_packages(names: Sequence[str] | None) -> dict[str, Path]:
    """Return the source folder of each package by name, without importing it.

    Raises:
        DataError: if a named package is not installed or has no source folder, or no default package is installed.
    """
    found: dict[str, Path] = {}
    for name in names if names is not None else DEFAULT_PACKAGES:
        try:
            spec = importlib.util.find_spec(name) if name.isidentifier() else None
        except ValueError:  # a loaded module without a spec, such as __main__
            spec = None
        folders = list(spec.submodule_search_locations or ()) if spec is not None else []
        if folders:
            found[name] = Path(folders[0])
        elif names is not None:
            raise DataError(f"--packages: no installed package '{name}' with a source folder; give its import name")
    if not found:
        raise DataError(f"none of {', '.join(DEFAULT_PACKAGES)} is installed; name other packages with --packages")
    return found


def read_package(name: str, root: Path) -> list[Docstring]:
    """Return the usable docstrings of a package, in the order of files and lines."""
    files = sorted(file for file in root.rglob("*.py") if _is_public(file.relative_to(root)))
    found: list[Docstring] = []
    for file in tracked(files, f"reading {name}", len(files)):
        found += docstrings_of(file.read_bytes(), file.relative_to(root.parent).as_posix())
    log.info("%s: %d docstrings in %d files", name, len(found), len(files))
    return found


def _is_public(path: Path) -> bool:
    return _SKIPPED_FOLDERS.isdisjoint(path.parts) and not path.name.startswith(("test_", "conftest"))


# 2. Drop duplicates.


def drop_duplicates(found: Iterable[Docstring]) -> list[Docstring]:
    """Keep the first of equal summaries, equal bodies and bodies with equal beginnings, over the whole corpus."""
    seen: set[tuple[str, str]] = set()
    kept = []
    for doc in found:
        summary, body = _normalised(doc.summary), _normalised(doc.body)
        keys = {("summary", summary), ("body", body), ("beginning", body[:_SAME_BEGINNING_CHARACTERS])}
        # A summary equal to another docstring's body would also leak.
        keys.add(("body", summary))
        if seen.isdisjoint(keys):
            kept.append(doc)
            seen |= keys
    return kept


def _normalised(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()


# 3. Siblings.


def with_siblings(docs: list[Docstring]) -> list[DocsPair]:
    """Pair each docstring with the next one of its class, else of its module, as the hard negative."""
    scopes: dict[tuple[str, str], list[int]] = {}
    modules: dict[str, list[int]] = {}
    for i, doc in enumerate(docs):
        scopes.setdefault((doc.module, doc.scope), []).append(i)
        modules.setdefault(doc.module, []).append(i)
    pairs = []
    for i, doc in enumerate(docs):
        group = scopes[doc.module, doc.scope]
        if not doc.scope or len(group) == 1:
            group = modules[doc.module]
        if len(group) > 1:
            pairs.append(DocsPair(doc, docs[group[(group.index(i) + 1) % len(group)]].body))
    return pairs


# 4. Split.


def split_by_module(
    pairs: list[DocsPair], heldout_pairs: int, heldout_documents: int, max_pairs: int | None, seed: int, where: str
) -> DocsSplit:
    """Hold out whole modules until there are ``heldout_documents``; keep the rest for training.

    Raises:
        DataError: if there are too few docstrings for the held-out set and at least one training pair.
    """
    by_module: dict[str, list[DocsPair]] = {}
    for pair in pairs:
        by_module.setdefault(pair.docstring.module, []).append(pair)
    order = sorted(by_module, key=lambda module: _drawn(seed, module))
    aside: list[DocsPair] = []
    while order and len(aside) < heldout_documents:
        aside += by_module[order.pop(0)]
    training = _shuffled([pair for module in order for pair in by_module[module]], seed)[:max_pairs]
    if len(aside) < heldout_documents or not training:
        raise DataError(
            f"{where}: {len(pairs)} usable docstrings are too few for {heldout_documents} held-out documents and "
            "training pairs; name more packages or lower --heldout-documents and --heldout-pairs"
        )
    aside = _shuffled(aside, seed)[:heldout_documents]
    return DocsSplit(training, aside[:heldout_pairs], [pair.docstring for pair in aside])


def _shuffled(pairs: list[DocsPair], seed: int) -> list[DocsPair]:
    return sorted(
        pairs, key=lambda pair: _drawn(seed, f"{pair.docstring.module}:{pair.docstring.name}", pair.docstring)
    )


def _drawn(seed: int, key: str, *tie: Docstring) -> tuple[Any, ...]:
    """Return a sort key: a hash of seed and name, then the summary, which orders two definitions of one name."""
    return (hashlib.sha256(f"{seed}:{key}".encode()).digest(), *(doc.summary for doc in tie))


# 5. Write.


def _version(package: str) -> str | None:
    for distribution in importlib.metadata.packages_distributions().get(package, ()):
        return importlib.metadata.version(distribution)
    return None


def _finished(output: Path, about: dict[str, Any]) -> dict[str, Any]:
    mark = output / _MARK
    before = read_json(mark) if mark.is_file() else None
    if not isinstance(before, dict) or {key: before.get(key) for key in about} != about:
        raise DataError(f"{output}: already exists and is not the result of this command; choose another --output")
    missing = [name for name in _FILES if not (output / name).is_file()]
    if missing:
        raise DataError(f"{output}: {', '.join(missing)} missing; delete the folder and run again")
    log.info("%s: already complete", output)
    return before


def _write(output: Path, split: DocsSplit, about: dict[str, Any]) -> None:
    """Write a temporary folder, then rename it, so that the output is complete or absent."""
    beside = output.with_name(output.name + ".unfinished")
    if beside.exists():
        if not (beside / _MARK).is_file():
            raise DataError(
                f"{beside}: in the way, and not written by this command; move it or choose another --output"
            )
        shutil.rmtree(beside)
    (beside / "pairs").mkdir(parents=True)
    (beside / _MARK).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    write_jsonl(
        beside / "pairs" / f"{SOURCE_NAME}.jsonl",
        (
            {"query": pair.docstring.summary, "positive": pair.docstring.body, "negative": pair.negative}
            for pair in split.training
        ),
    )
    documents = {f"d{i}": doc.body for i, doc in enumerate(split.documents)}
    queries = {f"q{i}": pair.docstring.summary for i, pair in enumerate(split.heldout)}
    # The held-out documents start with the pairs' own, in the same order.
    write_retrieval_task(beside / "heldout", documents, queries, {f"q{i}": f"d{i}" for i in range(len(queries))})
    os.replace(beside, output)
