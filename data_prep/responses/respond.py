"""``python -m data_prep respond``: a language model's own answers to questions (LLM2Vec-Gen, arXiv:2603.10913).

1. Plan all batches (:mod:`data_prep.responses.questions`). ``--part i/n`` takes every n-th batch, starting with batch
   i.
2. Answer batch by batch (:mod:`data_prep.responses.engines`). Each finished batch is appended at once to
   ``work/PART.jsonl`` as one line, so a killed run loses only the current batch. The run holds ``work/PART.lock``.
3. Write, in the order of the questions, ``answers/PART.jsonl`` (``{"id", "question", "answer"}``, as `pack` reads it)
   and ``rejects/PART.jsonl`` (unusable rows and empty answers). Write the report ``PART.json`` last.

Neither interruptions nor the number of parts change a batch or its computation. On one kind of machine, the answers of
all parts together equal those of a single run.
"""

import json
import logging
import os
import re
import sys
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from anchor.config.model_path import resolve_model_path
from anchor.data.chat_templates import chat_frame
from anchor.data.tokenizer_files import load_tokenizer
from anchor.errors import DataError, ModelError
from anchor.locks import locked
from anchor.models.backbone import read_config
from anchor.models.generation import Answer, Sampling, device_kind, read_sampling
from anchor.progress import tracked
from data_prep.model_hash import weights_sha256
from data_prep.packing.spool import read_json, write_json
from data_prep.responses.engines import BATCH_TOKENS, choose_engine, open_engine
from data_prep.responses.questions import Prompts, Question, Reject, plan_prompts, read_questions
from data_prep.tables import print_table

log = logging.getLogger(__name__)

