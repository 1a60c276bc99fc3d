"""Bad command lines, environments and inputs of commands that do not read a recipe or model first."""

from collections.abc import Callable
from pathlib import Path

from bad_inputs import Bad, Content, Ground
from retrieval import write_retrieval

_NINES = "9" * 5000


def _hosts(content: Content) -> Callable[[Ground], list[str]]:
    return lambda g: ["doctor", "--hostfile", g.file("hosts", content), "recipe.yaml"]


def _mined(*options: str, content: str | bytes = "") -> Callable[[Ground], list[str]]:
    return lambda g: [
        *("mine", g.file("e5/a.jsonl", content), "--output", g.path("mined")),
        *(options or ("--negatives", "1", "--ranks", "1-5")),
    ]


def _cleaned(*options: str, pairs: str | bytes = "", tasks: str | bytes = "a b c\n") -> Callable[[Ground], list[str]]:
    return lambda g: ["decontaminate", g.file("e5/a.jsonl", pairs), "--against", g.file("t.txt", tasks), *options]


def _answered(*options: str, questions: str | bytes = "") -> Callable[[Ground], list[str]]:
    return lambda g: [
        *("respond", str(g.model), "--questions", g.file("q.jsonl", questions), "--output", g.path("a")),
        *options,
    ]


def _decoded(*options: str) -> Callable[[Ground], list[str]]:
    return lambda g: ["decode", str(g.export), *options]


def _scored(file: str, content: str | bytes | None) -> Callable[[Ground], list[str]]:
    def make(g: Ground) -> list[str]:
        folder = write_retrieval(Path(g.path("task")))
        (folder / file).unlink()
        if content is not None:
            g.file(f"task/{file}", content)
        return ["mteb", str(g.export), "--retrieval", str(folder), "--output", g.path("out")]

    return make


def _prompted(content: str | bytes) -> Callable[[Ground], list[str]]:
    return lambda g: [
        *("mteb", str(g.export), "--retrieval", str(write_retrieval(Path(g.path("task"))))),
        *("--prompts", g.file("p.yaml", content)),
    ]


def _reported(file: str, content: str | bytes) -> Callable[[Ground], list[str]]:
    return lambda g: ["report", str(Path(g.file(f"run/{file}", content)).parent), "--output", g.path("r.html")]


def _looked(option: str, content: str | bytes) -> Callable[[Ground], list[str]]:
    return lambda g: [
        *("report", str(Path(g.file("run/metrics.jsonl", '{"step": 1}\n')).parent), "--output", g.path("r.html")),
        *("--model", str(g.export), option, g.file("looked.jsonl", content)),
    ]


def _line(*words: str) -> Callable[[Ground], list[str]]:
    return lambda _: list(words)


_RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
_VARIABLES = {
    "a rank that is a word": {"RANK": "first"},
    "a rank below nothing": {"RANK": "-1"},
    "a rank above all ranks": {"RANK": "7", "WORLD_SIZE": "2"},
    "a rank of 5,000 digits": {"RANK": _NINES},
    "a rank that is empty": {"RANK": ""},
    "no rank at all": {"WORLD_SIZE": "0"},
    "ranks that are a fraction": {"WORLD_SIZE": "1.5"},
    "ranks that are a word": {"WORLD_SIZE": "all"},
    "a local rank that is a word": {"LOCAL_RANK": "x"},
    "a local rank below nothing": {"LOCAL_RANK": "-1"},
    "a port that is a word among the variables": {"MASTER_PORT": "http"},
    "a port above all ports": {"MASTER_PORT": "99999999"},
    "a port of nothing": {"MASTER_PORT": "0"},
    "an address that is empty": {"MASTER_ADDR": ""},
}


def _with_variables() -> list[Bad]:
    commands: dict[str, Callable[[Ground], list[str]]] = {
        "training": lambda g: g.train()[:2],
        "the doctor": lambda _: ["doctor"],
    }
    return [
        Bad(f"{command} as {name}", make, next(iter(changed)), _RANK | changed)
        for command, make in commands.items()
        for name, changed in _VARIABLES.items()
    ]


