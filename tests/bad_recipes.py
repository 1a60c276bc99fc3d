"""Bad recipes: YAML that every command must refuse, and values that no run can have."""

from collections.abc import Callable
from functools import partial

from bad_inputs import Bad, Ground

_TEXTS: dict[str, tuple[str | bytes, str]] = {
    "is empty": ("", "a recipe is a mapping of sections, got NoneType"),
    "holds a list": ("- a\n- b\n", "a recipe is a mapping of sections, got list"),
    "holds a word": ("hello", "a recipe is a mapping of sections, got str"),
    "is UTF-16": ("seed: 0\n".encode("utf-16"), "UTF-8"),
    "is Latin-1": (b"output_dir: caf\xe9\n", "UTF-8"),
    "is binary": (bytes(range(256)) * 20, "UTF-8"),
    "holds NUL characters": (b"seed: \0\n", "special characters are not allowed"),
    "holds half a surrogate pair": (b"output_dir: \xed\xa0\x80\n", "UTF-8"),
    "is nested too deep": ("[" * 1000, "nested too deep"),
    "is nested too deep in mappings": ("{a: " * 1000, "nested too deep"),
    "holds itself": ("a: &a [*a]\n", "unknown key a"),
    "is itself": ("&a {b: *a}\n", "unknown key b"),
    "is a hundred thousand lines by aliases": (
        "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{k}: &{k} [{','.join([f'*{j}'] * 10)}]\n" for j, k in zip("abcdefghi", "bcdefghij", strict=True)),
        "unknown key",
    ),
    "gives a key twice": ("seed: 1\nseed: 2\n", "given twice"),
    "is indented by tabs": ("data:\n\tshards: x\n", "cannot start any token"),
    "makes a Python object": ("seed: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
    "has a list for a key": ("? [a, b]\n: 1\n", "a key must be text"),
    "has a number for a key": ("1: 2\n", "a key must be text, got 1"),
    "has null for a key": ("~: 2\n", "a key must be text"),
    "holds two documents": ("seed: 1\n---\nseed: 2\n", "another document"),
    "names an alias that is not there": ("seed: *nobody\n", "undefined alias"),
    "holds an impossible date": ("seed: 2024-13-45\n", "month must be in 1..12"),
    "holds a number of 5,000 digits": ("seed: " + "9" * 5000 + "\n", "digits"),
    "holds a line of 30 MB": ("output_dir: " + "x" * 30_000_000, "expected at most 262,144"),
    "has a key of two lines": ('"a\\nb": 1\n', "unknown key"),
}
_PATHS: dict[str, tuple[Callable[[Ground], str], str]] = {
    "is not there": (lambda g: g.path("nothing.yaml"), "no such recipe file"),
    "is a folder": (lambda g: str(g.folder), "no such recipe file"),
    "is a link to itself": (lambda g: g.loop("loop.yaml"), "no such recipe file"),
    "has no name": (lambda _: "", "no such recipe file"),
    "has a name of 5,000 characters": (lambda _: "x" * 5000 + ".yaml", "too long"),
    "cannot be read": (lambda _: "/proc/self/mem", "cannot be read"),
    "is a device": (lambda _: "/dev/zero", "no such recipe file"),
    "lies below a file": (lambda g: g.file("f", "") + "/r.yaml", "no such recipe file"),
}
_COMMANDS: dict[str, Callable[[str], list[str]]] = {
    "training": lambda path: ["train", path, "--dry-run"],
    "packing": lambda path: ["pack", path],
    "merging": lambda path: ["merge", path],
    "a study": lambda path: ["study", path, "--list"],
}


def _of_all_commands() -> list[Bad]:
    found = []
    for reader, command in _COMMANDS.items():
        # Merging reads recipes as packing does.
        texts = _TEXTS if reader != "merging" else {}
        for name, (text, says) in texts.items():
            found.append(Bad(f"recipe of {reader} {name}", partial(_written, command, text), says))
        for name, (path, says) in _PATHS.items():
            found.append(Bad(f"recipe of {reader} {name}", partial(_at, command, path), says))
    return found


