"""Invariants: every task of both English benchmarks has an instruction in every file that ships; the published lists
are whole; a file that is wrong is refused."""

import mteb
import pytest
import yaml

from anchor.errors import ConfigError
from eval.scoring.prompts import load_prompts, shipped_names


def tasks_of(benchmark: str) -> set[str]:
    names: set[str] = set()
    for task in mteb.get_benchmark(benchmark).tasks:
        parts = getattr(task.metadata, "tasks", None) or [task]
        names |= {part.metadata.name for part in parts}
    return names


@pytest.mark.parametrize(("benchmark", "number"), [("MTEB(eng, v1)", 67), ("MTEB(eng, v2)", 41)])
@pytest.mark.parametrize("name", ["anchor", "llm2vec_gen"])
def test_every_task_of_both_benchmarks_has_an_instruction(benchmark, number, name):
    tasks = tasks_of(benchmark)
    assert len(tasks) == number
    assert tasks - set(load_prompts(name).tasks) == set()


def test_the_published_lists_are_whole_and_documents_are_as_published():
    assert shipped_names() == ["anchor", "llm2vec_gen"]
    anchor, generative = load_prompts("anchor"), load_prompts("llm2vec_gen")
    assert set(anchor.tasks) >= tasks_of("MTEB(eng, v1)")
    assert anchor.document is None
    assert anchor.instruction_format is None
    assert anchor.query is None
    assert generative.query == "Generate a passage that best answers this question"
    assert generative.document == "Summarize the following passage"
    assert all(
        text.strip() == text and not text.endswith(":") for one in (anchor, generative) for text in one.tasks.values()
    )


def test_bright_has_the_papers_instruction_for_each_domain():
    tasks = load_prompts("llm2vec_gen").tasks
    names = {one.metadata.name for name in ("BRIGHT(v1.1)", "BRIGHT (long)") for one in mteb.get_benchmark(name).tasks}
    names -= {"BrightLongRetrieval"}  # mteb's own, which the tasks of one domain supersede
    assert len(names) >= 20
    assert names - set(tasks) == set()
    assert tasks["BrightEarthScienceRetrieval"] == (
        "Given a earth science post, generate relevant passages that help answer the post"
    )
    assert tasks["BrightPonyLongRetrieval"] == (
        "Given a pony question, generate relevant documents that help answer the question"
    )
    assert tasks["BrightTheoremQATheoremsRetrieval"] == (
        "Given a Math problem, only find the relevant theorems that help answer the problem, I don't want the answer "
        "to the problem"
    )
    longer = {name: text.replace("passages", "documents") for name, text in tasks.items() if name.startswith("Bright")}
    for name in (one for one in longer if "Long" in one):
        assert tasks[name] == longer[name.replace("Long", "")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"tasks": {"do it": ["A"], "do that": ["A"]}}, "the task A is given twice"),
        ({"tasks": {"do it": ["A"]}, "same_as": {"B": "a"}}, "same_as.B: no task 'a'; known are A"),
        (
            {"task": {}},
            "expected the keys document, instruction_format, ours, query, same_as, tasks; 'tasks' is required",
        ),
        ({"tasks": {"do it": None}}, "tasks.do it: got None; expected a list of names of tasks"),
        ({"tasks": {"do it": "A"}}, "tasks.do it: got 'A'; expected a list of names of tasks"),
        ({"tasks": {}, "ours": {"do it": [1]}}, "ours.do it: got [1]; expected a list of names of tasks"),
        ({"tasks": {}, "same_as": {"B": None}}, "same_as.B: got None; expected the name of a task"),
        ({"tasks": {}, "ours": ["A"]}, "ours: got ['A']; expected a mapping"),
        ({"tasks": {}, "query": 5}, "query: got 5; expected a text or null"),
        ({"tasks": {}, "instruction_format": "abc"}, "instruction_format is 'abc'; it must end in '{text}'"),
        (b"tasks:\n  do it: [A]\n  do it: [B]\n", "key 'do it' is given twice, in lines 2 and 3; keep one"),
        ("tasks: {d\u00e9j\u00e0: [A]}".encode("cp1252"), "not UTF-8: byte 10 is 0xe9; save it as UTF-8"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, content, message):
    path = tmp_path / "own.yaml"
    path.write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(content).encode())
    with pytest.raises(ConfigError) as error:
        load_prompts(str(path))
    assert str(error.value) == f"{path}: {message}"


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(ConfigError) as error:
        load_prompts("anchors")
    assert str(error.value) == "--prompts: no file 'anchors'; did you mean 'anchor'?"
