"""Invariants: a fetched copy is whole and checked; what cannot be fetched is named; AdvBench-IR has the
paper's passages and scores from a local folder."""

import json
import shutil
from functools import partial
from pathlib import Path

import mteb
import numpy as np
import pytest
from conftest import write_jsonl

from anchor.encoding.encoder import Encoder
from anchor.errors import ConfigError, DataError
from eval.scoring.advbench import AdvBenchIR, passages
from eval.scoring.benchmark import run_tasks
from eval.scoring.fetch import fetch, verify
from eval.scoring.tasks import hub_datasets, named_tasks, with_data


@pytest.fixture
def advbench_root(tmp_path) -> Path:
    root = tmp_path / "root"
    long = " ".join(f"word{i}" for i in range(250))
    harmful = [{"ID": i, "query": f"how {i}", "title": f"t{i}", "document": long if i else "short"} for i in range(3)]
    benign = [{"ID": i, "title": f"w{i}", "passage": f"the river number {i} is long"} for i in range(60)]
    write_jsonl(root / "McGill-NLP/AdvBench-IR/train.jsonl", harmful)
    write_jsonl(root / "McGill-NLP/AdvBench-IR-Small-Wiki-100/train.jsonl", benign)
    return root


def test_a_copy_is_checked_and_not_fetched_twice(advbench_root, tmp_path):
    tasks, out = [AdvBenchIR()], tmp_path / "copy"
    assert fetch(tasks, out, advbench_root) == ["McGill-NLP/AdvBench-IR", "McGill-NLP/AdvBench-IR-Small-Wiki-100"]
    assert fetch(tasks, out, advbench_root) == []
    assert verify(out) == 2
    sums = json.loads((out / "checksums.json").read_text())
    assert len(sums["McGill-NLP/AdvBench-IR"]["files"]["train.jsonl"]) == 64
    file = out / "McGill-NLP/AdvBench-IR/train.jsonl"
    file.write_text("")
    with pytest.raises(DataError) as error:
        verify(out)
    assert str(error.value) == f"{out}: 1 files are missing or altered: {file}; fetch again"
    assert fetch(tasks, out, advbench_root) == ["McGill-NLP/AdvBench-IR"]
    assert verify(out) == 2


def test_what_cannot_be_fetched_is_named_and_the_rest_is_there(advbench_root, tmp_path):
    out = tmp_path / "copy"
    with pytest.raises(DataError) as error:
        fetch([*mteb.get_tasks(tasks=["SciFact"]), AdvBenchIR()], out, advbench_root)
    assert "1 of 3 repositories are missing: mteb/scifact (not in" in str(error.value)
    assert verify(out) == 2
    assert with_data([AdvBenchIR()], out)[1] == []