def _written(command: Callable[[str], list[str]], text: str | bytes, ground: Ground) -> list[str]:
    return command(ground.file("r.yaml", text))


def _at(command: Callable[[str], list[str]], path: Callable[[Ground], str], ground: Ground) -> list[str]:
    return command(path(ground))


_TRAIN = {
    "nonsense": "expected section.key=value",
    "=1": "expected section.key=value",
    "seed.x=1": "is not a section",
    "optim.lr=[": "override 'optim.lr=['",
    "optim.lr=nan": "optim.lr",
    "optim.lr=.nan": "optim.lr",
    "optim.lr=.inf": "optim.lr",
    "optim.lr=1e999": "optim.lr",
    "optim.lr=-1e-3": "optim.lr",
    "optim.lr=yes": "truth value",
    "optim.total_steps=1.5": "optim.total_steps",
    "optim.total_steps=-1": "optim.total_steps",
    "optim.total_steps=1" + "0" * 30: "optim.total_steps",
    "optim.decay_steps=1": "decay_steps (1) is less than total_steps (2)",
    "optim.warmup_steps=1" + "0" * 400: "optim.warmup_steps",
    "optim.max_grad_norm=0": "optim.max_grad_norm",
    "seed=-1": "seed",
    "seed=1" + "0" * 30: "seed",
    "seed=[1]": "seed",
    "seed=null": "seed",
    "output_dir=null": "output_dir",
    "output_dir=~nobody-of-this-name/run": "no such user's home",
    "output_dir=" + "x" * 300: "too long",
    'output_dir="a\\0b"': "output_dir",
    "data.shards=nowhere": "no such folder of shards",
    "data.shards=/dev/null": "no such folder of shards",
    "data={}": "missing value data.shards",
    "data.shard=x": "did you mean 'shards'",
    "backbone.path=nowhere": "no such model folder",
    "backbone.path=/dev/null": "got a file",
    "backbone.path=''": "its path is empty",
    "backbone.path=x.gguf": "no such GGUF file",
    "backbone.path=~nobody-of-this-name/m": "no such user's home",
    "backbone.attention=eager": "backbone.attention",
    "backbone.trained.kind=half": "backbone.trained",
    "backbone.trained={kind: lora, r: 8, alpha: 8, dropout: 1}": "dropout",
    "backbone.trained={kind: lora, r: 8, alpha: 8, dropout: 0, targets: [nothing]}": "nothing",
    "backbone.trained={kind: lora, r: 8, alpha: 8, dropout: 0, targets: []}": "targets",
    "backbone.trained={kind: lora, r: 1" + "0" * 30 + ", alpha: 8, dropout: 0}": "backbone.trained.r",
    "backbone.trained={kind: frozen}": "nothing would be trained",
    "objective.temperature=0": "objective.temperature",
    "objective.kind=magic": "objective",
    "objective.matryoshka_dimensions=[64, 32]": "must ascend",
    "objective.matryoshka_dimensions=[1000]": "matryoshka_dimensions",
    "objective.negatives=[]": "query_to_document",
    "objective={kind: reconstruction, alpha: 1.5}": "objective.alpha",
    "objective={kind: self_supervised, alignment_weight: 1, reconstruction_weight: 1}": "self_supervised",
    "engine.deepspeed=nowhere.json": "no such DeepSpeed configuration",
    "engine.deepspeed=/": "no such DeepSpeed configuration",
    "engine.dtype=fp64": "engine.dtype",
    "engine.timeout_seconds=1" + "0" * 12: "engine.timeout_seconds",
    "engine.log_every_steps=0": "engine.log_every_steps",
    "engine.keep_checkpoints=0": "engine.keep_checkpoints",
    "evaluation={shards: nowhere, every_steps: 1}": "no such folder of shards",
    "evaluation={every_steps: 1}": "missing value evaluation.shards",
    "telemetry.loggers=[wandb]": "wandb_project",
    "telemetry.loggers=[paper]": "telemetry.loggers",
    "telemetry.peak_tflops=.nan": "telemetry.peak_tflops",
}
_SOURCE = "{kind: files, name: %s, path: %s, instructions: []}"
_PACK = {
    "epochs=1000000000000": "epochs",
    "epochs=2000000000": "GiB are free",
    "epochs=0": "epochs",
    "text.max_tokens=1000000000000": "less than or equal to",
    "text.max_tokens=2000000000": "batch.pack_tokens",
    "text.max_tokens=1": "max_tokens",
    "text.hard_negatives=1000000": "1000002 segments",
    "batch.pack_tokens=1" + "0" * 30: "batch.pack_tokens",
    "batch.pack_multiple=3": "not a multiple of",
    "batch={pairs: 1" + "0" * 18 + ", pack_tokens: 512, pack_multiple: 1}": "pairs",
    "mixture={kind: capped, max_pairs: 1}": "mixture.max_pairs",
    "mixture={kind: temperature, exponent: .nan}": "mixture.exponent",
    "mixture={kind: temperature, exponent: 2}": "mixture.exponent",
    "mixture={kind: loud}": "mixture",
    "sources=[]": "sources",
    "sources=[{kind: files}]": "sources.0",
    "sources=[{kind: pigeon}]": "sources.0",
    "sources=[" + _SOURCE % ("a/b", "p") + "]": "sources.0.name",
    "sources=[" + _SOURCE % ("x" * 300, "p") + "]": "sources.0",
    "sources=[" + _SOURCE % ("a", "nowhere") + "]": "no such file or folder",
    "sources=[" + _SOURCE % ("a", "/dev/null") + "]": "",
    "sources=[" + _SOURCE % ("a", "~nobody-of-this-name/p") + "]": "no such user's home",
    "sources=[{kind: e5, path: nowhere}]": "no such file or folder",
    "sources=[{kind: hub, name: a, dataset: nowhere, split: train, instructions: []}]": "nowhere",
    "template.name=klingon": "unknown preset",
    "template={kind: custom, prefix: '', suffix: ''}": "anchor",
    "template={kind: custom, prefix: '', suffix: 'no token'}": "anchor",
    "template={kind: special_tokens, tokens: 1000000000000}": "template",
    "template={kind: special_tokens, tokens: 64}": "leaves no room",
    "template={kind: special_tokens, tokens: 0}": "template.tokens",
    "template.instruction_format=x": "must end in '{text}'",
    "tokenizer=nowhere": "no such model folder",
    "tokenizer=''": "its path is empty",
    "on_bad_row=shrug": "on_bad_row",
    "max_skipped_fraction=.nan": "max_skipped_fraction",
    "prompts={query: 1}": "prompts.query",
    "seed=1" + "0" * 30: "seed",
}


def _overridden() -> list[Bad]:
    train = [Bad(f"training with {o[:70]}", lambda g, o=o: g.train(o), says) for o, says in _TRAIN.items()]
    return train + [Bad(f"packing with {o[:70]}", lambda g, o=o: g.pack(o), says) for o, says in _PACK.items()]


def _weight(value: str) -> Callable[[Ground], list[str]]:
    return lambda g: g.pack(
        f"sources=[{{kind: files, name: x, path: {g.path('pairs.jsonl')}, instructions: [], weight: {value}}}]"
    )


RECIPES = [
    *_of_all_commands(),
    *_overridden(),
    Bad("a source that weighs 1e300", _weight("1e300"), "weight"),
    Bad("a source that weighs a million", _weight("1e6"), "weight"),
    Bad("a source that weighs nan", _weight(".nan"), "weight"),
    Bad("a source that weighs nothing", _weight("0"), "weight"),
]