COMMANDS = [
    *_with_variables(),
    Bad(
        "training as some of several SLURM tasks without an address",
        lambda g: g.train()[:2],
        "MASTER_ADDR",
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    ),
    Bad(
        "training as a SLURM task of a word",
        lambda g: g.train()[:2],
        "WORLD_SIZE",
        {"SLURM_NTASKS": "all", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "MASTER_ADDR": "127.0.0.1"},
    ),
    Bad("a hostfile that cannot be read", _hosts(Path("/proc/self/mem")), "error"),
    Bad("a hostfile that is not there", _line("doctor", "--hostfile", "no", "r.yaml"), "no such hostfile"),
    Bad("a hostfile that is a folder", _line("doctor", "--hostfile", "/", "r.yaml"), "no such hostfile"),
    Bad("a hostfile that is empty", _hosts(""), "names no host"),
    Bad("a hostfile of comments", _hosts("# node1 slots=8\n"), "names no host"),
    Bad("a hostfile that is binary", _hosts(bytes(range(256))), "hosts"),
    Bad("a hostfile in UTF-16", _hosts("node1 slots=8\n".encode("utf-16")), "hosts"),
    Bad("a hostfile without slots", _hosts("node1\n"), "expected `HOST slots=GPUS`"),
    Bad("a hostfile with no slots", _hosts("node1 slots=0\n"), "expected `HOST slots=GPUS`"),
    Bad("a hostfile with negative slots", _hosts("node1 slots=-1\n"), "expected `HOST slots=GPUS`"),
    Bad("a hostfile with slots of 5,000 digits", _hosts(f"node1 slots={_NINES}\n"), "hosts:1"),
    Bad("a hostfile with a host twice", _hosts("a slots=1\na slots=1\n"), "given twice"),
    Bad("a hostfile with an option for a host", _hosts("-oProxyCommand=true slots=1\n"), "hosts:1"),
    Bad("a hostfile and no recipe", lambda g: ["doctor", "--hostfile", g.file("hosts", "a slots=1\n")], "no recipe"),
    Bad("sizes that are words", _line("doctor", "--sizes", "big"), "--sizes"),
    Bad("sizes of 5,000 digits", _line("doctor", "--sizes", _NINES), "--sizes"),
    Bad("a port that is a word", _line("doctor", "--master-port", "x"), "--master-port"),
    Bad("no recipe", _line("train"), "recipe"),
    Bad("an unknown option", _line("train", "r.yaml", "--fast"), "--fast"),
    Bad("no ranks", lambda g: [*g.train(), "--ranks", "0"], "--ranks"),
    Bad("ranks of 5,000 digits", lambda g: [*g.train(), "--ranks", _NINES], "--ranks"),
    Bad("ranks that do not divide", lambda g: [*g.train(), "--ranks", "3"], "pack_multiple"),
    Bad("an unknown GPU", lambda g: [*g.train(), "--gpu", "z9000"], "z9000"),
    Bad("a share of the peak above one", lambda g: [*g.train(), "--mfu", "2"], "--mfu"),
    Bad("a share of the peak that is nan", lambda g: [*g.train(), "--mfu", "nan"], "--mfu"),
    Bad("a network of nan", lambda g: [*g.train(), "--network", "nan"], "--network"),
    Bad("a network of nothing", lambda g: [*g.train(), "--network", "0"], "--network"),
    Bad("a report into a folder", lambda g: [*g.train(), "--json", str(g.folder)], "--json"),
    Bad("a report below a file", lambda g: [*g.train(), "--json", g.file("f", "") + "/r.json"], "--json"),
    Bad("a dry run with a pack recipe that is none", lambda g: [*g.train(), "--pack", g.file("p.yaml", "")], "p.yaml"),
    Bad("no command", _line("data_prep"), "COMMAND"),
    Bad("an unknown command", _line("data_prep", "fry"), "fry"),
    Bad("a part of nothing", lambda g: [*g.pack(), "--part", "0/0"], "--part"),
    Bad("a part that is too high", lambda g: [*g.pack(), "--part", "4/4"], "--part"),
    Bad("a part of 5,000 digits", lambda g: [*g.pack(), "--part", f"0/{_NINES}"], "--part"),
    Bad("no workers", lambda g: [*g.pack(), "--workers", "0"], "--workers"),
    Bad("merging what was never packed", lambda g: ["merge", *g.pack()[1:]], "no part"),
    Bad("packing into a file", lambda g: g.pack(f"output_dir={g.file('f', '')}"), "f"),
    Bad("packing below a file", lambda g: g.pack(f"output_dir={g.file('f', '')}/s"), "a part of this path is a file"),
    Bad(
        "packing into a folder of something else", lambda g: g.pack(f"output_dir={Path(g.file('o/x', '')).parent}"), "o"
    ),
    Bad("packing into a name of 300 characters", lambda g: g.pack("output_dir=" + "x" * 300), "too long"),
    Bad("a picture without a suffix", lambda g: ["inspect", str(g.shards), "--png", "x"], "--png"),
    Bad("a picture of an unknown kind", lambda g: ["inspect", str(g.shards), "--png", g.path("x.doc")], "--png"),
    Bad("examples of 5,000 digits", lambda g: ["inspect", str(g.shards), "--show", _NINES], "--show"),
    Bad("documentation of no package", _line("docs", "--output", "d", "--packages", "no_such"), "no_such"),
    Bad("documentation of commas", _line("docs", "--output", "d", "--packages", ","), "--packages"),
    Bad(
        "documentation with negative pairs",
        _line("docs", "--output", "d", "--packages", "yaml", "--max-pairs", "-1"),
        "--max-pairs",
    ),
    Bad(
        "documentation with a negative seed",
        _line("docs", "--output", "d", "--packages", "yaml", "--seed", "-1"),
        "--seed",
    ),
    Bad(
        "documentation with no held-out pairs",
        _line("docs", "--output", "d", "--packages", "yaml", "--heldout-pairs", "-5"),
        "--heldout-pairs",
    ),
    Bad("an overlap of nan", _cleaned("--overlap", "nan"), "--overlap"),
    Bad("an overlap above one", _cleaned("--overlap", "1.5"), "--overlap"),
    Bad("n-grams of no word", _cleaned("--ngram-words", "0"), "--ngram-words"),
    Bad("n-grams of too many words", _cleaned("--ngram-words", "9" * 30), "--ngram-words"),
    Bad("texts of too few words", _cleaned("--min-words", "-1"), "--min-words"),
    Bad(
        "evaluation texts that are not there",
        lambda g: ["decontaminate", g.file("a.jsonl", ""), "--against", "no"],
        "no",
    ),
    Bad("evaluation texts that are empty", _cleaned(tasks=""), "t.txt"),
    Bad("evaluation texts that are binary", _cleaned(tasks=bytes(range(256))), "t.txt"),
    Bad("cleaning pairs that are not there", _line("decontaminate", "no", "--against", "no"), "no"),
    Bad("mining without negatives", _mined("--negatives", "0", "--ranks", "1-5"), "--negatives"),
    Bad("mining with ranks backwards", _mined("--negatives", "1", "--ranks", "5-1"), "--ranks"),
    Bad("mining with ranks from nothing", _mined("--negatives", "1", "--ranks", "0-3"), "--ranks"),
    Bad("mining with ranks of 5,000 digits", _mined("--negatives", "1", "--ranks", f"1-{_NINES}"), "--ranks"),
    Bad("mining with a margin of nan", _mined("--negatives", "1", "--ranks", "1-5", "--margin", "nan"), "--margin"),
    Bad("mining with a model that is none", lambda g: [*_mined()(g), "--model", str(g.folder)], "ground"),
    Bad("questions that are empty", _answered(), "none of 0 rows"),
    Bad("questions that are binary", _answered(questions=bytes(range(256))), "none of"),
    Bad("questions without the field", _answered(questions='{"q": "a"}\n'), "question"),
    Bad(
        "questions that are not there", lambda g: ["respond", str(g.model), "--questions", "no", "--output", "a"], "no"
    ),
    Bad("answers of no token", _answered("--max-new-tokens", "0", questions='{"question": "a"}\n'), "--max-new-tokens"),
    Bad("answers on an unknown device", _answered("--device", "abacus", questions='{"question": "a"}\n'), "abacus"),
    Bad("answers by vLLM that is not there", _answered("--engine", "vllm", questions='{"question": "a"}\n'), "vllm"),
    Bad("a teacher that is not there", lambda g: ["teach", str(g.shards), "--output", "t", "--teacher", "no"], "no"),
    Bad(
        "a teacher on an unknown device",
        lambda g: ["teach", str(g.shards), "--output", "t", "--teacher", str(g.export), "--device", "abacus"],
        "abacus",
    ),
    Bad("an unknown command of the evaluation", _line("eval", "fry"), "fry"),
    Bad("an unknown prompt", lambda g: [*g.embed_with(g.export), "--prompt", "none"], "none"),
    Bad("a dimension of nothing", lambda g: [*g.embed_with(g.export), "--dimension", "0"], "--dimension"),
    Bad("a dimension above the model's", lambda g: [*g.embed_with(g.export), "--dimension", "9999"], "9999"),
    Bad("packs of 5,000 digits", lambda g: [*g.embed_with(g.export), "--pack-tokens", _NINES], "--pack-tokens"),
    Bad("parts of 30 digits", lambda g: [*g.embed_with(g.export), "--shard-texts", "9" * 30], "--shard-texts"),
    Bad(
        "vectors into a file",
        lambda g: ["embed", str(g.export), "--input", g.file("t.txt", "a"), "--output", g.file("f", "")],
        "f",
    ),
    Bad("a field of plain text", lambda g: [*g.embed_with(g.export), "--text-field", "x"], "plain text has no fields"),
    Bad("a base of a whole model", lambda g: [*g.embed_with(g.export), "--base", "x"], "leave --base out"),
    Bad("decoding nothing", lambda g: ["decode", str(g.export)], "--text"),
    Bad("decoding pairs that are not there", _decoded("--pairs", "no"), "no"),
    Bad(
        "decoding pairs without a field",
        lambda g: ["decode", str(g.export), "--pairs", g.file("p.jsonl", "{}\n")],
        "p.jsonl:1",
    ),
    Bad("decoding vectors that are not there", _decoded("--vectors", "no"), "no"),
    Bad("decoding with 30 digits of beams", _decoded("--text", "a", "--beams", "9" * 30), "--beams"),
    Bad("decoding 30 digits of tokens", _decoded("--text", "a", "--max-new-tokens", "9" * 30), "--max-new-tokens"),
    Bad("a task that is not known", lambda g: ["mteb", str(g.export), "--tasks", "NoSuchTask"], "NoSuchTask"),
    Bad("a benchmark that is not known", lambda g: ["mteb", str(g.export), "--benchmark", "none"], "none"),
    Bad("no task", lambda g: ["mteb", str(g.export)], "nothing to score"),
    Bad(
        "a task without data",
        lambda g: ["mteb", str(g.export), "--tasks", "STS12", "--data-root", str(g.folder)],
        "STS12",
    ),
    Bad("a retrieval folder that is not there", lambda g: ["mteb", str(g.export), "--retrieval", "no"], "no"),
    Bad("a corpus that is not there", _scored("corpus.jsonl", None), "corpus.jsonl"),
    Bad("a corpus that is empty", _scored("corpus.jsonl", ""), "corpus.jsonl"),
    Bad("a corpus that is nested too deep", _scored("corpus.jsonl", "[" * 100_000), "corpus.jsonl:1"),
    Bad("queries that are lists", _scored("queries.jsonl", "[]\n"), "queries.jsonl:1"),
    Bad(
        "judgements of nan",
        _scored("qrels/test.jsonl", '{"query-id": "q0", "corpus-id": "d0", "score": NaN}\n'),
        "test.jsonl:1",
    ),
    Bad(
        "judgements of infinity",
        _scored("qrels/test.jsonl", '{"query-id": "q0", "corpus-id": "d0", "score": 1e999}\n'),
        "test.jsonl:1",
    ),
    Bad(
        "judgements of nobody",
        _scored("qrels/test.jsonl", '{"query-id": "?", "corpus-id": "d0", "score": 1}\n'),
        "test.jsonl:1",
    ),
    Bad(
        "prompts that are not there",
        lambda g: ["mteb", str(g.export), "--retrieval", str(write_retrieval(Path(g.path("t")))), "--prompts", "none"],
        "none",
    ),
    Bad("prompts that are a list", _prompted("[]"), "p.yaml"),
    Bad("prompts in Latin-1", _prompted(b"tasks: {caf\xe9: []}"), "p.yaml"),
    Bad("prompts that are nested too deep", _prompted("[" * 1000), "p.yaml"),
    Bad("prompts with a number for a task", _prompted("tasks: {a: [1]}"), "p.yaml"),
    Bad("results that are not there", _line("table", "a=no"), "no"),
    Bad("results without a label", _line("table", "no"), "LABEL=DIR"),
    Bad("published rows of no benchmark", _line("table", "a=no", "--published"), "--benchmark"),
    Bad("a run that is not there", _line("report", "no", "--output", "r.html"), "no such folder"),
    Bad(
        "a run without metrics",
        lambda g: ["report", str(g.folder), "--output", g.path("r.html")],
        "neither metrics.jsonl",
    ),
    Bad("labelled texts that are too few", _looked("--labelled", '{"text": "a", "label": 1}\n'), "too few"),
    Bad("labelled texts that are lists", _looked("--labelled", "[]\n"), "looked.jsonl:1"),
    Bad("pairs of a report that are empty", _looked("--pairs", ""), "looked.jsonl"),
    Bad("decoded texts that are lists", _looked("--decoded", "[]\n"), "looked.jsonl:1"),
    Bad("a copy to verify that is not there", _line("fetch", "--verify", "--data-root", "no"), "no"),
    Bad(
        "a copy whose checksums are a list",
        lambda g: ["fetch", "--verify", "--data-root", str(Path(g.file("d/checksums.json", "[]")).parent)],
        "checksums.json",
    ),
    Bad(
        "a copy whose checksums are nested too deep",
        lambda g: ["fetch", "--verify", "--data-root", str(Path(g.file("d/checksums.json", "[" * 100_000)).parent)],
        "checksums.json",
    ),
    Bad("fetching nothing", _line("fetch", "--data-root", "d"), "nothing to fetch"),
    Bad(
        "converting a folder of something else",
        lambda g: ["convert", str(g.model), "--output", g.path("o")],
        "run_config.yml",
    ),
    Bad("a study of an unknown arm", lambda g: ["study", g.study(), "--list", "--only", "nobody"], "nobody"),
    Bad("a study of seeds that are words", lambda g: ["study", g.study(), "--list", "--seeds", "a"], "--seeds"),
    Bad("a study of seeds of 5,000 digits", lambda g: ["study", g.study(), "--list", "--seeds", _NINES], "--seeds"),
    Bad("a study at rates that are nan", lambda g: ["study", g.study(), "--only", "stage2", "--tune", "nan"], "--tune"),
    Bad("a study without results", lambda g: ["study", g.study(), "--tables"], "holds no result"),
    Bad(
        "a study whose arms are not there",
        lambda g: ["study", g.study(), "--list", "arms=nowhere.yaml"],
        "no such recipe file",
    ),
    Bad("a study whose pairs are not there", lambda g: ["study", g.study()], "pairs"),
    Bad("a study with a result that is damaged", lambda g: ["study", g.study(result="["), "--tables"], "results"),
    Bad("a study with a result of nothing", lambda g: ["study", g.study(result="{}"), "--tables"], "results"),
]