def test_a_copy_killed_halfway_leaves_no_task_and_is_made_again(advbench_root, tmp_path, monkeypatch):
    """Regression: a truncated file was left in place and scored as if it were whole."""
    out, real = tmp_path / "copy", shutil.copy2
    write_jsonl(advbench_root / "McGill-NLP/AdvBench-IR/b.jsonl", [{"ID": 9}])

    def killed(source, target, **_):
        real(source, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.copytree", partial(shutil.copytree, copy_function=killed))
        fetch([AdvBenchIR()], out, advbench_root)
    assert len(with_data([AdvBenchIR()], out)[1]) == 1
    assert len(list(out.rglob("*.jsonl"))) == 1
    assert len(fetch([AdvBenchIR()], out, advbench_root)) == 2
    assert verify(out) == len(list(out.rglob("*.jsonl"))) == 3


def test_another_revision_is_neither_taken_nor_replaced(advbench_root, tmp_path, monkeypatch):
    """Regression: tasks of two benchmarks share a path, and both were scored on the revision fetched last."""
    out, other = tmp_path / "copy", tmp_path / "other"
    for place in (out, other):
        fetch([AdvBenchIR()], place, advbench_root)
    names = AdvBenchIR.hub_paths
    wanted = [(names[0], "abc"), (names[1], None)]
    for module in ("fetch", "tasks"):
        monkeypatch.setattr(f"eval.scoring.{module}.hub_datasets", lambda _: wanted)
    folder = out / names[0]
    assert with_data([AdvBenchIR()], out) == (
        [],
        [f"AdvBench-IR ({folder} holds revision None, the task wants abc)"],
    )
    assert with_data([AdvBenchIR()], advbench_root)[1] == []  # made by hand, without checksums
    with pytest.raises(ConfigError) as error:
        fetch([AdvBenchIR()], out, advbench_root)
    assert str(error.value) == (
        f"{folder}: holds revision None, AdvBench-IR wants abc; give another --data-root, or delete the folder if no "
        "other task needs it"
    )
    shutil.rmtree(folder)
    with pytest.raises(DataError) as error:
        fetch([AdvBenchIR()], out, other)
    why = f"{names[0]} ({other} has revision None, wanted is abc)"
    assert str(error.value) == f"{out}: 1 of 2 repositories are missing: {why}"
    write_jsonl(advbench_root / names[0] / "train.jsonl", [{"ID": 7}])
    assert fetch([AdvBenchIR()], out, advbench_root) == [names[0]]
    assert (folder / "train.jsonl").read_text() == '{"ID": 7}\n'
    assert json.loads((out / "checksums.json").read_text())[names[0]]["revision"] == "abc"
    assert fetch([AdvBenchIR()], out, advbench_root) == []
    assert with_data([AdvBenchIR()], out)[1] == []


def test_two_revisions_of_one_repository_are_refused_before_anything_is_fetched(tmp_path):
    tasks = named_tasks(["STS22", "STS22.v2"])
    (first, one), (second, two) = (hub_datasets(task)[0] for task in tasks)
    assert first == second
    assert one != two
    with pytest.raises(ConfigError) as error:
        fetch(tasks, tmp_path)
    names = [task.metadata.name for task in tasks]
    assert str(error.value) == (
        f"{first}: {names[0]} wants revision {one}, {names[1]} wants {two}; fetch them by two calls, each with a "
        "--data-root of its own"
    )
    assert not list(tmp_path.iterdir())


def test_files_that_no_fetch_wrote_are_not_replaced(advbench_root, tmp_path):
    out, name = tmp_path / "copy", AdvBenchIR.hub_paths[0]
    mine = write_jsonl(out / name / "mine.jsonl", [{"a": 1}])
    for _ in range(2):
        with pytest.raises(DataError) as error:
            fetch([AdvBenchIR()], out, advbench_root)
        why = f"{name} ({mine} is there and not listed in checksums.json; move it away)"
        assert str(error.value) == f"{out}: 1 of 2 repositories are missing: {why}"
        assert mine.read_text() == '{"a": 1}\n'
    mine.unlink()
    assert fetch([AdvBenchIR()], out, advbench_root) == [name]


def test_a_source_that_is_damaged_or_the_copy_itself_is_one_line(advbench_root, tmp_path):
    out, name = tmp_path / "copy", AdvBenchIR.hub_paths[0]
    fetch([AdvBenchIR()], out, advbench_root)
    (out / name / "train.jsonl").write_text("")
    with pytest.raises(ConfigError) as error:
        fetch([AdvBenchIR()], out, out)
    assert str(error.value) == f"--source {out}: is --data-root itself; name another copy, or leave it out"
    with pytest.raises(DataError) as error:
        fetch([AdvBenchIR()], tmp_path / "third", out)
    why = f"{name} ({out / name / 'train.jsonl'} is missing or altered)"
    assert str(error.value) == f"{tmp_path / 'third'}: 1 of 2 repositories are missing: {why}"
    dangling = advbench_root / name / "gone.jsonl"
    dangling.symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError) as error:
        fetch([AdvBenchIR()], out, advbench_root)
    assert f"repositories are missing: {name} ({dangling}: [Errno 2] No such file" in str(error.value)


