"""Invariants: a real mteb task gives the same score through our encoder on one rank and on two and through mteb's own
wrapper of sentence-transformers; a killed evaluation embeds nothing twice; while one task is scored the next is
embedded; a result of other prompts or other data is not reused; missing data and unknown tasks are named."""

import json
import threading
from collections import Counter
from pathlib import Path

import mteb
import numpy as np
import pytest
from conftest import english_pairs, write_jsonl
from datasets.exceptions import DatasetNotFoundError
from distributed import run_distributed
from mteb.results import TaskResult
from retrieval import write_retrieval

from anchor.encoding.encoder import Encoder
from anchor.encoding.ranks import RankedEncoder
from anchor.errors import ConfigError, DataError
from eval.__main__ import main
from eval.embedding.embed import Options, embed
from eval.embedding.texts import Source
from eval.embedding.vectors import read_folder
from eval.reporting.table import main_scores
from eval.scoring.benchmark import MtebEncoder, run_tasks
from eval.scoring.cache import VectorCache
from eval.scoring.prompts import load_prompts
from eval.scoring.tasks import (
    find_benchmark,
    hub_datasets,
    local_retrieval_task,
    named_tasks,
    parts_of,
    with_data,
)

MTEB_DATA = Path(__file__).parents[3] / "shared/data/mteb"


FIVE = ("SciFact", "STSBenchmark", "STS16", "BIOSSES", "Banking77Classification")
needs_data = pytest.mark.skipif(
    not MTEB_DATA.is_dir(), reason="needs the offline copy of mteb tasks in ../shared/data/mteb"
)


def through_sentence_transformers(folder: Path, prompts: dict[str, str], task, metric: str = "main_score") -> float:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", prompts=prompts)
    result = mteb.evaluate(model, [task], cache=None, show_progress_bar=False)
    return float(result.task_results[0].scores["test"][0][metric])


@pytest.mark.filterwarnings("ignore")  # other libraries' loading of data sets
def test_scores_equal_those_of_sentence_transformers(export_dir, retrieval_folder, tmp_path):
    scores = run_tasks(Encoder(export_dir, dtype="fp32"), [local_retrieval_task(retrieval_folder)], tmp_path / "out")
    theirs = through_sentence_transformers(
        export_dir, {"query": "Answer it: ", "document": ""}, local_retrieval_task(retrieval_folder)
    )
    assert 0 < scores["Local-small"] < 1
    assert scores["Local-small"] == pytest.approx(theirs, abs=1e-3)
    assert main_scores(tmp_path / "out") == scores


@needs_data
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["BIOSSES", *(pytest.param(name, marks=pytest.mark.slow) for name in FIVE if name != "BIOSSES")]
)
def test_real_tasks_score_alike_through_both_with_the_papers_prompts(export_dir, tmp_path, name):
    encoder, prompts = Encoder(export_dir, dtype="fp32"), load_prompts("anchor")
    scores = run_tasks(encoder, with_data(named_tasks([name]), MTEB_DATA)[0], tmp_path, prompts)
    used = json.loads((tmp_path / "scores.json").read_text())["prompts_used"][name]
    expected = (
        {"query": f"{prompts.tasks[name]}: ", "document": ""}
        if name == "SciFact"
        else {"text": f"{prompts.tasks[name]}: "}
    )
    assert used == expected
    named = {name: used["text"]} if "text" in used else used
    # A random model finds nothing among the first ten of 5,183 documents, but something among the first thousand.
    metric = "recall_at_1000" if name == "SciFact" else "main_score"
    (file,) = tmp_path.rglob(f"{name}.json")
    ours = json.loads(file.read_text())["scores"]["test"][0]
    assert scores[name] == pytest.approx(ours["main_score"], abs=1e-5)
    theirs = through_sentence_transformers(export_dir, named, with_data(named_tasks([name]), MTEB_DATA)[0][0], metric)
    assert ours[metric] != 0
    assert ours[metric] == pytest.approx(theirs, abs=1e-3)