ANSWERS, REJECTS, WORK = "answers", "rejects", "work"
_THOUGHT = re.compile(r"\s*<think>.*?(</think>|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Options:
    """Options of a run.

    Attributes:
        model: folder, hub name or GGUF file.
        questions: files or folders.
        column: field of the question.
        output: folder for the answers.
        part: (part number from 0, number of parts).
        engine: ``auto``, ``vllm`` or ``transformers``.
        batch_tokens: token budget of a batch; None takes the engine's default.
        max_new_tokens: longest answer.
        max_input_tokens: longest prompt.
        seed: seed of the sampling.
        dtype: ``bf16`` or ``fp32``.
        device: torch device.
    """

    model: str
    questions: tuple[Path, ...]
    output: Path
    column: str = "question"
    part: tuple[int, int] = (0, 1)
    engine: str = "auto"
    batch_tokens: int | None = None
    max_new_tokens: int = 500
    max_input_tokens: int = 1024
    seed: int = 0
    dtype: str = "bf16"
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"{self.part[0]:05d}-of-{self.part[1]:05d}"


def respond(options: Options, *, as_json: bool) -> dict[str, Any]:
    """Run the command and write its report to stdout.

    Args:
        options: options of the run.
        as_json: write one JSON object instead of a table.

    Returns:
        The report.

    Raises:
        AnchorError: if a model, file, field or device is missing, the tokenizer has no chat template, the folder holds
            other answers, or another process is answering this part.
    """
    engine = choose_engine(options.engine, options.model)
    budget = options.batch_tokens or BATCH_TOKENS[engine]
    tokenizer = load_tokenizer(options.model)
    sampling = read_sampling(options.model, tokenizer)
    frame = _stored_frame(options) or _frame(tokenizer, options.model)
    questions, rejects = read_questions(options.questions, options.column)
    prompts = plan_prompts(
        questions,
        rejects,
        tokenizer,
        frame,
        max_input_tokens=options.max_input_tokens,
        max_new_tokens=options.max_new_tokens,
        batch_tokens=budget,
    )
    settings = {
        "model": options.model,
        "weights": _weights(options.model),
        "engine": engine,
        "device": device_kind(options.device) if engine == "transformers" else None,
        "dtype": options.dtype,
        "sampling": sampling.to_json(),
        "seed": options.seed,
        "max_new_tokens": options.max_new_tokens,
        "max_input_tokens": options.max_input_tokens,
        "batch_tokens": budget,
        "prompt": list(frame),
        "questions_xxh3": prompts.fingerprint,
    }
    done = options.output / f"{options.name}.json"
    _open(options, settings)
    busy = (
        f"{options.output}: another process is answering part {options.part[0]} of {options.part[1]}; wait for it or "
        "choose another --output"
    )
    with locked(options.output / WORK / f"{options.name}.lock", busy):
        missing = [
            kind for kind in (ANSWERS, REJECTS) if not (options.output / kind / f"{options.name}.jsonl").is_file()
        ]
        if done.is_file() and not missing:
            log.info("%s: already complete", done)
            return _show(read_json(done), as_json)
        if done.is_file():
            log.warning("%s: %s missing; answering again", done, " and ".join(f"its {kind}" for kind in missing))
            done.unlink()
        journal = _Journal(options.output / WORK / f"{options.name}.jsonl")
        _answer_missing(options, engine, sampling, tokenizer, prompts, journal)
        return _show(_finish(options, settings, prompts, journal), as_json)


def _answer_missing(
    options: Options, engine: str, sampling: Sampling, tokenizer: Any, prompts: Prompts, journal: "_Journal"
) -> None:
    missing = [i for i in range(options.part[0], len(prompts.batches), options.part[1]) if i not in journal.batches]
    if not missing:
        return
    model = open_engine(
        engine,
        options.model,
        sampling,
        dtype=options.dtype,
        device=options.device,
        seed=options.seed,
        limits=(options.max_input_tokens, options.max_new_tokens),
    )
    ends = list(accumulate(prompts.batches))
    sizes = {i: prompts.batches[i] for i in missing}
    for i in tracked(missing, "answering", sum(sizes.values()), unit=" questions", amount=sizes.__getitem__):
        batch = prompts.questions[ends[i] - sizes[i] : ends[i]]
        answers = model.answer([(question.text, ids) for question, ids in batch])
        texts = tokenizer.batch_decode([answer.ids for answer in answers], skip_special_tokens=True)
        journal.append(i, [_row(q, text, answer) for (q, _), text, answer in zip(batch, texts, answers, strict=True)])


def _frame(tokenizer: Any, model: str) -> tuple[str, str]:
    if not tokenizer.chat_template:
        raise ModelError(f"{model}: the tokenizer has no chat template; an instruct model is needed to answer")
    # Ask a thinking model not to think; other templates do not know the variable.
    thinking = {"enable_thinking": False} if "enable_thinking" in str(tokenizer.chat_template) else {}
    frame = chat_frame(tokenizer, add_generation_prompt=True, **thinking)
    if frame is None:
        raise ModelError(f"{model}: the chat template leaves out or changes the user's text; nothing can be asked")
    return frame


def _weights(model: str) -> str:
    """Identify the weights: return their sha256, or the commit of a hub model."""
    location = resolve_model_path(model)
    folder = Path(location.name)
    if location.gguf_file is not None:
        return weights_sha256([folder / location.gguf_file], model)
    return weights_sha256(folder.iterdir(), model) if folder.is_dir() else f"commit {read_config(model)._commit_hash}"


def _stored_frame(options: Options) -> tuple[str, str] | None:
    """Return the frame stored by an earlier part of this run, if any: some chat templates contain the date."""
    for file in sorted((options.output / WORK).glob("*.settings.json")):
        return tuple(read_json(file)["prompt"])
    return None


def _open(options: Options, settings: dict[str, Any]) -> None:
    """Create the folder, or check that it belongs to this run."""
    work = options.output / WORK
    if options.output.exists() and not work.is_dir() and (options.output.is_file() or any(options.output.iterdir())):
        raise DataError(f"{options.output}: already exists and is no run of respond; choose another --output")
    for file in sorted(work.glob("*.settings.json")):
        other, parts = read_json(file), int(file.name.split(".")[0].rpartition("-")[2])
        differing = [key for key, value in settings.items() if other.get(key) != value]
        if differing:
            raise DataError(
                f"{options.output}: holds answers of another run: {differing[0]} was {other.get(differing[0])!r}, is "
                f"{settings[differing[0]]!r}; choose another --output"
            )
        if parts != options.part[1]:
            raise DataError(
                f"{options.output}: holds a run in {parts} parts, this one is part {options.part[0]} of "
                f"{options.part[1]}; give the same number of parts or choose another --output"
            )
    for folder in (work, options.output / ANSWERS, options.output / REJECTS):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(work / f"{options.name}.settings.json", settings)


def _row(question: Question, text: str, answer: Answer) -> dict[str, Any]:
    """Return the journal's record of an answer."""
    bare = _THOUGHT.sub("", text, count=1) if text.lstrip().startswith("<think>") else text
    return {
        "row": question.number,
        "id": question.id,
        "question": question.text,
        "answer": bare.strip(),
        "tokens": len(answer.ids),
        "cut": answer.cut,
        "thought": bare != text,
    }


class _Journal:
    """Journal of finished batches, one line each.

    A last line that an interruption cut short is discarded. If a batch has two lines, the first counts.

    Args:
        file: file of the journal; created if missing.

    Attributes:
        batches: numbers of the finished batches.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.batches: set[int] = set()
        self.rows: list[dict[str, Any]] = []
        file.touch()
        whole = 0
        for line in file.read_bytes().split(b"\n")[:-1]:
            try:
                found = json.loads(line)
            except ValueError:  # after a power loss
                break
            self._take(found["batch"], found["rows"])
            whole += len(line) + 1
        os.truncate(file, whole)

    def _take(self, batch: int, rows: list[dict[str, Any]]) -> None:
        if batch not in self.batches:
            self.batches.add(batch)
            self.rows += rows

    def append(self, batch: int, rows: list[dict[str, Any]]) -> None:
        line = json.dumps({"batch": batch, "rows": rows}, ensure_ascii=False) + "\n"
        with self._file.open("ab") as out:
            out.write(line.encode())
            out.flush()
            os.fsync(out.fileno())
        self._take(batch, rows)


def _finish(options: Options, settings: dict[str, Any], prompts: Prompts, journal: _Journal) -> dict[str, Any]:
    rows = sorted(journal.rows, key=lambda row: row["row"])
    empty = [Reject(row["row"], row["id"], "the answer is empty") for row in rows if not row["answer"]]
    kept = [{name: row[name] for name in ("id", "question", "answer")} for row in rows if row["answer"]]
    # The first part reports the unusable rows.
    unusable = prompts.rejects if options.part[0] == 0 else []
    aside: list[Reject] = sorted(empty + unusable, key=lambda one: one.number)
    _write_lines(options.output / ANSWERS / f"{options.name}.jsonl", kept)
    _write_lines(options.output / REJECTS / f"{options.name}.jsonl", [one.to_json() for one in aside])
    report = {
        **settings,
        "part": list(options.part),
        "answered": len(kept),
        "empty": len(empty),
        "cut_at_limit": sum(row["cut"] for row in rows),
        "thinking_removed": sum(row["thought"] for row in rows),
        "unusable_questions": len(unusable),
        "answer_tokens": sum(row["tokens"] for row in rows),
    }
    write_json(options.output / f"{options.name}.json", report)
    (options.output / WORK / f"{options.name}.jsonl").unlink()
    return report


def _write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    beside = file.with_name(file.name + ".tmp")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # A reason may name a field with a lone surrogate. UTF-8 cannot encode it, so write its JSON escape.
    beside.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(beside, file)


def _show(report: dict[str, Any], as_json: bool) -> dict[str, Any]:
    if as_json:
        sys.stdout.write(json.dumps(report) + "\n")
        return report
    names = ("answered", "empty", "cut_at_limit", "thinking_removed", "unusable_questions", "answer_tokens")
    print_table(("answers", report["model"]), [(name.replace("_", " "), f"{report[name]:,}") for name in names])
    return report