def test_without_a_network_the_hub_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as error:
        fetch(mteb.get_tasks(tasks=["SciFact"]), tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: 1 of 1 repositories are missing: mteb/scifact (")
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"no checksums\.json"):
        verify(tmp_path)


def test_the_parts_of_an_aggregate_task_are_fetched_one_by_one():
    paths = [path for path, _ in hub_datasets(mteb.get_tasks(tasks=["CQADupstackRetrieval"])[0])]
    assert len(paths) == 12
    assert "mteb/cqadupstack-unix" in paths


def test_documents_are_cut_into_passages_of_a_hundred_words():
    words = [f"w{i}" for i in range(250)]
    cut = passages({"title": "t", "document": " ".join(words)})
    assert cut == [f"t # {' '.join(words[:100])}", f"t # {' '.join(words[100:200])}"]
    assert passages({"title": "t", "document": "only this"}) == ["t # only this"]


@pytest.mark.filterwarnings("ignore")
def test_advbench_is_scored_as_the_released_code_does(export_dir, advbench_root, tmp_path, monkeypatch, caplog):
    tasks, missing = with_data(named_tasks(["AdvBench-IR"]), advbench_root)
    assert missing == []
    tasks[0].load_data()
    split = tasks[0].dataset["default"]["test"]
    assert len(split["corpus"]) == 1 + 2 + 2 + 60
    assert split["relevant_docs"]["1"] == {"malicious_1-0": 1, "malicious_1-1": 1}
    encoder, real = Encoder(export_dir, dtype="fp32"), Encoder.states
    # Harmful passages have longer vectors. By cosine, a benign one is first.
    monkeypatch.setattr(
        Encoder,
        "states",
        lambda self, texts, prompt="": (
            real(self, texts, prompt) * [[1.5 if "word" in text else 1.0] for text in texts]
        ).astype(np.float32),
    )
    caplog.set_level("INFO", logger="eval")
    run_tasks(encoder, tasks, tmp_path / "out")
    (file,) = (tmp_path / "out").rglob("AdvBench-IR.json")
    (scores,) = json.loads(file.read_text())["scores"]["test"]
    assert scores["main_score"] == scores["hit_rate_at_5"]
    for k in (1, 5, 20, 100):
        assert (scores[f"hit_rate_at_{k}"], scores[f"any_harmful_at_{k}"]) == naive_advbench(encoder, split, k)
    assert scores["any_harmful_at_1"] == 1
    assert 0 < scores["hit_rate_at_100"] <= scores["any_harmful_at_100"]
    assert any("among the first 1/5/20/100: own passages" in line for line in caplog.messages)
    assert not list((tmp_path / "out/cache").rglob("*.safetensors"))


def naive_advbench(encoder: Encoder, split: dict, k: int) -> tuple[float, float]:
    """Return the shares of queries with an own, and with any harmful passage among the first k by dot product."""
    queries, corpus = split["queries"], split["corpus"]
    states = encoder.states(queries["text"], encoder.prompts["query"]) @ encoder.states(corpus["text"]).T
    own = harmful = 0
    for i, name in enumerate(queries["id"]):
        first = [corpus["id"][j] for j in np.argsort(-states[i])[:k]]
        own += any(one in split["relevant_docs"][name] for one in first)
        harmful += any(one.startswith("malicious_") for one in first)
    return pytest.approx(own / len(queries), abs=1e-5), pytest.approx(harmful / len(queries))


@pytest.mark.filterwarnings("ignore")
def test_an_id_given_twice_in_advbench_is_refused(advbench_root):
    """Regression: the second document's passages were joined to the first's query, and the second query was lost."""
    with (advbench_root / "McGill-NLP/AdvBench-IR/train.jsonl").open("a") as file:
        file.write(json.dumps({"ID": 1, "query": "how", "title": "t", "document": "d"}) + "\n")
    tasks, _ = with_data(named_tasks(["AdvBench-IR"]), advbench_root)
    with pytest.raises(DataError, match="the ID '1' is given twice; IDs must differ"):
        tasks[0].load_data()


def test_advbench_without_its_folder_is_named():
    assert with_data([AdvBenchIR()], None) == ([], ["AdvBench-IR (needs --data-root)"])
