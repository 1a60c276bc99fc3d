"""Invariants: an output folder is whole or says that it is not; a run that was killed embeds nothing twice; vectors
are the same in every format; nothing is overwritten unasked; bad input is one line."""

import io
import os
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
from conftest import english_pairs, write_jsonl
from safetensors import SafetensorError

from anchor.encoding.encoder import Encoder
from anchor.errors import ConfigError, DataError, exit_on_user_error
from eval.__main__ import main
from eval.embedding.embed import Options, embed
from eval.embedding.texts import Source
from eval.embedding.vectors import Part, read_folder, write_part

ROWS = [{"id": f"n{i}", "text": row["positive"]} for i, row in enumerate(english_pairs(50))]
TEXTS = [row["text"] for row in ROWS]


@pytest.fixture(scope="module")
def encoder(export_dir) -> Encoder:
    return Encoder(export_dir, dtype="fp32", pack_tokens=300)


@pytest.fixture
def source(tmp_path) -> Source:
    return Source(write_jsonl(tmp_path / "texts.jsonl", ROWS))


@pytest.mark.parametrize("kind", ["npy", "parquet", "safetensors"])
def test_every_format_gives_back_vectors_ids_and_norms(encoder, source, tmp_path, kind):
    out = tmp_path / "out"
    embed(encoder, source, out, Options(prompt="query", format=kind, shard_texts=7))
    stored = read_folder(out)
    assert stored.ids == [row["id"] for row in ROWS]
    np.testing.assert_allclose(stored.embeddings, encoder.encode(TEXTS, "Answer it: "), atol=1e-5)
    states = encoder.states(TEXTS, "Answer it: ")
    np.testing.assert_allclose(stored.embeddings * stored.norms[:, None], states, atol=1e-4)
    assert stored.manifest["prompt"] == "Answer it: "
    assert stored.manifest["texts"] == 50
    assert not (out / ".parts").exists()


@pytest.mark.parametrize("kind", ["npy", "parquet", "safetensors"])
def test_ids_may_hold_all_that_is_no_line_end(encoder, tmp_path, kind):
    """Regression: an id with a carriage return was read back as two, so later vectors got the names of others."""
    ids = ["a\rb", "c\r", "d\x0be\x0cf", "g\x1ch\x85i", "j\u2028k\u2029l", "", " ", "\ufeffm"]
    source = Source(write_jsonl(tmp_path / "texts.jsonl", [{"id": one, "text": "t"} for one in ids]))
    embed(encoder, source, tmp_path / "out", Options(format=kind))
    assert read_folder(tmp_path / "out").ids == ids


def test_bfloat16_vectors_hardly_depend_on_packing(export_dir):
    wide, narrow = (Encoder(export_dir, dtype="bf16", pack_tokens=t).encode(TEXTS) for t in (8192, 50))
    assert (wide * narrow).sum(axis=1).min() > 0.9999


class Killed(BaseException):
    """Exception that stands in for a signal."""


def test_a_killed_run_embeds_nothing_twice(encoder, source, tmp_path, monkeypatch):
    asked: list[str] = []
    real = Encoder.states

    def counted(self, texts, prompt=""):
        if len(asked) >= 20:
            raise Killed
        asked.extend(texts)
        return real(self, texts, prompt)

    monkeypatch.setattr(Encoder, "states", counted)
    options = Options(shard_texts=10)
    with pytest.raises(Killed):
        embed(encoder, source, tmp_path / "out", options)
    assert asked == TEXTS[:20]
    with pytest.raises(DataError, match=r"no manifest\.json"):
        read_folder(tmp_path / "out")
    second: list[str] = []
    monkeypatch.setattr(Encoder, "states", lambda self, texts, prompt="": second.extend(texts) or real(self, texts))
    embed(encoder, source, tmp_path / "out", options)
    assert second == TEXTS[20:]
    monkeypatch.undo()
    embed(encoder, source, tmp_path / "whole", options)
    np.testing.assert_array_equal(read_folder(tmp_path / "out").embeddings, read_folder(tmp_path / "whole").embeddings)


