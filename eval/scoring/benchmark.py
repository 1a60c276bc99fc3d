"""``python -m eval mteb``: score a model on mteb tasks, with mteb's own scoring code.

1. Each task's texts get the instruction from the prompt file. For a task that the file does not list, fall back to the
   file's general query instruction, then to the instruction of mteb's task, then to the model folder's prompt that
   mteb selects. ``scores.json`` records the prompts used.
2. All ranks embed; rank 0 scores (:mod:`anchor.encoding.ranks`). Rank 0 runs two tasks in threads that take turns to
   embed: while mteb scores one task, the ranks embed the other. Vectors stay on disk until the task's result is saved.
3. Results are written in mteb's layout. The model's revision covers weights, dtype and prompts; the revision of a local
   data set includes its :func:`eval.scoring.local_data.data_hash`. So a result from other prompts or data is never
   reused.
"""

import json
import logging
import shutil
import threading
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import xxhash
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from mteb.abstasks.abstask import AbsTask
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType

from anchor.data.datasets_errors import datasets_line
from anchor.data.templates import Template
from anchor.encoding.encoder import TextEncoder
from anchor.errors import DataError, first_line
from eval.embedding.vectors import write_json
from eval.reporting.table import SCORES, read_scores
from eval.scoring.advbench import AdvBenchIR, reported
from eval.scoring.cache import VectorCache
from eval.scoring.prompts import PromptSet
from eval.scoring.tasks import parts_of

log = logging.getLogger(__name__)

_HUB_ERRORS = (ConnectionError, DatasetsError, HfHubHTTPError, LocalEntryNotFoundError)
_DEFAULT_FORMAT = "{instruction}: {text}"


class MtebEncoder(AbsEncoder):
    """Adapter from :class:`TextEncoder` to mteb's encoder interface; only one thread embeds at a time.

    Args:
        encoder: the model folder.
        prompts: instructions per task; None uses only the folder's own prompts.
        cache: folder for the vectors of unfinished tasks; None keeps no vectors.
    """

    def __init__(self, encoder: TextEncoder, prompts: PromptSet | None = None, cache: Path | None = None) -> None:
        self._encoder = encoder
        self._set = prompts
        self._cache = cache
        self._open: dict[str, VectorCache] = {}
        self._turn = threading.Lock()
        self._used: dict[str, dict[str, str]] = {}
        self.model_prompts = encoder.prompts
        self.revision = f"{encoder.revision()}-{encoder.dtype}-{_prompts_id(encoder, prompts)}"
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": f"anchor/{encoder.folder.resolve().parent.name}-{encoder.folder.name}",
                "revision": self.revision,
                "max_tokens": encoder.max_tokens,
                "embed_dim": encoder.dimension,
                "similarity_fn_name": ScoringFunction.COSINE,
            }
        )

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: TaskMetadata,
        prompt_type: PromptType | None = None,
        normalize: bool = True,
        **_: Any,
    ) -> np.ndarray:
        """Embed all texts of a data loader; return float32 vectors, of length 1 unless ``normalize`` is false."""
        texts = [text for batch in inputs for text in batch["text"]]
        name, prompt = task_metadata.name, self.prompt(task_metadata, prompt_type)
        with self._turn:
            self._used.setdefault(name, {})[prompt_type.value if prompt_type else "text"] = prompt
            if self._cache is None:
                return (self._encoder.encode if normalize else self._encoder.states)(texts, prompt)
            if name not in self._open:
                self._open[name] = VectorCache(self._folder(self._cache, name, normalize), self.revision)
            return self._open[name].encode(self._encoder, texts, prompt, normalize=normalize)

    def prompt(self, task: TaskMetadata, prompt_type: PromptType | None) -> str:
        """Return the prompt that precedes every text of a task."""
        if self._set is not None:
            if prompt_type == PromptType.document:
                return self._joined(self._set.document)
            own: Any = task.prompt
            of_mteb = own.get("query") if isinstance(own, dict) else own
            general = self._set.query if prompt_type == PromptType.query else None
            instruction = self._set.tasks.get(task.name, general or of_mteb)
            if instruction is not None:
                return self._joined(instruction)
        name = self.get_prompt_name(task, prompt_type)
        return self.model_prompts[name] if self.model_prompts and name is not None else ""

    def used(self, task: AbsTask) -> dict[str, dict[str, str]]:
        """Return the prompts used: task name -> kind of text -> prompt. An aggregate task has several names."""
        with self._turn:
            names = [part.metadata.name for part in parts_of(task)]
            return {name: dict(self._used[name]) for name in names if name in self._used}

    def forget(self, task: AbsTask) -> None:
        """Delete a task's vectors, including those left by a killed run; call it once the result is saved."""
        with self._turn:
            for part in parts_of(task):
                self._open.pop(part.metadata.name, None)
                if self._cache is not None:
                    for normalize in (True, False):
                        shutil.rmtree(self._folder(self._cache, part.metadata.name, normalize), ignore_errors=True)

    def _folder(self, cache: Path, task: str, normalize: bool) -> Path:
        return cache / self.revision / (task.replace("/", "_") + ("" if normalize else ".unnormalised"))

    def _joined(self, instruction: str | None) -> str:
        if instruction is None:
            return ""
        template = self._encoder.about.get("template", {})
        joined = (self._set.instruction_format if self._set else None) or template.get("instruction_format")
        return Template("", "", joined or _DEFAULT_FORMAT).instruction_head(instruction)


