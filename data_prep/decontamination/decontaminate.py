"""``python -m data_prep decontaminate``: report or remove training pairs that repeat evaluation texts.

1. Read the evaluation texts of every task: all texts in a task folder's files, or the lines of a text file. Skip ids,
   numbers and texts of fewer than ``min_words`` words.
2. Scan the pairs of an E5 folder. A pair matches a task if its query or its positive matches one of the task's texts,
   exactly or by n-gram overlap (:mod:`data_prep.decontamination.overlap`). Hard negatives are not checked.
3. Report per task and per source. With an output folder, copy the lines of pairs that match nothing, unchanged.
"""

import io
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from anchor.data.row_files import TABLE_SUFFIXES, open_input, open_output, read_rows
from anchor.errors import ConfigError, DataError
from data_prep.decontamination.overlap import EvaluationTexts, Lookup, Match
from data_prep.new_folder import new_folder
from data_prep.sources.e5_rows import SIDES, Line, read_lines
from data_prep.sources.streams import e5_files, files_below
from data_prep.tables import print_table

log = logging.getLogger(__name__)

REPORT_NAME = "decontaminate.json"
_CHUNK_ROWS = 1024
_SHOWN_CHARACTERS = 100


@dataclass(slots=True)
class _Task:
    """Counts for one task.

    Attributes:
        texts: number of evaluation texts.
        pairs: number of matching pairs, each counted once.
        kinds: number of pairs by side and kind of match, ``query_exact`` to ``positive_overlap``.
        examples: the first matches.
    """

    texts: int
    pairs: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)


def decontaminate(
    pairs: Path,
    against: Sequence[Path],
    output: Path | None,
    *,
    overlap: float,
    ngram_words: int,
    min_words: int,
    examples: int,
    as_json: bool,
) -> dict[str, Any]:
    """Run the command and write its report to stdout.

    Args:
        pairs: folder or file in E5 layout.
        against: task folders, single files of task folders, or text files.
        output: new folder, in E5 layout, for the pairs that match nothing; None only reports.
        overlap: smallest share of n-grams that counts as a match, above 0 and at most 1.
        ngram_words: words in an n-gram.
        min_words: shorter evaluation texts are ignored.
        examples: matches to show per task.
        as_json: write one JSON object instead of tables.

    Returns:
        The report.

    Raises:
        ConfigError: if a path is missing, a folder has no texts, two tasks share a name, or a number is out of range.
        DataError: if a file cannot be read, or the output folder exists.
    """
    if not 0.0 < overlap <= 1.0 or ngram_words < 1 or min_words < 1:
        raise ConfigError(
            f"--overlap is {overlap:g}, --ngram-words {ngram_words}, --min-words {min_words}; give a share above 0 and "
            "at most 1, and positive numbers of words"
        )
    files = e5_files(pairs, "PAIRS")
    texts, tasks = _read_tasks(against, ngram_words, min_words)
    lookup = texts.freeze()
    sources: list[dict[str, Any]] = []
    with ExitStack() as stack:
        folder = stack.enter_context(new_folder(output)) if output is not None else None
        for name, file in files.items():
            search = _Search(name, texts, lookup, tasks, overlap, examples)
            if folder is None:
                search.run(file, None)
            else:
                with open_output(folder / file.name) as kept:
                    search.run(file, kept)
            sources.append(search.report())
        settings = {"overlap": overlap, "ngram_words": ngram_words, "min_words": min_words}
        report = {
            "pairs": str(pairs),
            "output": str(output) if output is not None else None,
            **settings,
            "sources": sources,
            "tasks": [
                {"task": name, "texts": task.texts, "pairs": task.pairs, **task.kinds, "examples": task.examples}
                for name, task in tasks.items()
            ],
        }
        if folder is not None:
            (folder / REPORT_NAME).write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    _show(report, as_json)
    return report


# 1. Evaluation texts.


def _read_tasks(against: Sequence[Path], ngram_words: int, min_words: int) -> tuple[EvaluationTexts, dict[str, _Task]]:
    texts = EvaluationTexts(ngram_words=ngram_words, min_words=min_words)
    tasks: dict[str, _Task] = {}
    for path in against:
        name = path.name if path.is_dir() else f"{path.resolve().parent.name}/{path.name}"
        if name in tasks:
            raise ConfigError(f"--against: two tasks are called '{name}'; rename one folder")
        files = evaluation_files(path)
        number = texts.add(name, (text for file in files for text in evaluation_texts(file)))
        if not number:
            raise ConfigError(f"--against: {path}: holds no text of {min_words} words or more; lower --min-words")
        kinds = Counter({f"{side}_{kind}": 0 for side in SIDES for kind in ("exact", "overlap")})
        tasks[name] = _Task(number, kinds=kinds)
        log.info("%s: %d evaluation texts", name, number)
    return texts, tasks