def test_an_unfinished_run_of_another_job_and_damaged_parts_are_refused(encoder, source, tmp_path, monkeypatch):
    out, options = tmp_path / "out", Options(shard_texts=10)
    monkeypatch.setattr("eval.embedding.embed._merge", lambda *_: None)  # stop before the end
    embed(encoder, source, out, options)
    monkeypatch.undo()
    with pytest.raises(ConfigError) as error:
        embed(encoder, source, out, Options(shard_texts=10, dtype="fp16"))
    assert str(error.value) == (
        f"{out}: holds an unfinished run of another job (dtype was 'fp32', is 'fp16'); add --overwrite to begin again"
    )
    part = out / ".parts/part-000002.safetensors"
    whole = part.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:-5] + b"xxxxx"):
        part.write_bytes(damaged)
        with pytest.raises(DataError) as error:
            embed(encoder, source, out, options)
        assert str(error.value).startswith(f"{part}: ")
        assert str(error.value).endswith("delete it and run the command again")
        assert part.read_bytes() == damaged
    part.write_bytes(whole)
    source.path.write_text(source.path.read_text().replace("answer 25", "reply 25"))
    with pytest.raises(DataError, match="holds other texts than the input now does"):
        embed(encoder, source, out, options)


def test_a_rank_to_which_the_folder_is_not_there_yet_writes_its_parts(encoder, source, tmp_path, monkeypatch):
    # On a network disk another host may not yet see what rank 0 has made; the first write failed there.
    monkeypatch.setattr("eval.embedding.embed.rank_and_size", lambda: (1, 2))
    embed(encoder, source, tmp_path / "out", Options(shard_texts=10))
    parts = sorted(path.name for path in (tmp_path / "out/.parts").iterdir())
    assert parts == ["part-000001.safetensors", "part-000003.safetensors"]


