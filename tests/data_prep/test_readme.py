"""Invariants: the format that README.md describes is the one on disk: its reader, run as it is, reads all batches and
notices a changed one; its tables name every column and field; its commands are commands.
"""

import dataclasses
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from conftest import english_pairs, write_jsonl

from anchor.data.index import Index
from anchor.data.shards import Pack, ShardReader
from data_prep.options import make_parser
from data_prep.packing.pack import pack
from data_prep.teaching.teach import teach

README = (Path(__file__).parents[2] / "data_prep" / "README.md").read_text(encoding="utf-8")
FIELDS = [field.name for field in dataclasses.fields(Pack)]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(params=["plain", "taught"])
def shards(request: pytest.FixtureRequest, tmp_path: Path, make_recipe: Callable[..., Path], export_dir: Path) -> Path:
    """Two sources, one with a name that JSON escapes, in either format version."""
    sources = [
        {
            "kind": "files",
            "name": name,
            "path": str(write_jsonl(tmp_path / f"{i}.jsonl", english_pairs(40, seed=i))),
            "columns": {"negatives": ["negative"]},
            "instructions": [],
        }
        for i, name in enumerate(("small", "größer"))
    ]
    if request.param == "plain":
        recipe = make_recipe(sources)
        pack(str(recipe), [])
        return recipe.parent / "shards"
    recipe = make_recipe(sources, template={"kind": "special_tokens", "tokens": 2})
    pack(str(recipe), [])
    teach(recipe.parent / "shards", tmp_path / "taught", teacher=export_dir)
    return tmp_path / "taught"


def columns_of(shards: Path) -> list[str]:
    return [name for name in FIELDS if name != "teacher" or ShardReader(shards).index.version == 2]


def test_the_reader_of_the_readme_reads_every_batch(shards: Path) -> None:
    (program,) = blocks("python")
    namespace: dict[str, Any] = {}
    exec(program, namespace)  # noqa: S102 - the README's own program
    read = list(namespace["batches"](shards))
    reader = ShardReader(shards)
    assert {meta["source"] for meta, _ in read} == {"small", "größer"}
    assert len(read) == len(reader) == 4
    for number, (meta, packs) in enumerate(read):
        batch = reader.read(number)
        assert meta == {
            "source": batch.source,
            "pairs": 16,
            "query_target_tokens": batch.query_target_tokens,
            "document_target_tokens": batch.document_target_tokens,
        }
        assert len(packs) == len(batch.packs)
        for mine, theirs in zip(packs, batch.packs, strict=True):
            assert list(mine) == columns_of(shards)
            assert all((mine[name] == getattr(theirs, name).ravel()).all() for name in mine)
            assert all(mine[name].dtype == getattr(theirs, name).dtype for name in mine)
    # It would notice: one bit of the first batch's tokens.
    file = shards / reader.index.shards[0]["file"]
    data = bytearray(file.read_bytes())
    first = reader.read(0).packs[0].input_ids.tobytes()
    assert data.count(first) == 1
    data[data.index(first)] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"^00000.arrow, batch 0: checksum differs$"):
        list(namespace["batches"](shards))


def test_the_call_of_datasets_in_the_readme_gives_the_same_packs(shards: Path, tmp_path: Path) -> None:
    (call,) = re.findall(r"`(datasets\.load_dataset\(.*?\))`", README)
    call = call.replace("FOLDER", str(shards)).removesuffix(")") + f", cache_dir={str(tmp_path / 'cache')!r})"
    rows = list(eval(call, {"datasets": datasets}))  # noqa: S307 - the README's own call
    reader = ShardReader(shards)
    packs = [one for number in range(len(reader)) for one in reader.read(number).packs]
    assert rows == [{name: getattr(one, name).ravel().tolist() for name in columns_of(shards)} for one in packs]
    assert len(rows) >= 16


def test_the_tables_name_every_column_and_field(shards: Path) -> None:
    file = pa.ipc.open_file(str(next(shards.glob("*.arrow"))))
    described = re.findall(r"^\| `(\w+)` \| `(list<\w+>)`", README, flags=re.MULTILINE)
    # Arrow calls a list's items `item` or `element`; the README leaves that out.
    found = [(f.name, f"list<{f.type.value_type}>".replace("halffloat", "float16")) for f in file.schema]
    assert [name for name, _ in found] == columns_of(shards)
    assert described[: len(found)] == found
    assert {name for name, _ in described[len(found) :]} <= {"teacher"}
    fields = re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE)
    for field in dataclasses.fields(Index):
        assert field.name in fields
    index = json.loads((shards / "index.json").read_text(encoding="utf-8"))
    taught = {"end_token_id", "teacher"}
    stored = {field.name for field in dataclasses.fields(Index)}
    assert set(index) == (stored if index["version"] == 2 else stored - taught)
    _, custom = file.get_batch_with_custom_metadata(0)
    assert set(json.loads(custom[b"anchor"])) <= set(fields)
    for name in (*index["sources"][0], *index["shards"][0], *index["template"], *index.get("teacher", ())):
        assert f"`{name}`" in README
    for source in index["sources"]:
        assert source["rows_read"] == source["kept"] + sum(source["dropped"].values())


def test_the_commands_of_the_readme_are_commands() -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    parsed = [make_parser().parse_args(shlex.split(line)[3:]).command for line in lines]
    assert all(line.startswith("python -m data_prep ") for line in lines)
    assert sorted(set(parsed)) == [*("decontaminate", "docs", "inspect", "merge", "mine", "pack", "respond", "teach")]
