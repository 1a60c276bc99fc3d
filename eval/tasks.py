"""Which tasks: mteb's by name or benchmark, a local retrieval folder, AdvBench-IR; and where their data is.

With a data root, an offline copy by hub path (``DIR/mteb/scifact``; see :mod:`eval.fetch`), the hub is not asked,
and tasks whose data is missing are known before anything is embedded.
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

from anchor.errors import ConfigError, DataError
from eval.advbench import ADVBENCH, AdvBenchIR, own_metadata
from eval.local_data import data_hash, distinct_path, holds_files, read_checksums
from eval.retrieval_folder import check_retrieval, retrieval_path

LITE_TASKS = (
    *("ArguAna", "ClimateFEVERHardNegatives", "AskUbuntuDupQuestions", "ArXivHierarchicalClusteringP2P"),
    *("MedrxivClusteringP2P.v2", "SprintDuplicateQuestions", "Banking77Classification", "ImdbClassification"),
    *("BIOSSES", "STS17"),
)
"""The ten-task list of LLM2Vec-Gen's ablations, all of MTEB(eng, v2)."""


ANCHOR15_TASKS = (
    *("ArguAna", "NFCorpus", "SciFact", "StackOverflowDupQuestions", "SciDocsRR"),
    *("BiorxivClusteringS2S", "MedrxivClusteringS2S", "TwentyNewsgroupsClustering", "SprintDuplicateQuestions"),
    *("Banking77Classification", "EmotionClassification", "MassiveIntentClassification"),
    *("STS17", "SICK-R", "STSBenchmark"),
)
"""The 15 tasks of Anchor Embedding's ablations, all of MTEB(eng, v1), which are those of LLM2Vec's (BehnamGhader et al.
2024, arXiv:2404.05961, appendix)."""
BRIGHT_TOKENS = 4096
"""Longest text of BRIGHT in LLM2Vec-Gen's evaluation."""
_OWN = {"lite": ("MTEB(eng, v2)", LITE_TASKS), "anchor15": ("MTEB(eng, v1)", ANCHOR15_TASKS)}


def find_benchmark(name: str) -> Benchmark:
    """A benchmark of mteb by name, ``lite`` or ``anchor15``.

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


def tasks_by_name(names: Sequence[str], data_root: Path | None) -> list[AbsTask]:
    """Tasks by name; with ``data_root`` their data comes from ``data_root/<hub path>``.

    Raises:
        ConfigError: unknown task.
        DataError: tasks whose data is not under ``data_root``, all of them named.
    """
    tasks, missing = with_data(named_tasks(names), data_root)
    if missing:
        raise DataError(f"{data_root}: no data for {', '.join(missing)}")
    return tasks


def named_tasks(names: Sequence[str]) -> list[AbsTask]:
    """Tasks by name, their data as mteb finds it.

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
    """The tasks whose data is there, and ``name (folder)`` of the others.

    Args:
        tasks: their data's path is changed to the folder under ``data_root``, and the revision, which goes into the
            results, gets the folder's hash. A folder that ``checksums.json`` lists with another revision counts as
            missing; one that it does not list is taken as it is.
        data_root: None: everything is left to mteb and the hub, except AdvBench-IR, which only exists offline.

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
        if isinstance(task, AbsTaskAggregate):  # mteb makes its parts once, for all who ask
            own = [copy.copy(part) for part in parts_of(task)]
            task.metadata = task.metadata.model_copy(update={"tasks": own})
        for part in parts_of(task):
            folder = data_root / part.metadata.dataset["path"]
            hashes = [data_hash(data_root / path) for path, _ in hub_datasets(part)]
            # AdvBench-IR finds its second folder beside the first, and reads both by such names itself.
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
    """``(path, revision)`` of the hub repositories that a task reads."""
    if isinstance(task, AdvBenchIR):
        return [(path, None) for path in task.hub_paths]
    return [(one.metadata.dataset["path"], one.metadata.dataset.get("revision")) for one in parts_of(task)]


def parts_of(task: AbsTask) -> list[AbsTask]:
    """The tasks that a task of tasks is made of; else only itself."""
    return list(task.metadata.tasks) if isinstance(task, AbsTaskAggregate) else [task]


def _absent(data_root: Path, path: str, revision: str | None, sums: dict[str, Any]) -> str | None:
    """What to say of a repository that a task cannot use; None where it is there."""
    folder = data_root / path
    if not holds_files(folder):
        return str(folder)
    if path in sums and sums[path]["revision"] != revision:
        return f"{folder} holds revision {sums[path]['revision']}, the task wants {revision}"
    return None


def is_bright(task: AbsTask) -> bool:
    """Whether a task is one of BRIGHT's."""
    return task.metadata.name.startswith("Bright") and not task.metadata.name.startswith("BrightPro")


def local_retrieval_task(folder: Path) -> AbsTask:
    """A retrieval task from a folder with corpus.jsonl, queries.jsonl and qrels/test.jsonl, or BEIR's qrels/test.tsv.

    Raises:
        DataError: a file is missing, or a row of one cannot be used.
    """
    check_retrieval(folder)

    class LocalRetrieval(AbsTaskRetrieval):
        metadata = own_metadata(
            f"Local-{folder.resolve().name}", str(retrieval_path(folder)), f"local-{data_hash(folder)}"
        )

    return LocalRetrieval()
