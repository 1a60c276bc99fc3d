"""Bad JSON files, model folders, folders of shards and files of texts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_inputs import Bad, Content, Ground

_UNREADABLE = Path("/proc/self/mem")
"""File that anyone can open, root included, but whose first byte is an input/output error."""
_JSON: dict[str, Content] = {
    "is empty": "",
    "is binary": bytes(range(256)),
    "is UTF-16": "{}".encode("utf-16"),
    "is cut off": '{"version": 1, ',
    "holds a list": "[]",
    "holds null": "null",
    "holds a number": "7",
    "holds a list of nothing": "[null]",
    "holds nothing": "{}",
    "is nested too deep": "[" * 100_000,
    "holds a number of 5,000 digits": '{"version": ' + "9" * 5000 + "}",
    "cannot be read": _UNREADABLE,
    "is a folder": None,
}
"""Bad contents of a file that must hold a JSON object with known keys."""


def _vectors(g: Ground, manifest: Content) -> list[str]:
    g.file("vectors/manifest.json", manifest)
    return ["decode", str(g.export), "--vectors", g.path("vectors")]


def _with_ds(g: Ground, content: Content) -> list[str]:
    return g.train(f"engine.deepspeed={g.file('bad.json', content)}")


def _embedding_with(name: str) -> Callable[[Ground, Content], list[str]]:
    return lambda g, content: g.embed_with(g.altered(g.export, name, content))


def _packing_with(name: str) -> Callable[[Ground, Content], list[str]]:
    return lambda g, content: g.pack(f"tokenizer={g.altered(g.model, name, content)}")


_OBJECTS: dict[str, tuple[str, Callable[[Ground, Content], list[str]]]] = {
    "a DeepSpeed file": ("bad.json", _with_ds),
    "the index of shards to train on": (
        "index.json",
        lambda g, content: g.train(f"data.shards={g.altered(g.shards, 'index.json', content)}"),
    ),
    "the index of shards to inspect": (
        "index.json",
        lambda g, content: ["inspect", str(g.altered(g.shards, "index.json", content))],
    ),
    "the index of shards to teach": (
        "index.json",
        lambda g, content: [
            *("teach", str(g.altered(g.shards, "index.json", content))),
            *("--output", g.path("taught"), "--teacher", str(g.export)),
        ],
    ),
    "state.json of the only checkpoint": ("all 1 checkpoints are damaged", lambda g, content: g.resumed(content)),
    "anchor.json": ("anchor.json", _embedding_with("anchor.json")),
    "the manifest of vectors": ("manifest.json", _vectors),
    "scores.json": ("scores.json", lambda g, content: ["table", f"a={Path(g.file('r/scores.json', content)).parent}"]),
    "a result of mteb": (
        "STS.json",
        lambda g, content: [
            *("table", "--benchmark", "MTEB(eng, v2)", f"a={Path(g.file('r/STS.json', content)).parent}"),
        ],
    ),
    "config.json of a model to train": (
        "altered-",
        lambda g, content: g.train(f"backbone.path={g.altered(g.model, 'config.json', content)}"),
    ),
    "config.json of an export": ("altered-", _embedding_with("config.json")),
    "tokenizer.json to pack with": ("altered-", _packing_with("tokenizer.json")),
    "tokenizer.json of an export": ("altered-", _embedding_with("tokenizer.json")),
    "tokenizer_config.json to pack with": ("altered-", _packing_with("tokenizer_config.json")),
}
_ALLOWED = {
    # sentence-transformers serves such a folder.
    ("anchor.json", "is a folder"),
    # Packing needs nothing from this file.
    ("tokenizer_config.json to pack with", "is a folder"),
    ("tokenizer_config.json to pack with", "holds nothing"),
    ("tokenizer_config.json to pack with", "holds a number of 5,000 digits"),
}


def _objects() -> list[Bad]:
    return [
        # Other libraries read some of these files, and their system errors name no file.
        Bad(
            f"{what} {name}",
            lambda g, make=make, content=content: make(g, content),
            says if content is not _UNREADABLE else "error: ",
        )
        for what, (says, make) in _OBJECTS.items()
        for name, content in _JSON.items()
        if (what, name) not in _ALLOWED
    ]


def _index(**changes: Any) -> Callable[[Ground], list[str]]:
    return lambda g: g.train(f"data.shards={g.edited(g.shards, 'index.json', **changes)}")


def _inspected_without(file: str) -> Callable[[Ground], list[str]]:
    return lambda g: ["inspect", str(g.without(g.shards, file)), "--verify"]


def _inspected(file: str, content: Content) -> Callable[[Ground], list[str]]:
    return lambda g: ["inspect", str(g.altered(g.shards, file, content)), "--verify"]


def _ds(**zero: Any) -> Callable[[Ground], list[str]]:
    return lambda g: g.train(f"engine.deepspeed={g.json('bad.json', {'zero_optimization': zero})}")


def _model(**config: Any) -> Callable[[Ground], list[str]]:
    return lambda g: g.train(f"backbone.path={g.edited(g.model, 'config.json', **config)}")


def _about(**changes: Any) -> Callable[[Ground], list[str]]:
    return lambda g: g.embed_with(g.edited(g.export, "anchor.json", **changes))


def _chat(template: str) -> Callable[[Ground], list[str]]:
    return lambda g: g.pack(
        f"tokenizer={g.altered(g.model, 'chat_template.jinja', template)}", template={"kind": "chat"}
    )


_LONG = b'{"query": "' + b"x" * 30_000_000 + b'", "positive": "b"}\n'
_GOOD = '{"query": "a", "positive": "b"}\n'

ENDLESS = Bad(
    "a chat template that loops without end",
    _chat("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
    "chat template",
)
"""Run it in a separate process: the abandoned template keeps looping in its thread."""

FILES = [
    *_objects(),
    Bad("an index of another version", _index(version=99), "format version 99"),
    Bad("an index of no version", _index(version=...), "index.json"),
    Bad("an index with a word for its version", _index(version="one"), "index.json"),
    Bad("an index with a key that is not known", _index(more=1), "index.json"),
    Bad("an index without shards", _index(shards=[]), "index.json"),
    Bad("an index whose shards are null", _index(shards=None), "index.json"),
    Bad("an index whose shards are words", _index(shards=["a"]), "index.json"),
    Bad("an index whose shards have no batches", _index(shards=[{"file": "00000.arrow"}]), "index.json"),
    Bad("an index whose recipe is a list", _index(recipe=[]), "index.json"),
    Bad("an index whose recipe is empty", _index(recipe={}), "index.json"),
    Bad("an index whose template is null", _index(template=None), "index.json"),
    Bad("an index whose sources are a word", _index(sources="all"), "index.json"),
    Bad("an index whose prompts are a list", _index(prompts=["query"]), "index.json"),
    Bad("an index with another tokenizer's hash", _index(tokenizer_sha256="0"), "tokenizer"),
    Bad("an index that names a teacher of nothing", _index(teacher={}), "index.json"),
    Bad("shards without their tokenizer", _inspected_without("tokenizer/tokenizer.json"), "tokenizer"),
    Bad("shards without their file", _inspected_without("00000.arrow"), "00000.arrow"),
    Bad("an empty file of shards", _inspected("00000.arrow", ""), "00000.arrow"),
    Bad("a file of shards that is none", _inspected("00000.arrow", b"x" * 1000), "00000.arrow"),
    Bad("a folder of shards that is a file", lambda g: ["inspect", g.file("shards", "")], "no such folder"),
    Bad("a folder of shards that is a link to itself", lambda g: ["inspect", g.loop("shards")], "no such folder"),
    Bad("a DeepSpeed file that is a link to itself", lambda g: g.train(f"engine.deepspeed={g.loop('l')}"), "no such"),
    Bad("a DeepSpeed file of an unknown stage", _ds(stage=7), "stage"),
    Bad("a DeepSpeed file whose stage is a word", _ds(stage="three"), "stage"),
    Bad("a DeepSpeed file whose stage is a truth value", _ds(stage=True), "stage"),
    Bad("a DeepSpeed file whose bucket is negative", _ds(stage=2, reduce_bucket_size=-1), "reduce_bucket_size"),
    Bad("a DeepSpeed file with an unknown key", _ds(stage=2, overlap_com=True), "overlap_com"),
    Bad("a DeepSpeed file with a value auto", _ds(stage="auto"), "auto"),
    Bad("a DeepSpeed file with the batch size", lambda g: _with_ds(g, '{"train_batch_size": 8}'), "train_batch_size"),
    Bad("a DeepSpeed file whose section is a list", lambda g: _with_ds(g, '{"zero_optimization": []}'), "bad.json"),
    Bad("a model of another type", _model(model_type="bert"), "bert"),
    Bad("a model of no known type", _model(model_type="none-such"), "none-such"),
    Bad("a model of negative size", _model(hidden_size=-1), "hidden"),
    Bad("a model whose size is a word", _model(hidden_size="wide"), "hidden_size"),
    Bad("a model without layers", _model(num_hidden_layers=0), "config.json"),
    Bad("a model whose heads do not divide", _model(num_key_value_heads=3), "config.json"),
    Bad("a model with another vocabulary", _model(vocab_size=17), "17 tokens"),
    Bad("a model whose rope is a word", _model(rope_parameters="yes"), "rope_parameters"),
    Bad("an export without prompts", _about(prompts=...), "anchor.json"),
    Bad("an export whose prompts are a list", _about(prompts=[]), "anchor.json"),
    Bad("an export whose limit is a word", _about(max_tokens="many"), "anchor.json"),
    Bad("an export whose limit is negative", _about(max_tokens=-1), "anchor.json"),
    Bad("an export whose limit is too large", _about(max_tokens=10**30), "anchor.json"),
    Bad("an export whose limit is nothing", _about(max_tokens=0), "anchor.json"),
    Bad("an export of an unknown objective", _about(objective=["x"]), "anchor.json"),
    Bad("an export of special tokens without their file", _about(objective="self_supervised"), "anchor.json"),
    Bad("an export without weights", lambda g: g.embed_with(g.without(g.export, "model.safetensors")), "export"),
    Bad("an export with empty weights", lambda g: g.embed_with(g.altered(g.export, "model.safetensors", "")), "export"),
    Bad("an export that is a file", lambda g: g.embed_with(g.file("export", "")), "got a file"),
    Bad("an export that is a link to itself", lambda g: g.embed_with(g.loop("export")), "no such model folder"),
    Bad("an export with a name of 300 characters", lambda g: g.embed_with("x" * 300), "too long"),
    Bad("a chat template that fails", _chat("{{ raise_exception('no') }}"), "chat template"),
    Bad("a chat template of wrong syntax", _chat("{% for %}"), "chat template"),
    Bad("a chat template that is empty", _chat("{{ '' }}"), "chat template"),
    Bad("a chat template of a huge text", _chat("{{ 'x' * 99999999999999 }}"), "chat template"),
    Bad("a chat template of a huge range", _chat("{% for i in range(10 ** 12) %}{% endfor %}"), "chat template"),
    Bad("pairs that cannot be read", lambda g: g.packed_from("p.jsonl", _UNREADABLE), "p.jsonl"),
    Bad("a table that cannot be read", lambda g: g.packed_from("p.csv", _UNREADABLE), "p.csv"),
    Bad("a Parquet file that cannot be read", lambda g: g.packed_from("p.parquet", _UNREADABLE), "p.parquet"),
    Bad("pairs that are a folder", lambda g: g.packed_from("p.jsonl", None), "p.jsonl"),
    Bad("texts that cannot be read", lambda g: g.embed("t.txt", _UNREADABLE), "error"),
    Bad("lines of texts that cannot be read", lambda g: g.embed("t.jsonl", _UNREADABLE), "error"),
    Bad("texts that are a folder", lambda g: g.embed("t.txt", None), "t.txt"),
    Bad("pairs that are empty", lambda g: g.packed_from("p.jsonl", ""), "no batch"),
    Bad("pairs that are too few", lambda g: g.packed_from("p.jsonl", _GOOD), "no batch"),
    Bad("pairs that are binary", lambda g: g.packed_from("p.jsonl", bytes(range(256)) * 9), "p.jsonl:1"),
    Bad("pairs in UTF-16", lambda g: g.packed_from("p.jsonl", _GOOD.encode("utf-16")), "p.jsonl"),
    Bad("pairs in Latin-1", lambda g: g.packed_from("p.jsonl", _GOOD.replace("a", "é").encode("latin-1")), "p.jsonl:1"),
    Bad("pairs nested too deep", lambda g: g.packed_from("p.jsonl", "[" * 100_000), "p.jsonl:1"),
    Bad("pairs that hold a number of 5,000 digits", lambda g: g.packed_from("p.jsonl", "9" * 5000), "p.jsonl:1"),
    Bad("pairs that are lists", lambda g: g.packed_from("p.jsonl", "[1]\n"), "p.jsonl:1"),
    Bad("pairs that are nan", lambda g: g.packed_from("p.jsonl", '{"query": NaN, "positive": "a"}\n'), "p.jsonl:1"),
    Bad("pairs without a positive", lambda g: g.packed_from("p.jsonl", '{"query": "a"}\n'), "positive"),
    Bad("pairs of spaces", lambda g: g.packed_from("p.jsonl", '{"query": " ", "positive": "a"}\n'), "p.jsonl:1"),
    Bad("pairs in a line of 30 MB", lambda g: g.packed_from("p.jsonl", _LONG), "expected at most 4,194,304"),
    Bad("pairs that are no gzip", lambda g: g.packed_from("p.jsonl.gz", _GOOD), "p.jsonl.gz"),
    Bad("pairs that are no zstd", lambda g: g.packed_from("p.jsonl.zst", _GOOD), "p.jsonl.zst"),
    Bad("pairs that are no Parquet", lambda g: g.packed_from("p.parquet", _GOOD), "p.parquet"),
    Bad("a table without a header", lambda g: g.packed_from("p.csv", ""), "p.csv"),
    Bad(
        "a table with a quote that nobody closes",
        lambda g: g.packed_from("p.csv", 'query,positive\n"a,b\nc,d\n'),
        "p.csv",
    ),
    Bad("a table with a column twice", lambda g: g.packed_from("p.tsv", "query\tquery\n"), "twice"),
    Bad("pairs of an unknown suffix", lambda g: g.packed_from("p.docx", _GOOD), "expected a file ending in"),
    Bad(
        "texts that are not there", lambda g: ["embed", str(g.export), "--input", "no", "--output", "v"], "no such file"
    ),
    Bad("texts that are empty", lambda g: g.embed("t.txt", ""), "holds no text"),
    Bad("texts that are binary", lambda g: g.embed("t.txt", bytes(range(256))), "t.txt"),
    Bad("texts in UTF-16", lambda g: g.embed("t.txt", "abc\n".encode("utf-16")), "UTF"),
    Bad("texts nested too deep", lambda g: g.embed("t.jsonl", "[" * 100_000), "nested too deep"),
    Bad("texts that are numbers", lambda g: g.embed("t.jsonl", '{"text": 1}\n'), "expected a text"),
    Bad("texts with one id twice", lambda g: g.embed("t.jsonl", '{"text": "a", "id": 1}\n' * 2), "given twice"),
    Bad("texts with a list for an id", lambda g: g.embed("t.jsonl", '{"text": "a", "id": []}\n'), "the id is"),
    Bad("texts that are no Parquet", lambda g: g.embed("t.parquet", "PAR1"), "t.parquet"),
    Bad("texts in a line of 30 MB", lambda g: g.embed("t.txt", "x" * 30_000_000), "expected at most 4,194,304"),
    Bad("texts of an unknown suffix", lambda g: g.embed("t.doc", "a"), "t.doc: expected"),
]
