"""Ground for making bad inputs: one folder per input, with good copies of everything that a command reads."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from conftest import english_pairs, write_jsonl
from studies import write_scale

Content = str | bytes | Path | None
"""Text or bytes of a file; a path makes a link to it, None a folder in its place."""


class Bad(NamedTuple):
    """Bad input and the error line expected for it.

    Attributes:
        name: what is wrong, in words for the test's output.
        make: makes the input on its ground and returns the command line, program first.
        says: text that the error line must contain.
        environment: extra environment variables of the command.
    """

    name: str
    make: Callable[["Ground"], list[str]]
    says: str
    environment: dict[str, str] = {}  # noqa: RUF012 - a NamedTuple's default, never written to


@dataclass(frozen=True)
class Ground:
    """New folder, with good inputs to copy from.

    Attributes:
        folder: empty at first.
        shards: packed pairs; never written to.
        model: folder with weights and tokenizer; never written to.
        export: exported model folder; never written to.
    """

    folder: Path
    shards: Path
    model: Path
    export: Path

    def path(self, name: str) -> str:
        """Return a path on the ground; create its parent folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(path)

    def file(self, name: str, content: Content) -> str:
        """Write a file; see :data:`Content`."""
        path = Path(self.path(name))
        if content is None:
            path.mkdir()
        elif isinstance(content, Path):
            path.symlink_to(content)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def json(self, name: str, value: Any) -> str:
        """Write a JSON file."""
        return self.file(name, json.dumps(value))

    def loop(self, name: str) -> str:
        """Make a symbolic link to itself."""
        Path(self.path(name)).symlink_to(name.rpartition("/")[2])
        return self.path(name)

    def copied(self, source: Path, name: str) -> Path:
        """Copy a folder."""
        return Path(shutil.copytree(source, self.path(name)))

    def train(self, *overrides: str, **changes: Any) -> list[str]:
        """Return the dry run of a recipe; ``changes`` replace sections, ``overrides`` follow the recipe."""
        recipe = {
            "output_dir": self.path("run"),
            "seed": 0,
            "data": {"shards": str(self.shards)},
            "backbone": {"path": str(self.model), "trained": {"kind": "full"}, "attention": "segments"},
            "objective": {"kind": "contrastive", "temperature": 0.02},
            "optim": {"lr": 1e-3, "warmup_steps": 1, "total_steps": 2},
            "engine": {"deepspeed": self.json("ds.json", {"zero_optimization": {"stage": 2}}), "dtype": "fp32"},
        }
        return ["train", self.file("train.yaml", yaml.safe_dump(recipe | changes)), *overrides, "--dry-run"]

    def resumed(self, state: Content) -> list[str]:
        """Return the run of a recipe whose only checkpoint has this ``state.json``."""
        command = self.train()
        self.file("run/checkpoints/step-00000002/state.json", state)
        return command[:2]

    def pack(self, *overrides: str, **changes: Any) -> list[str]:
        """Pack a few pairs by a recipe."""
        pairs = write_jsonl(Path(self.path("pairs.jsonl")), english_pairs(8))
        recipe = {
            "output_dir": self.path("shards"),
            "seed": 0,
            "tokenizer": str(self.model),
            "template": {"kind": "preset", "name": "chatml"},
            "sources": [{"kind": "files", "name": "x", "path": str(pairs), "instructions": []}],
            "text": {"max_tokens": 64, "hard_negatives": 0},
            "batch": {"pairs": 4, "pack_tokens": 512, "pack_multiple": 1},
        }
        return ["pack", self.file("pack.yaml", yaml.safe_dump(recipe | changes)), *overrides]

    def packed_from(self, name: str, content: Content, **source: Any) -> list[str]:
        """Pack a file of pairs."""
        section = {"kind": "files", "name": "x", "path": self.file(name, content), "instructions": []}
        return self.pack(sources=[section | source])

    def embed(self, name: str, content: Content, *options: str) -> list[str]:
        """Embed the texts of a file."""
        return [
            "embed",
            str(self.export),
            "--input",
            self.file(name, content),
            "--output",
            self.path("vectors"),
            *options,
        ]

    def embed_with(self, folder: Path | str) -> list[str]:
        """Embed a good file of texts with a model folder."""
        return ["embed", str(folder), "--input", self.file("texts.txt", "a\n"), "--output", self.path("vectors")]

    def without(self, source: Path, file: str) -> Path:
        """Copy a folder without one of its files."""
        folder = self.copied(source, f"altered-{source.name}")
        (folder / file).unlink(missing_ok=True)
        return folder

    def altered(self, source: Path, file: str, content: Content) -> Path:
        """Copy a folder with one file replaced."""
        folder = self.without(source, file)
        self.file(f"{folder.name}/{file}", content)
        return folder

    def edited(self, source: Path, file: str, **changes: Any) -> Path:
        """Copy a folder with other values in one JSON object; ``...`` removes a key."""
        content = json.loads((source / file).read_text(encoding="utf-8")) | changes
        return self.altered(source, file, json.dumps({k: v for k, v in content.items() if v is not ...}))

    def study(self, result: str | None = None) -> str:
        """Write the scale of a small study, with a result file if given."""
        scale, _ = write_scale(self.folder, self.model)
        if result is not None:
            self.file("results/stage2-seed0-step3.json", result)
        return str(scale)