def work_on_two_ranks(ranks, model: str, retrieval: str, source: Path, output: Path) -> dict[str, float] | None:
    local = Encoder(Path(model), dtype="fp32")
    embed(local, Source(source), output / "vectors", Options(shard_texts=8))
    encoder = RankedEncoder(local)
    if encoder.rank > 0:
        return encoder.serve()
    try:
        return run_tasks(encoder, [local_retrieval_task(Path(retrieval))], output / "scores")
    finally:
        encoder.stop()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_ranks_give_the_vectors_and_scores_of_one(export_dir, retrieval_folder, tmp_path):
    rows = [{"id": f"n{i}", "text": row["positive"]} for i, row in enumerate(english_pairs(50))]
    source, one = write_jsonl(tmp_path / "texts.jsonl", rows), Encoder(export_dir, dtype="fp32", pack_tokens=200)
    arguments = (str(export_dir), str(retrieval_folder), source, tmp_path)
    scores, nothing = run_distributed(work_on_two_ranks, 2, *arguments)
    stored = read_folder(tmp_path / "vectors")
    assert stored.ids == [row["id"] for row in rows]
    assert stored.manifest["ranks"] == 2
    np.testing.assert_allclose(stored.embeddings, one.encode([row["text"] for row in rows]), atol=1e-5)
    alone = run_tasks(one, [local_retrieval_task(retrieval_folder)], tmp_path / "alone")
    assert nothing is None
    assert 0 < alone["Local-small"] < 1
    assert scores == pytest.approx(alone, abs=1e-3)


def score_real_tasks(ranks, model: str, output: Path) -> None:
    encoder = RankedEncoder(Encoder(Path(model), dtype="fp32"))
    if encoder.rank > 0:
        return encoder.serve()
    try:
        run_tasks(encoder, with_data(named_tasks(FIVE), MTEB_DATA)[0], output, load_prompts("anchor"))
    finally:
        encoder.stop()


@needs_data
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_ranks_score_the_real_tasks_like_one(export_dir, tmp_path):
    results = []
    for world_size in (1, 2):
        run_distributed(score_real_tasks, world_size, str(export_dir), tmp_path / str(world_size))
        files = [next((tmp_path / str(world_size)).rglob(f"{name}.json")) for name in FIVE]
        results.append([json.loads(file.read_text())["scores"]["test"][0] for file in files])
    for one, two in zip(*results, strict=True):
        # A random model scores zero in SciFact's own measure.
        metric = "recall_at_1000" if "recall_at_1000" in one else "main_score"
        assert 0 < abs(one[metric]) < 1
        assert two[metric] == pytest.approx(one[metric], abs=1e-3)
        assert two["main_score"] == pytest.approx(one["main_score"], abs=1e-3)


def test_the_papers_subset_has_fifteen_tasks():
    subset = find_benchmark("anchor15")
    kinds = Counter(task.metadata.type for task in subset.tasks)
    assert kinds == {
        "Retrieval": 3, "Reranking": 2, "Clustering": 3, "PairClassification": 1, "Classification": 3, "STS": 3
    }  # fmt: skip
    assert {task.metadata.name: task.hf_subsets for task in subset.tasks}["STS17"] == ["en-en"]
    assert {task.metadata.name for task in subset.tasks} <= set(load_prompts("anchor").tasks)
    with pytest.raises(ConfigError, match="did you mean 'anchor15'"):
        find_benchmark("anchor-15")


@pytest.mark.filterwarnings("ignore")
def test_another_length_is_another_result(export_dir, tmp_path):
    folder = write_retrieval(tmp_path / "small", pairs=12)
    command = ["mteb", str(export_dir), "--retrieval", str(folder), "--output", str(tmp_path / "out")]
    main(command)
    first = json.loads((tmp_path / "out/scores.json").read_text())
    main([*command, "--max-tokens", "8"])
    second = json.loads((tmp_path / "out/scores.json").read_text())
    assert first["revision"] != second["revision"]
    assert first["scores"] != second["scores"]
    main([*command, "--max-tokens", "48"])
    assert json.loads((tmp_path / "out/scores.json").read_text())["revision"] == first["revision"]