class _DotProduct(AbsEncoder):
    """The same encoder with unnormalised vectors, compared by dot product."""

    def __init__(self, of: MtebEncoder) -> None:
        self._of = of
        self.revision = of.revision
        meta: Any = of.mteb_model_meta
        self.mteb_model_meta = meta.model_copy(update={"similarity_fn_name": ScoringFunction.DOT_PRODUCT})

    def encode(self, inputs: Any, **about: Any) -> np.ndarray:
        return self._of.encode(inputs, normalize=False, **about)


class _Results(mteb.ResultCache):
    """mteb's result files, one thread at a time: mteb also reads and rewrites files that tasks share."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._turn = threading.RLock()

    def save_to_cache(self, *args: Any, **kwargs: Any) -> None:
        with self._turn:
            super().save_to_cache(*args, **kwargs)

    def load_task_result(self, task_name: str, model_name: Any, *args: Any, **kwargs: Any) -> Any:
        with self._turn:
            try:
                return super().load_task_result(task_name, model_name, *args, **kwargs)
            except (ValueError, KeyError, TypeError) as error:
                file = self.get_task_result_path(task_name=task_name, model_name=model_name)
                raise DataError(f"{file}: half-written or damaged; delete it and run the command again") from error

    def holds(self, task: AbsTask, model: ModelMeta) -> bool:
        """Return whether a task's result exists; delete results of the task or its parts that used other data."""
        for one in (task, *parts_of(task)):
            found = self.load_task_result(one.metadata.name, model)
            if found is not None and found.dataset_revision != one.metadata.revision:
                log.info("%s: the data has changed, it is scored again", one.metadata.name)
                self.get_task_result_path(one.metadata.name, model).unlink()
        return self.load_task_result(task.metadata.name, model) is not None