def test_rank_0_alone_keeps_the_ids_and_refuses_one_that_is_given_twice(encoder, tmp_path, monkeypatch):
    source = Source(write_jsonl(tmp_path / "texts.jsonl", [{"id": "a", "text": text} for text in "xy"]))
    for rank in (0, 1):
        monkeypatch.setattr("eval.embedding.embed.rank_and_size", lambda rank=rank: (rank, 2))
        with pytest.raises(DataError, match="given twice") if rank == 0 else nullcontext():
            embed(encoder, source, tmp_path / "out", Options(shard_texts=1))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_run_in_one_folder_is_refused_while_the_first_goes_on(encoder, source, tmp_path, overwrite):
    """Regression: the slower of two runs lost its parts to the other."""
    out, options = tmp_path / "out", Options(shard_texts=10)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    (out / ".parts").mkdir(parents=True)
    command = [sys.executable, "-c", hold, str(out / ".parts/lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "\n"
        for _ in range(2):
            with pytest.raises(ConfigError) as error:
                embed(encoder, source, out, options, overwrite=overwrite)
            message = "another process is writing it; wait for it or choose another --output"
            assert str(error.value) == f"{out}: {message}"
        first.kill()
    embed(encoder, source, out, options, overwrite=overwrite)
    assert len(read_folder(out).ids) == 50
    assert not (out / ".parts").exists()


def test_finished_folders_and_others_files_are_kept_unless_asked(encoder, source, tmp_path):
    out = tmp_path / "out"
    embed(encoder, source, out, Options())
    before = (out / "embeddings.npy").read_bytes()
    with pytest.raises(ConfigError) as error:
        embed(encoder, source, out, Options(dimension=8))
    assert str(error.value) == f"{out}: holds finished embeddings; choose another --output or add --overwrite"
    assert (out / "embeddings.npy").read_bytes() == before
    (out / "notes.txt").write_text("mine")
    embed(encoder, source, out, Options(dimension=8, dtype="fp16"), overwrite=True)
    stored = read_folder(out)
    assert stored.embeddings.shape == (50, 8)
    assert stored.embeddings.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(stored.embeddings.astype(np.float32), axis=1), 1, atol=1e-3)
    assert (out / "notes.txt").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/x").write_text("")
    with pytest.raises(ConfigError, match="not empty; choose another --output"):
        embed(encoder, source, tmp_path / "other", Options())
    with pytest.raises(ConfigError) as error:
        embed(encoder, source, tmp_path / "other/x", Options(), overwrite=True)
    assert str(error.value) == f"{tmp_path / 'other/x'}: a file; --output names a folder"


def test_a_manifest_that_is_half_written_or_lacks_a_field_is_named(encoder, source, tmp_path):
    out = tmp_path / "out"
    embed(encoder, source, out, Options())
    file = out / "manifest.json"
    whole = file.read_text()
    for content, message in (
        (whole[: len(whole) // 2], "Unterminated string"),
        ("5", "it is 5, expected an object); run `python -m eval embed` again"),
        (whole.replace('"files"', '"file"'), "files is missing); run `python -m eval embed` again"),
    ):
        file.write_text(content)
        with pytest.raises(DataError) as error:
            read_folder(out)
        assert str(error.value).startswith(f"{file}: half-written or damaged ({message}")


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("embed", ("--pack-tokens", "--dimension", "--shard-texts")),
        ("mteb", ("--pack-tokens", "--at-once")),
        ("decode", ("--beams", "--max-new-tokens", "--limit", "--pack-tokens")),
        ("report", ("--pack-tokens",)),
        ("convert", ("--max-tokens",)),
    ],
)
def test_numbers_below_one_are_refused(command, options, capsys):
    for option in options:
        for value in ("0", "-1", "x"):
            with pytest.raises(SystemExit) as stop:
                main([command, "m", f"{option}={value}"])
            assert stop.value.code == 2
            assert f"argument {option}: " in capsys.readouterr().err


def test_overwriting_killed_and_repeated_embeds_nothing_twice(encoder, source, tmp_path, monkeypatch):
    """Regression: each repetition removed the parts of the run before."""
    asked: list[str] = []
    real = Encoder.states

    def counted(self, texts, prompt=""):
        if len(asked) == limit:
            raise Killed
        asked.extend(texts)
        return real(self, texts, prompt)

    out, options, limit = tmp_path / "out", Options(shard_texts=10), 20
    embed(encoder, source, out, Options(dimension=8))
    monkeypatch.setattr(Encoder, "states", counted)
    with pytest.raises(Killed):
        embed(encoder, source, out, options, overwrite=True)
    assert read_folder(out).embeddings.shape == (50, 8)  # the old ones, until there are others
    limit = 40
    with pytest.raises(Killed):
        embed(encoder, source, out, options, overwrite=True)
    assert asked == TEXTS[:40]
    # Parts of other texts, and damaged ones, are made again.
    source.path.write_text(source.path.read_text().replace(ROWS[0]["text"], "another text"))
    (out / ".parts/part-000001.safetensors").write_bytes(b"")
    limit = None
    embed(encoder, source, out, options, overwrite=True)
    assert asked[40:] == ["another text", *TEXTS[1:20], *TEXTS[40:]]
    monkeypatch.undo()
    embed(encoder, source, tmp_path / "whole", options)
    np.testing.assert_array_equal(read_folder(out).embeddings, read_folder(tmp_path / "whole").embeddings)


def test_overwriting_keeps_the_old_vectors_until_there_are_new_ones(encoder, source, tmp_path):
    """Regression: the old vectors were deleted before the input was read, so a typo in its name destroyed them."""
    out = tmp_path / "out"
    embed(encoder, source, out, Options(format="parquet"))
    broken = write_jsonl(tmp_path / "broken.jsonl", [{"id": "a", "text": "x"}, {"id": "b"}])
    missing = tmp_path / "typo.jsonl"
    (tmp_path / "link.parquet").symlink_to(out / "embeddings.parquet")
    for path, message in (
        (missing, f"{missing}: no such file; expected .jsonl, .csv, .tsv or .txt (each also .gz or .zst)"),
        (out / "embeddings.parquet", f"{out}/embeddings.parquet: the input lies inside --output {out}; "),
        (tmp_path / "link.parquet", f"{tmp_path}/link.parquet: the input lies inside --output {out}; "),
        (broken, f"{broken}:2: no field 'text' with a text"),
    ):
        with pytest.raises((ConfigError, DataError)) as error:
            embed(encoder, Source(path), out, Options(), overwrite=True)
        assert str(error.value).startswith(message)
        assert read_folder(out).ids == [row["id"] for row in ROWS]


@pytest.mark.parametrize("name", ["embeddings.npy", "manifest.json"])
def test_killed_while_the_new_vectors_replace_the_old_the_run_goes_on_and_embeds_nothing(
    encoder, source, tmp_path, monkeypatch, name
):
    out, options, real = tmp_path / "out", Options(shard_texts=10), os.replace

    def killed(path, target):
        if str(target) == str(out / name):
            raise Killed
        real(path, target)

    embed(encoder, source, tmp_path / "whole", options)
    embed(encoder, source, out, Options(dimension=8, format="parquet"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", killed)
        embed(encoder, source, out, options, overwrite=True)
    with pytest.raises(DataError, match=r"no manifest\.json"):
        read_folder(out)
    monkeypatch.setattr(Encoder, "states", lambda *_: pytest.fail("embedded again"))
    embed(encoder, source, out, options)
    files = sorted(path.name for path in out.iterdir())
    assert files == ["embeddings.npy", "ids.txt", "manifest.json", "norms.npy"]
    assert (out / "embeddings.npy").read_bytes() == (tmp_path / "whole/embeddings.npy").read_bytes()


@pytest.mark.parametrize(
    ("kind", "call", "error", "name"),
    [
        ("npy", "os.posix_fallocate", OSError(28, "No space left on device"), "merged/embeddings.npy"),
        ("parquet", "pyarrow.parquet.ParquetWriter.write_table", OSError(28, "Error"), "merged/embeddings.parquet"),
        (
            "npy",
            "eval.embedding.vectors.save_file",
            SafetensorError("I/O error: x (os error 28)"),
            "part-000000.safetensors.tmp",
        ),
    ],
)
def test_a_full_disk_is_one_line_and_the_run_goes_on(
    encoder, source, tmp_path, monkeypatch, capsys, kind, call, error, name
):
    """Regression: rank 0 merged into a sparse mapped file and got a bus error; elsewhere it was a traceback."""

    def full(*_, **__):
        raise error

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop, exit_on_user_error():
        patch.setattr(call, full)
        embed(encoder, source, out, Options(format=kind))
    assert stop.value.code == 2
    message = f"error: {out}/.parts/{name}: No space left on device; free some disk and start again\n"
    assert capsys.readouterr().err.endswith(message)
    embed(encoder, source, out, Options(format=kind))
    assert len(read_folder(out).ids) == 50


def test_what_the_operating_system_refuses_to_safetensors_is_its_error(tmp_path):
    part = Part(["a"], np.ones((1, 2), dtype=np.float32), np.ones(1, dtype=np.float32))
    with pytest.raises(FileNotFoundError) as error:
        write_part(tmp_path / "gone/part", part, "key")
    assert error.value.filename == str(tmp_path / "gone/part.tmp")


def test_raw_states_are_stored_as_they_are(encoder, source, tmp_path):
    embed(encoder, source, tmp_path / "raw", Options(normalize=False))
    np.testing.assert_allclose(read_folder(tmp_path / "raw").embeddings, encoder.states(TEXTS), atol=1e-4)


def test_a_vector_that_is_not_finite_names_its_text(encoder, source, tmp_path, monkeypatch):
    real = Encoder._tokenised

    def poison(self, texts, prompt):
        self.embedder.causal_lm.get_input_embeddings().weight.data[5] = float("nan")
        yield from real(self, texts, prompt)

    weight = encoder.embedder.causal_lm.get_input_embeddings().weight
    kept = weight.data.clone()
    monkeypatch.setattr(Encoder, "_tokenised", poison)
    try:
        token = encoder.backend.id_to_token(5)
        row = write_jsonl(source.path, [{"id": "good", "text": "the river"}, {"id": "bad", "text": token}])
        with pytest.raises(DataError) as error:
            embed(encoder, Source(row), tmp_path / "out", Options())
    finally:
        weight.data.copy_(kept)
    assert str(error.value).startswith(f"{row}: text 'bad': ")
    assert "vectors are not finite" in str(error.value)


def test_the_command_reads_standard_input_and_answers_errors_with_one_line(
    export_dir, tmp_path, monkeypatch, capsys, one_rank
):
    command = ["embed", str(export_dir), "--input", "-", "--output", str(tmp_path / "o")]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(b"one\ntwo\n"))))
    main(command)
    stored = read_folder(tmp_path / "o")
    assert stored.ids == ["0", "1"]
    assert stored.manifest["source"] == "standard input"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(b"other\n"))))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*command, "--prompt", "querry", "--overwrite"])
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: {export_dir}: no prompt is called 'querry'; did you mean 'query'?"
    assert read_folder(tmp_path / "o").ids == ["0", "1"]
