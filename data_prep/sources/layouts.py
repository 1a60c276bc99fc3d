"""Rows in the layouts of other trainers -> rows with one text per side.

A layout says which fields hold the sides of a pair, and how to turn a row into one row per positive:

* ``columns``: as the recipe names them.
* ``sentence_transformers``: ``anchor``, ``positive`` and any number of ``negative``, ``negative_1``, ``negative_2`` ...
* ``flag_embedding`` (BGE): ``query``, ``pos`` and ``neg``, lists of texts.
* ``tevatron``: ``query``, ``positive_passages`` and ``negative_passages``, lists of ``{"title", "text"}``. A passage
  becomes its title, a space and its text, as in Tevatron's own collator.

Fields that a layout does not name (ids, scores) are ignored.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from anchor.config.pack_recipe import Columns, FilesSource, HubSource
from anchor.data.row_files import Row
from anchor.errors import DataError, did_you_mean

_NEGATIVE = re.compile(r"negative(?:_(\d+))?")


@dataclass(frozen=True, slots=True)
class Layout:
    """Layout of a source's rows.

    Attributes:
        columns: fields of the rows that :attr:`expand` returns.
        expand: splits a row into rows with one positive each, and raises :class:`DataError` for a bad row. None if rows
            need no splitting.
    """

    columns: Columns
    expand: Callable[[Mapping[str, Any]], list[dict[str, Any]]] | None


def layout_of(section: FilesSource | HubSource) -> Layout:
    """Return the layout that a recipe's section declares."""
    if section.format == "sentence_transformers":
        return Layout(Columns(query="anchor", negatives=("negative",)), _sentence_transformers)
    if section.format == "flag_embedding":
        return Layout(Columns(positive="pos", negatives=("neg",)), _flag_embedding)
    if section.format == "tevatron":
        return Layout(Columns(positive="positive_passages", negatives=("negative_passages",)), _tevatron)
    return Layout(section.columns, None)


def expanded(row: Row, layout: Layout, positives: str) -> list[Row]:
    """Expand a parsed row into one row per pair.

    Args:
        row: row as it was read.
        layout: layout of the row.
        positives: ``first`` keeps only the first positive and counts the others in ``unused_positives``; ``each`` keeps
            all.
    """
    # `pair_from_row` refuses rows that are not objects, with all other bad rows.
    if layout.expand is None or row.problem is not None or not isinstance(row.value, Mapping):
        return [row]
    try:
        found = layout.expand(row.value)
    except DataError as error:
        return [row._replace(problem=str(error))]
    if positives == "first":
        return [row._replace(value=found[0], unused_positives=len(found) - 1)]
    return [row._replace(value=value) for value in found]


def _sentence_transformers(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = [name for name in row if _NEGATIVE.fullmatch(name)]
    negatives: list[Any] = []
    for name in sorted(names, key=lambda name: int(_NEGATIVE.sub(r"\1", name) or 0)):
        value = row[name]
        negatives += value if isinstance(value, list) else [value]
    return [{**{name: row[name] for name in row if name not in names}, "negative": negatives}]


def _flag_embedding(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    texts = _list(row, "pos")
    if not texts:
        raise DataError("field 'pos' is empty; remove the row or use on_bad_row: skip")
    return [{**row, "pos": text} for text in texts]


def _tevatron(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    texts = _passages(row, "positive_passages")
    if not texts:
        raise DataError("field 'positive_passages' is empty; remove the row or use on_bad_row: skip")
    negatives = {"negative_passages": _passages(row, "negative_passages")} if "negative_passages" in row else {}
    return [{**row, **negatives, "positive_passages": text} for text in texts]


def _list(row: Mapping[str, Any], name: str) -> list[Any]:
    if name not in row:
        raise DataError(f"no field '{name}'{did_you_mean(name, row)}")
    value = row[name]
    if not isinstance(value, list):
        raise DataError(f"field '{name}' is {type(value).__name__}, expected a list")
    return value


def _passages(row: Mapping[str, Any], name: str) -> list[str]:
    texts = []
    for passage in _list(row, name):
        if not isinstance(passage, Mapping) or not isinstance(passage.get("text"), str):
            raise DataError(f"field '{name}' has a passage without text; expected objects with title and text")
        title = passage.get("title")
        texts.append(f"{title} {passage['text']}" if title else passage["text"])
    return texts
