"""``python -m eval mteb``: real mteb tasks, by name, from the hub, from an offline copy or from a local folder."""

import difflib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mteb
import numpy as np
from mteb.abstasks.abstask import AbsTask
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction

from anchor.errors import ConfigError, DataError
from eval.encoder import Encoder

log = logging.getLogger(__name__)


class MtebEncoder(AbsEncoder):
    """An :class:`Encoder` as mteb calls it; prompts by mteb's own order of names.

    Args:
        encoder: the model folder.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.model_prompts = self._prompts = encoder.prompts
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": f"anchor/{encoder.folder.resolve().parent.name}-{encoder.folder.name}",
                "revision": encoder.revision(),
                "max_tokens": encoder.about["max_tokens"],
                "embed_dim": encoder.dimension,
                "similarity_fn_name": ScoringFunction.COSINE,
            }
        )

    def encode(self, inputs: Any, *, task_metadata: TaskMetadata, prompt_type: Any = None, **_: Any) -> np.ndarray:
        """Unit vectors (float32) of all texts of a data loader."""
        texts = [text for batch in inputs for text in batch["text"]]
        name = self.get_prompt_name(task_metadata, prompt_type)
        return self._encoder.encode(texts, self._prompts[name] if name is not None else "")


def tasks_by_name(names: Sequence[str], data_root: Path | None) -> list[AbsTask]:
    """mteb's own tasks; with ``data_root`` their data comes from ``data_root/<hub path>``.

    Raises:
        ConfigError: unknown task.
        DataError: tasks whose data is not under ``data_root``, all of them named.
    """
    known = {task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "`mteb available-tasks` lists them"
            raise ConfigError(f"--tasks: mteb has no task '{name}'; {hint}")
    tasks = list(mteb.get_tasks(tasks=list(names), exclude_superseded=False))
    if data_root is None:
        return tasks
    missing = []
    for task in tasks:
        folder = data_root / task.metadata.dataset["path"]
        if not folder.is_dir():
            missing.append(f"{task.metadata.name} ({folder})")
        dataset = {**task.metadata.dataset, "path": str(folder.resolve())}
        task.metadata = task.metadata.model_copy(update={"dataset": dataset})
    if missing:
        raise DataError(f"{data_root}: no data for {', '.join(missing)}")
    return tasks


def local_retrieval_task(folder: Path) -> AbsTask:
    """A retrieval task from a folder in MTEB's layout: corpus.jsonl, queries.jsonl, qrels/test.jsonl, README.md.

    Raises:
        DataError: a file is missing.
    """
    for name in ("README.md", "corpus.jsonl", "queries.jsonl", "qrels/test.jsonl"):
        if not (folder / name).is_file():
            raise DataError(f"{folder}: no {name}; expected a retrieval task in MTEB's folder layout")

    class LocalRetrieval(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=f"Local-{folder.resolve().name}",
            dataset={"path": str(folder.resolve()), "revision": "local"},
            description="A retrieval task from a local folder.",
            type="Retrieval",
            category="t2t",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            reference=None,
            date=None,
            domains=None,
            task_subtypes=None,
            license=None,
            annotations_creators=None,
            dialect=None,
            sample_creation=None,
            bibtex_citation=None,
        )

    return LocalRetrieval()


def run_tasks(encoder: Encoder, tasks: Sequence[AbsTask], output: Path) -> dict[str, float]:
    """Score the tasks; finished ones of the same weights are not run again.

    Args:
        encoder: the model folder.
        tasks: what to score.
        output: results in mteb's own layout, and ``scores.json``.

    Returns:
        Main score of each task, by name.
    """
    scores_file = output / "scores.json"
    model: Any = MtebEncoder(encoder)  # mteb's protocol also asks for a constructor by name
    result = mteb.evaluate(model, list(tasks), cache=mteb.ResultCache(output), show_progress_bar=False)
    scores = {one.task_name: float(one.get_score()) for one in result.task_results}
    kept = json.loads(scores_file.read_text(encoding="utf-8")) if scores_file.is_file() else {}
    same = kept.get("revision") == encoder.revision()
    merged = {**(kept["scores"] if same else {}), **scores}
    about = {"model": str(encoder.folder), "revision": encoder.revision(), "scores": merged}
    scores_file.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return scores
