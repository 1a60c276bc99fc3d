"""Find tasks and their data: mteb tasks by name or benchmark, a local retrieval folder, or AdvBench-IR.

A data root is an offline copy by hub path (``DIR/mteb/scifact``; see :mod:`eval.scoring.fetch`). With one, no task
contacts the hub, and tasks with missing data are reported before anything is embedded.
"""

import copy
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mteb
import xxhash
from mteb.abstasks.abstask import AbsTask
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.benchmarks.benchmark import Benchmark

from anchor.errors import ConfigError
from eval.scoring.advbench import ADVBENCH, AdvBenchIR, own_metadata
from eval.scoring.local_data import data_hash, distinct_path, holds_files, read_checksums
from eval.scoring.retrieval_folder import check_retrieval, retrieval_path

LITE_TASKS = (
    *("ArguAna", "ClimateFEVERHardNegatives", "AskUbuntuDupQuestions", "ArXivHierarchicalClusteringP2P"),
    *("MedrxivClusteringP2P.v2", "SprintDuplicateQuestions", "Banking77Classification", "ImdbClassification"),
    *("BIOSSES", "STS17"),
)
"""The ten tasks of LLM2Vec-Gen's ablations, all from MTEB(eng, v2)."""


ANCHOR15_TASKS = (
    *("ArguAna", "NFCorpus", "SciFact", "StackOverflowDupQuestions", "SciDocsRR"),
    *("BiorxivClusteringS2S", "MedrxivClusteringS2S", "TwentyNewsgroupsClustering", "SprintDuplicateQuestions"),
    *("Banking77Classification", "EmotionClassification", "MassiveIntentClassification"),
    *("STS17", "SICK-R", "STSBenchmark"),
)
"""The 15 tasks of Anchor Embedding's ablations, all from MTEB(eng, v1).

LLM2Vec's ablations use the same tasks (BehnamGhader et al. 2024, arXiv:2404.05961, appendix).
"""
BRIGHT_TOKENS = 4096
"""Maximum text length for BRIGHT in LLM2Vec-Gen's evaluation."""
_OWN = {"lite": ("MTEB(eng, v2)", LITE_TASKS), "anchor15": ("MTEB(eng, v1)", ANCHOR15_TASKS)}


def find_benchmark(name: str) -> Benchmark:
    """Return a benchmark by name: one of mteb's, ``lite`` or ``anchor15``.

    Raises:
        ConfigError: unknown name.
    """
    if name in _OWN:
        whole, names = _OWN[name]
        return Benchmark(
            name=name, tasks=[one for one in mteb.get_benchmark(whole).tasks if one.metadata.name in names]
        )
    known = [*_OWN, *(one.name for one in mteb.get_benchmarks())]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "`mteb available-benchmarks` lists them"
        raise ConfigError(f"--benchmark: no benchmark is called '{name}'; {hint}")
    return mteb.get_benchmark(name)


