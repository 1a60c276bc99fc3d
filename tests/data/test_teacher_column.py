"""Invariants: a teacher's vectors come back bit for bit, under the checksum; shards without a teacher keep format
version 1; a teacher's row stays with its query; the index and the files must agree about the teacher.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from test_shards import random_batches, write_folder

from anchor.data.batches import to_tensors
from anchor.data.index import FORMAT_VERSION, TEACHER_VERSION, Index
from anchor.data.shards import Batch, ShardReader, ShardWriter
from anchor.errors import ShardError

DIMENSION = 5


def taught(batches: list[Batch]) -> list[Batch]:
    draw = np.random.default_rng(1)
    return [
        dataclasses.replace(
            batch,
            packs=tuple(
                dataclasses.replace(pack, teacher=draw.normal(size=(pack.num_pairs, DIMENSION)).astype(np.float16))
                for pack in batch.packs
            ),
        )
        for batch in batches
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three batches with a teacher."""
    path = tmp_path / "s"
    path.mkdir()
    writer = ShardWriter(path, 2, teacher=True)
    for batch in taught(random_batches(0, 3)):
        writer.write(batch)
    writer.close()
    teacher = {"model": "t", "dimension": DIMENSION, "prompt": "", "normalized": True}
    recipe = {"batch": {"pack_multiple": 4}}
    Index(TEACHER_VERSION, "", 0, {}, recipe, [], {}, writer.shards, 2, teacher).write(path)
    return path


def test_a_teachers_vectors_come_back_bit_for_bit(folder: Path) -> None:
    reader = ShardReader(folder)
    expected = taught(random_batches(0, 3))
    for number, batch in enumerate(expected):
        for ours, theirs in zip(reader.read(number).packs, batch.packs, strict=True):
            assert ours.teacher is not None
            assert theirs.teacher is not None
            assert ours.teacher.dtype == np.float16
            assert ours.teacher.shape == (theirs.num_pairs, DIMENSION)
            assert ours.teacher.tobytes() == theirs.teacher.tobytes()
            assert ours.input_ids.tobytes() == theirs.input_ids.tobytes()
    assert reader.index.teacher == {"model": "t", "dimension": DIMENSION, "prompt": "", "normalized": True}
    assert reader.index.end_token_id == 2
    reader.verify_files()


def test_shards_without_a_teacher_keep_their_format(tmp_path: Path) -> None:
    plain = write_folder(tmp_path / "plain", random_batches(0, 1))
    stored = json.loads((plain / "index.json").read_text())
    assert stored["version"] == FORMAT_VERSION == 1
    assert {"teacher", "end_token_id"} & {*stored} == set()
    names = ["input_ids", "segment_lengths", "body_starts", "body_ends", "roles", "pair_ids", "text_ids"]
    assert pa.ipc.open_file(str(plain / "00000.arrow")).schema.names == names
    assert ShardReader(plain).read(0).packs[0].teacher is None


def test_a_changed_vector_is_refused(folder: Path) -> None:
    file = folder / "00000.arrow"
    data = bytearray(file.read_bytes())
    vector = taught(random_batches(0, 1))[0].packs[0].teacher
    assert vector is not None
    data[data.index(vector.tobytes())] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ShardError) as caught:
        ShardReader(folder).read(0)
    again = "delete the file and run `python -m data_prep teach` again"
    assert str(caught.value) == f"{file}: batch 0: checksum differs; {again}"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"teacher": None}, "{f}/index.json: format version 2, but teacher is None; pack again"),
        ({"version": 1, "teacher": {"dimension": 5}}, "{f}/index.json: format version 1, but teacher is"),
        (
            {"teacher": {"dimension": 6}},
            "{f}/00000.arrow: batch 0: 60 numbers of the teacher, expected 72 by index.json; run",
        ),
    ],
)
def test_an_index_that_disagrees_about_the_teacher_is_refused(folder: Path, change: dict, expected: str) -> None:
    stored = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**stored, **change}))
    with pytest.raises(ShardError) as caught:
        ShardReader(folder).read(0)
    assert str(caught.value).startswith(expected.format(f=folder))


def test_a_teachers_row_stays_with_its_query(folder: Path) -> None:
    pack = next(pack for pack in ShardReader(folder).read(0).packs if pack.num_pairs > 1)
    assert pack.teacher is not None
    first_gone = np.repeat(np.arange(pack.num_pairs), 3) != 0
    for keep, rows in ((first_gone, pack.teacher[1:]), (pack.roles == 0, pack.teacher)):
        kept = pack.select(keep).teacher
        assert kept is not None
        assert np.array_equal(kept, rows)


def test_tensors_carry_the_teacher_as_float32(folder: Path) -> None:
    pack = ShardReader(folder).read(1).packs[0]
    tensor = to_tensors(pack, torch.device("cpu")).teacher
    assert tensor is not None
    assert tensor.dtype == torch.float32
    assert pack.teacher is not None
    assert tensor.numpy().astype(np.float16).tobytes() == pack.teacher.tobytes()
    assert tensor.abs().sum() > 0
    bare = dataclasses.replace(pack, teacher=None)
    assert to_tensors(bare, torch.device("cpu")).teacher is None