def run_tasks(
    encoder: TextEncoder,
    tasks: Sequence[AbsTask],
    output: Path,
    prompts: PromptSet | None = None,
    *,
    cache: bool = True,
    at_once: int = 2,
) -> dict[str, float]:
    """Score the tasks; skip those already scored with the same weights, dtype, prompts and data.

    Args:
        encoder: the model folder.
        tasks: tasks to score.
        output: folder for the results in mteb's layout and ``scores.json``.
        prompts: instructions per task; None uses the folder's own prompts.
        cache: keep vectors on disk until the task is scored.
        at_once: number of tasks with their texts in memory; with 1, embedding stops while a task is scored.

    Returns:
        Main score of each task, by name.

    Raises:
        DataError: a vector is not finite, a task's data cannot be loaded, or an earlier run's file cannot be read.
    """
    scores_file = output / SCORES
    model: Any = MtebEncoder(encoder, prompts, output / "cache" if cache else None)
    kept = read_scores(output) if scores_file.is_file() else {}
    same = kept.get("revision") == model.revision
    about = {
        "model": str(encoder.folder),
        "revision": model.revision,
        "prompts": prompts.name if prompts is not None else "folder",
        "scores": dict(kept["scores"]) if same else {},
        "prompts_used": dict(kept.get("prompts_used", {})) if same else {},
    }
    results, scores = _Results(output), dict[str, float]()
    gone = [task.metadata.name for task in tasks if not results.holds(task, model.mteb_model_meta)]
    if [about["scores"].pop(name) for name in gone if name in about["scores"]]:
        write_json(scores_file, about)

    def run(task: AbsTask) -> tuple[AbsTask, float]:
        try:
            scored_by: Any = _DotProduct(model) if isinstance(task, AdvBenchIR) else model
            result = mteb.evaluate(scored_by, [task], cache=results, show_progress_bar=False)
        except (*_HUB_ERRORS, FileNotFoundError, KeyError, ValueError) as error:
            said = _data_error(task, error)
            if said is None:
                raise
            raise said from error
        if not result.task_results:  # for private data, mteb records the exception and continues
            why = first_line(ValueError(result.exceptions[0].exception)) if result.exceptions else "mteb says nothing"
            raise DataError(f"{task.metadata.name}: its data cannot be loaded: {why}; leave the task out")
        model.forget(task)
        if isinstance(task, AdvBenchIR):
            log.info("%s, %s", task.metadata.name, reported(result.task_results[0].scores["test"][0]))
        # A stored result may hold more subsets than this task asks for.
        return task, float(result.task_results[0].validate_and_filter_scores(task).get_score())

    with ThreadPoolExecutor(max_workers=at_once, thread_name_prefix="task") as pool:
        running = [pool.submit(run, task) for task in tasks]
        try:
            for number, done in enumerate(as_completed(running), start=1):
                task, score = done.result()
                name = task.metadata.name
                scores[name] = about["scores"][name] = score
                about["prompts_used"].update(model.used(task))
                write_json(scores_file, about)
                log.info("%d of %d: %s %.4f", number, len(tasks), name, score)
        finally:
            for one in running:  # after an error, start no further task
                one.cancel()
    return scores


def _data_error(task: AbsTask, error: Exception) -> DataError | None:
    """Return the error to raise if the task's data caused ``error``, else None."""
    part, step = task, None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name in ("load_data", "evaluate") and isinstance(frame.f_locals.get("self"), AbsTask):
            part, step = frame.f_locals["self"], frame.f_code.co_name
    no_split = isinstance(error, KeyError) and any(one in part.eval_splits for one in error.args)
    if not (isinstance(error, _HUB_ERRORS) or no_split or step == "load_data"):
        return None
    cause = error.__cause__ if isinstance(error, DatasetsError) and isinstance(error.__cause__, Exception) else error
    why = f"no split {error}" if no_split else datasets_line(cause)
    why = f"KeyError {why}" if isinstance(error, KeyError) and not no_split else why
    folder = Path(part.metadata.dataset["path"])
    if folder.is_dir():
        return DataError(f"{folder.resolve()}: {part.metadata.name} cannot read its data: {why}; fetch it again")
    return DataError(
        f"{task.metadata.name}: its data cannot be loaded: {why}; without a network give --data-root (python -m eval "
        "fetch makes it)"
    )


def _prompts_id(encoder: TextEncoder, prompts: PromptSet | None) -> str:
    parts: list[Any] = [encoder.prompts, encoder.about.get("template"), encoder.max_tokens]
    if prompts is not None:
        parts += [prompts.tasks, prompts.document, prompts.instruction_format]
        parts += [] if prompts.query is None else [prompts.query]
    name = prompts.name if prompts is not None else "folder"
    return f"{name}-{xxhash.xxh3_64_hexdigest(json.dumps(parts, sort_keys=True).encode())[:8]}"