def evaluation_files(path: Path) -> list[Path]:
    """Return a task folder's files with texts, at any depth and sorted by path, or the file itself.

    Raises:
        ConfigError: if the path does not exist or holds no such file.
    """
    suffixes = (*TABLE_SUFFIXES, ".txt")
    if path.is_file() and path.name.endswith(suffixes):
        return [path]
    found = [file for file in files_below(path) if file.name.endswith(suffixes)]
    if not found:
        what = "holds no file" if path.is_dir() else "no such folder or file"
        raise ConfigError(f"--against: {path}: {what} ending in {', '.join(suffixes)}")
    return found


def evaluation_texts(file: Path) -> Iterator[str]:
    """Yield the texts of a file: strings in any field except ids, also inside lists, or the lines of a `.txt` file.

    Raises:
        DataError: if the file or a row cannot be read.
    """
    if file.suffix == ".txt":
        try:
            with io.TextIOWrapper(open_input(file), encoding="utf-8") as lines:
                yield from lines
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: cannot be read as UTF-8 text: {error}") from error
        return
    for row in read_rows(file):
        if row.problem is not None:
            raise DataError(f"{row.place}: {row.problem}")
        yield from _strings(row.value)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            # Skip ids: `_id`, `id`, `query-id`, `corpus_id`.
            if name.lower().replace("-", "_").rpartition("_")[2] != "id":
                yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


# 2. Pairs.


class _Search:
    """Search through one source, with its counts."""

    def __init__(
        self,
        name: str,
        texts: EvaluationTexts,
        lookup: Lookup,
        tasks: dict[str, _Task],
        overlap: float,
        examples: int,
    ) -> None:
        self._name, self._texts, self._lookup = name, texts, lookup
        self._tasks, self._overlap, self._examples = tasks, overlap, examples
        self._rows = self._unreadable = self._matched = 0

    def report(self) -> dict[str, Any]:
        return {"source": self._name, "rows": self._rows, "unreadable": self._unreadable, "matched": self._matched}

    def run(self, file: Path, kept: BinaryIO | None) -> None:
        """Look up all lines; write those that match nothing to ``kept``."""
        lines = read_lines(file, f"reading {self._name}")
        while chunk := list(islice(lines, _CHUNK_ROWS)):
            self._chunk(file, chunk, kept)

    def _chunk(self, file: Path, chunk: list[Line], kept: BinaryIO | None) -> None:
        self._rows += len(chunk)
        texts = [line.row[side] for line in chunk if line.row is not None for side in SIDES]
        found = iter(self._lookup.matches(texts, self._overlap))
        for line in chunk:
            # Keep rows without texts: `pack` refuses or skips them as its recipe says.
            self._unreadable += line.row is None
            matches = [next(found) for _ in SIDES] if line.row is not None else []
            if line.row is not None and any(matches):
                self._matched += 1
                self._count(f"{file}:{line.number}", line.row, matches)
            elif kept is not None:
                kept.write(line.data)

    def _count(self, where: str, row: dict[str, Any], matches: list[list[Match]]) -> None:
        touched: set[str] = set()
        for side, found in zip(SIDES, matches, strict=True):
            best: dict[str, Match] = {}
            for match in found:
                task = self._texts.tasks[match.text]
                if task not in best or match.overlap > best[task].overlap:
                    best[task] = match
            for name, match in best.items():
                task = self._tasks[name]
                task.kinds[f"{side}_{'exact' if match.exact else 'overlap'}"] += 1
                task.pairs += name not in touched
                touched.add(name)
                if len(task.examples) < self._examples:
                    evaluation = self._texts.previews[match.text]
                    example = {"where": where, "side": side, "overlap": round(match.overlap, 3), "exact": match.exact}
                    shown = {"text": row[side][: len(evaluation)], "evaluation_text": evaluation}
                    # A lone surrogate cannot be written as UTF-8.
                    task.examples.append(example | {k: v.encode(errors="replace").decode() for k, v in shown.items()})


# 3. Report.


def _show(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(report) + "\n")
        return
    names = ("texts", "pairs", "query_exact", "query_overlap", "positive_exact", "positive_overlap")
    columns = ("task", *(name.replace("_", " ") for name in names))
    print_table(columns, [(task["task"], *(f"{task[name]:,}" for name in names)) for task in report["tasks"]])
    sys.stdout.write("\n")
    names = ("rows", "unreadable", "matched")
    verb = "reported" if report["output"] is None else "removed"
    print_table(
        ("source", "rows", "unreadable", verb),
        [(source["source"], *(f"{source[name]:,}" for name in names)) for source in report["sources"]],
    )
    for task in report["tasks"]:
        for example in task["examples"]:
            kind = "exactly" if example["exact"] else f"by {example['overlap']:.0%}"
            sys.stdout.write(f"\n{task['task']}: {example['where']}, {example['side']}, {kind}\n")
            for name in ("text", "evaluation_text"):
                shown = json.dumps(example[name][:_SHOWN_CHARACTERS], ensure_ascii=False)
                sys.stdout.write(f"  {name.replace('_', ' ')}: {shown}\n")