def named_tasks(names: Sequence[str]) -> list[AbsTask]:
    """Return tasks by name, with data from the hub as mteb defines it.

    Raises:
        ConfigError: unknown task.
    """
    if not names:
        return []
    known = {task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)}
    for name in names:
        if name not in known and name != ADVBENCH:
            near = difflib.get_close_matches(name, known | {ADVBENCH}, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "`mteb available-tasks` lists them"
            raise ConfigError(f"--tasks: mteb has no task '{name}'; {hint}")
    of_mteb = [name for name in names if name != ADVBENCH]
    tasks: list[AbsTask] = list(mteb.get_tasks(tasks=of_mteb, exclude_superseded=False)) if of_mteb else []
    return [*tasks, *([AdvBenchIR()] if ADVBENCH in names else [])]


def with_data(tasks: Sequence[AbsTask], data_root: Path | None) -> tuple[list[AbsTask], list[str]]:
    """Return the tasks with available data, and ``name (folder)`` of each other task.

    Args:
        tasks: tasks to look up, changed in place. With ``data_root``, their data path becomes the folder under it, and
            the folder's hash is appended to the revision, which goes into the results. A folder that
            ``checksums.json`` lists with another revision counts as missing; an unlisted folder is accepted.
        data_root: offline copy. With None, mteb and the hub provide all data except AdvBench-IR's, which is
            offline only.

    Raises:
        ConfigError: a task of images, sound or video.
        DataError: ``checksums.json`` is not readable.
    """
    _refuse_other_than_text(tasks)
    there: list[AbsTask] = []
    missing: list[str] = []
    sums = {} if data_root is None else read_checksums(data_root)
    for task in tasks:
        if data_root is None:
            (missing.append(f"{ADVBENCH} (needs --data-root)") if isinstance(task, AdvBenchIR) else there.append(task))
            continue
        absent = [_absent(data_root, path, revision, sums) for path, revision in hub_datasets(task)]
        if any(absent):
            missing.append(f"{task.metadata.name} ({', '.join(one for one in absent if one)})")
            continue
        if isinstance(task, AbsTaskAggregate):  # mteb shares one copy of the parts, so copy them before the change
            own = [copy.copy(part) for part in parts_of(task)]
            task.metadata = task.metadata.model_copy(update={"tasks": own})
        for part in parts_of(task):
            folder = data_root / part.metadata.dataset["path"]
            hashes = [data_hash(data_root / path) for path, _ in hub_datasets(part)]
            # AdvBench-IR finds its second folder next to the first and calls distinct_path on both itself.
            path = folder.resolve() if isinstance(part, AdvBenchIR) else distinct_path(folder)
            _set_dataset(part, path=str(path), revision="-".join([part.metadata.revision, *hashes]))
        if isinstance(task, AbsTaskAggregate):
            revisions = " ".join(part.metadata.revision for part in parts_of(task))
            digest = xxhash.xxh3_64_hexdigest(revisions.encode())
            _set_dataset(task, revision=f"{task.metadata.revision}-{digest}")
        there.append(task)
    return there, missing


def _refuse_other_than_text(tasks: Sequence[AbsTask]) -> None:
    others = [task for task in tasks if set(task.metadata.modalities) != {"text"}]
    if others:
        first = f"{others[0].metadata.name} ({', '.join(sorted(others[0].metadata.modalities))})"
        raise ConfigError(
            f"{len(others)} of {len(tasks)} tasks are not of text alone, first {first}; a text embedder has no score "
            "there, leave them out"
        )


def _set_dataset(task: AbsTask, **changes: str) -> None:
    task.metadata = task.metadata.model_copy(update={"dataset": {**task.metadata.dataset, **changes}})


def hub_datasets(task: AbsTask) -> list[tuple[str, str | None]]:
    """Return ``(path, revision)`` of each hub repository that a task reads."""
    if isinstance(task, AdvBenchIR):
        return [(path, None) for path in task.hub_paths]
    return [(one.metadata.dataset["path"], one.metadata.dataset.get("revision")) for one in parts_of(task)]


def parts_of(task: AbsTask) -> list[AbsTask]:
    """Return the parts of an aggregate task; for any other task, only the task itself."""
    return list(task.metadata.tasks) if isinstance(task, AbsTaskAggregate) else [task]


def _absent(data_root: Path, path: str, revision: str | None, sums: dict[str, Any]) -> str | None:
    """Return why a task cannot use a repository, or None if it can."""
    folder = data_root / path
    if not holds_files(folder):
        return str(folder)
    if path in sums and sums[path]["revision"] != revision:
        return f"{folder} holds revision {sums[path]['revision']}, the task wants {revision}"
    return None


def is_bright(task: AbsTask) -> bool:
    """Return whether a task belongs to BRIGHT."""
    return task.metadata.name.startswith("Bright") and not task.metadata.name.startswith("BrightPro")


def local_retrieval_task(folder: Path) -> AbsTask:
    """Create a retrieval task from a folder in MTEB's or BEIR's layout.

    The folder holds corpus.jsonl, queries.jsonl and qrels/test.jsonl (MTEB) or qrels/test.tsv (BEIR).

    Raises:
        DataError: a file is missing, or one of its rows cannot be used.
    """
    check_retrieval(folder)

    class LocalRetrieval(AbsTaskRetrieval):
        metadata = own_metadata(
            f"Local-{folder.resolve().name}", str(retrieval_path(folder)), f"local-{data_hash(folder)}"
        )

    return LocalRetrieval()