def test_bright_below_the_papers_length_is_warned_of(export_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("eval.scoring.benchmark.run_tasks", lambda *_, **__: {})
    monkeypatch.setattr("eval.__main__._show", lambda *_, **__: None)
    command = ["mteb", str(export_dir), "--tasks", "BrightPonyRetrieval", "--output", str(tmp_path / "out")]
    for more, warned in ([], False), (["--prompts", "llm2vec_gen"], True):
        main([*command, *more])
        said = "BRIGHT: texts are cut to 48 tokens, the paper's scores are of 4096; add --max-tokens 4096"
        assert (said in capsys.readouterr().err) == warned


class Killed(BaseException):
    """Exception that stands in for a signal."""


@pytest.mark.filterwarnings("ignore")
def test_a_killed_evaluation_embeds_nothing_twice(export_dir, retrieval_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.scoring.cache.BLOCK_TEXTS", 8)
    asked: list[str] = []
    real = Encoder.states

    def counted(self, texts, prompt=""):
        if len(asked) >= limit:
            raise Killed
        asked.extend(prompt + text for text in texts)
        return real(self, texts, prompt)

    monkeypatch.setattr(Encoder, "states", counted)
    encoder, tasks, limit = Encoder(export_dir, dtype="fp32"), [local_retrieval_task(retrieval_folder)], 16
    with pytest.raises(Killed):
        run_tasks(encoder, tasks, tmp_path / "out")
    assert len(asked) == 18  # ten queries in two blocks, one block of documents
    assert list((tmp_path / "out/cache").rglob("block-*.safetensors"))
    limit = 1000
    scores = run_tasks(encoder, [local_retrieval_task(retrieval_folder)], tmp_path / "out")
    assert len(asked) == len(set(asked)) == 40  # 30 documents and 10 queries
    assert not list((tmp_path / "out/cache").rglob("block-*.safetensors"))
    # A finished task is not embedded again, unless the prompts are others.
    assert run_tasks(encoder, [local_retrieval_task(retrieval_folder)], tmp_path / "out") == scores
    assert len(asked) == 40
    run_tasks(encoder, [local_retrieval_task(retrieval_folder)], tmp_path / "out", load_prompts("llm2vec_gen"))
    assert len(asked) > 40


@pytest.mark.filterwarnings("ignore")
def test_vectors_that_a_kill_left_behind_a_saved_result_are_deleted(
    export_dir, retrieval_folder, tmp_path, monkeypatch
):
    def killed(*_):
        raise Killed

    encoder, out = Encoder(export_dir, dtype="fp32"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(MtebEncoder, "forget", killed)
        with pytest.raises(Killed):
            run_tasks(encoder, [local_retrieval_task(retrieval_folder)], out)
    assert list(out.rglob("Local-small.json"))
    assert list(out.rglob("block-*.safetensors"))
    run_tasks(encoder, [local_retrieval_task(retrieval_folder)], out)
    assert not list((out / "cache").rglob("block-*.safetensors"))


@pytest.mark.filterwarnings("ignore")
def test_a_task_whose_local_data_changed_is_scored_again(export_dir, tmp_path):
    """Regression: mteb compares only the name, so another folder or new judgements got the old score."""
    encoder, out = Encoder(export_dir, dtype="fp32"), tmp_path / "out"
    folders = [write_retrieval(tmp_path / place / "small", seed, pairs=12) for seed, place in enumerate("ab")]
    other = write_retrieval(tmp_path / "other", seed=3, pairs=12)

    def score(folder: Path) -> float:
        return run_tasks(encoder, [local_retrieval_task(folder)], out)[f"Local-{folder.name}"]

    kept, first, second = score(other), score(folders[0]), score(folders[1])
    assert second == run_tasks(encoder, [local_retrieval_task(folders[1])], tmp_path / "alone")["Local-small"] != first
    wrong = [{"query-id": f"q{i}", "corpus-id": f"d{11 - i}", "score": 1} for i in range(10)]
    write_jsonl(folders[1] / "qrels/test.jsonl", wrong)
    encoder.embedder.causal_lm.get_input_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(DataError, match="not finite"):
        score(folders[1])
    assert main_scores(out) == {"Local-other": kept}  # an old score does not outlive its data
    assert score(other) == kept


def result_of(task, scores: dict[str, float]) -> TaskResult:
    named = {s: {"main_score": v, "hf_subset": s, "languages": ["eng-Latn"]} for s, v in scores.items()}
    return TaskResult.from_task_results(task, dict.fromkeys(task.eval_splits, named), evaluation_time=1.0)


@pytest.mark.parametrize("name", ["STS17", "CQADupstackRetrieval"])
def test_a_score_is_that_of_the_subsets_asked_for(export_dir, tmp_path, name):
    """Regression: `lite` wants one of STS17's 11 subsets, but got the mean over all subsets of an earlier run."""
    encoder, whole = Encoder(export_dir, dtype="fp32"), mteb.get_task(name)
    task = next(t for t in find_benchmark("MTEB(eng, v1)").tasks if t.metadata.name == name)
    wanted = "en-en" if name == "STS17" else "default"
    subsets = whole.hf_subsets if name == "STS17" else [wanted]
    results, model = mteb.ResultCache(tmp_path), MtebEncoder(encoder).mteb_model_meta
    for one in parts_of(task):
        results.save_to_cache(result_of(one, {"default": 0.5}), model)
    results.save_to_cache(result_of(whole, {s: 0.9 if s == wanted else 0.1 for s in subsets}), model)
    assert run_tasks(encoder, [task], tmp_path) == {name: pytest.approx(0.9)}
    assert len(subsets) == (11 if name == "STS17" else 1)


@pytest.mark.filterwarnings("ignore")
def test_every_part_of_a_task_of_tasks_counts_as_its_data(tmp_path):
    def revision() -> str:
        (task,) = with_data(mteb.get_tasks(tasks=["CQADupstackRetrieval"]), tmp_path)[0]
        return task.metadata.revision

    for path, _ in hub_datasets(mteb.get_task("CQADupstackRetrieval")):
        write_jsonl(tmp_path / path / "corpus.jsonl", [{}])
    before = revision()
    assert revision() == before
    write_jsonl(tmp_path / path / "corpus.jsonl", [{}, {}])
    assert revision() != before


@pytest.mark.filterwarnings("ignore")
def test_while_one_task_is_scored_the_next_is_embedded(export_dir, retrieval_folder, tmp_path, monkeypatch):
    other = write_retrieval(tmp_path / "other", seed=1)
    theirs = json.loads((other / "corpus.jsonl").read_text().splitlines()[0])["text"]
    embedded = threading.Event()

    class Watched(Encoder):
        def states(self, texts, prompt=""):
            out = super().states(texts, prompt)
            if theirs in texts:
                embedded.set()
            return out

    def tasks():
        return [local_retrieval_task(folder) for folder in (retrieval_folder, other)]

    encoder, both = Watched(export_dir, dtype="fp32"), tasks()
    alone = run_tasks(encoder, tasks(), tmp_path / "alone", at_once=1)
    embedded.clear()
    # The first task's scores come only when the second's documents are embedded.
    monkeypatch.setattr(both[0], "task_specific_scores", lambda *_, **__: {} if embedded.wait(60) else pytest.fail())
    assert run_tasks(encoder, both, tmp_path / "both") == alone
    assert len(alone) == len(set(alone.values())) == 2
    assert main_scores(tmp_path / "both") == alone
    assert not list((tmp_path / "both/cache").rglob("block-*.safetensors"))


@pytest.mark.filterwarnings("ignore")
def test_an_error_in_one_task_ends_the_evaluation(export_dir, retrieval_folder, tmp_path):
    encoder, task = Encoder(export_dir, dtype="fp32"), local_retrieval_task(retrieval_folder)
    encoder.embedder.causal_lm.get_input_embeddings().weight.data.fill_(float("nan"))
    others = [local_retrieval_task(write_retrieval(tmp_path / f"other{i}", seed=i)) for i in range(3)]
    with pytest.raises(DataError, match="vectors are not finite"):
        run_tasks(encoder, [task, *others], tmp_path / "out")
    assert not (tmp_path / "out/scores.json").exists()


@pytest.mark.filterwarnings("ignore")
def test_data_that_only_the_hub_has_is_one_line_without_a_network(export_dir, tmp_path, monkeypatch, capsys, one_rank):
    for library in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{library}.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(SystemExit) as exit_:
        main(["mteb", str(export_dir), "--tasks", "BIOSSES", "--output", str(tmp_path / "out")])
    assert exit_.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: BIOSSES: its data cannot be loaded: ")
    assert line.endswith("; without a network give --data-root (python -m eval fetch makes it)")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        (".gitattributes", "no data", "The directory at "),
        ("train.jsonl", '{"sentence1": "a", "sentence2": "b", "score": 1.0}\n', "no split 'test'"),
        ("test.jsonl", '{"sentence1": "a", "sente', "JSON parse error"),
    ],
)
def test_local_data_that_a_task_cannot_read_is_one_line(export_dir, tmp_path, monkeypatch, name, text, why):
    """Regression: an empty folder or a missing split gave a traceback; a cut file, the advice to use --data-root."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "root/mteb/biosses-sts"
    folder.mkdir(parents=True)
    (folder / name).write_text(text)
    tasks = with_data(named_tasks(["BIOSSES"]), tmp_path / "root")[0]
    with pytest.raises(DataError) as error:
        run_tasks(Encoder(export_dir, dtype="fp32"), tasks, tmp_path / "out")
    assert str(error.value).startswith(f"{folder}: BIOSSES cannot read its data: {why}")
    assert str(error.value).endswith("; fetch it again")
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore")
def test_an_error_that_is_not_of_the_data_keeps_its_traceback(export_dir, retrieval_folder, tmp_path, monkeypatch):
    def wrong(*_, **__):
        raise KeyError("not a split")

    encoder = Encoder(export_dir, dtype="fp32")
    monkeypatch.setattr(encoder, "encode", wrong)
    with pytest.raises(KeyError, match="not a split"):
        run_tasks(encoder, [local_retrieval_task(retrieval_folder)], tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_private_data_is_one_line(export_dir, tmp_path, monkeypatch):
    every = mteb.get_tasks(exclude_superseded=False, exclude_private=False)
    task = next(t for t in every if not t.metadata.is_public and set(t.metadata.modalities) == {"text"})

    def refused(**_):
        raise DatasetNotFoundError("Dataset 'x' cannot be accessed.\nLog in.")

    monkeypatch.setattr(task, "load_data", refused)
    with pytest.raises(DataError) as error:
        run_tasks(Encoder(export_dir, dtype="fp32"), [task], tmp_path)
    assert str(error.value) == (
        f"{task.metadata.name}: its data cannot be loaded: Dataset 'x' cannot be accessed.; leave the task out"
    )


@pytest.mark.parametrize("root", [None, Path("anywhere")])
def test_tasks_of_images_are_refused_before_a_model_is_loaded(root):
    with pytest.raises(ConfigError) as error:
        with_data(named_tasks(["BIOSSES", "VisualSTS17Eng"]), root)
    assert str(error.value) == (
        "1 of 2 tasks are not of text alone, first VisualSTS17Eng (image); a text embedder has no score there, leave "
        "them out"
    )


@pytest.mark.filterwarnings("ignore")
def test_half_written_results_of_a_killed_run_are_named(export_dir, retrieval_folder, tmp_path):
    encoder = Encoder(export_dir, dtype="fp32")
    scores = run_tasks(encoder, [local_retrieval_task(retrieval_folder)], tmp_path)
    for name in ("Local-small.json", "scores.json"):
        (file,) = tmp_path.rglob(name)
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError) as error:
            run_tasks(encoder, [local_retrieval_task(retrieval_folder)], tmp_path)
        assert str(error.value).startswith(f"{file}: ")
        assert "delete it" in str(error.value)
        file.write_bytes(whole)
    assert run_tasks(encoder, [local_retrieval_task(retrieval_folder)], tmp_path) == scores


def test_an_unreadable_cache_is_named_and_kept(export_dir, tmp_path):
    encoder = Encoder(export_dir, dtype="fp32")
    VectorCache(tmp_path, "key").encode(encoder, ["one", "two", "one"], "")
    (block,) = tmp_path.glob("block-*")
    whole = block.read_bytes()
    block.write_bytes(whole[:100])
    with pytest.raises(DataError) as error:
        VectorCache(tmp_path, "key")
    assert str(error.value).startswith(f"{block}: half-written or damaged")
    block.write_bytes(whole)
    with pytest.raises(DataError, match="belongs to another model or setting"):
        VectorCache(tmp_path, "other")


def test_documents_get_what_the_prompt_file_says(export_dir):
    from mteb.types import PromptType

    encoder = Encoder(export_dir, dtype="fp32")
    (task,) = mteb.get_tasks(tasks=["SciFact"])
    (bright,) = mteb.get_tasks(tasks=["BrightBiologyRetrieval"])
    ours, generative = (MtebEncoder(encoder, load_prompts(name)) for name in ("anchor", "llm2vec_gen"))
    claim = "Given a scientific claim, retrieve documents that support or refute the claim: "
    assert ours.prompt(task.metadata, PromptType.query) == claim
    assert ours.prompt(task.metadata, PromptType.document) == ""
    assert generative.prompt(task.metadata, PromptType.document) == "Summarize the following passage: "
    assert ours.prompt(bright.metadata, PromptType.query).startswith(bright.metadata.prompt["query"][:20])
    of_domain = "Given a biology post, generate relevant passages that help answer the post: "
    assert generative.prompt(bright.metadata, PromptType.query) == of_domain
    (other,) = mteb.get_tasks(tasks=["BrightProBiologyRetrieval"])  # not in the file
    general = "Generate a passage that best answers this question: "
    assert generative.prompt(other.metadata, PromptType.query) == general
    assert MtebEncoder(encoder).prompt(task.metadata, PromptType.query) == "Answer it: "


def test_an_unknown_task_is_named_with_a_suggestion():
    with pytest.raises(ConfigError) as error:
        named_tasks(["SciFactt"])
    assert str(error.value) == "--tasks: mteb has no task 'SciFactt'; did you mean 'SciFact'?"


def test_tasks_without_data_are_all_listed(tmp_path):
    _, missing = with_data(named_tasks(["SciFact", "STSBenchmark", "CQADupstackRetrieval"]), tmp_path)
    for word in ("SciFact (", "STSBenchmark (", "CQADupstackRetrieval (", "cqadupstack-unix"):
        assert word in ", ".join(missing)
    assert with_data(mteb.get_tasks(tasks=["SciFact"]), None)[1] == []
