"""Invariants: any fault before the first step is one line and exit code 2; a second training in a folder is refused
before it writes there; a crash prints its traceback, even under torch's own hook."""

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_train import error_of, write_recipe

from anchor import dist

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shards(make_shards) -> Path:
    return make_shards(pairs=16, pack_multiple=2, pack_tokens=1024, num_rows=32)


@pytest.fixture
def recipe(tmp_path, tiny_model_dir, shards) -> Path:
    return write_recipe(tmp_path, tiny_model_dir, shards)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """Make each test a process without a launcher."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    yield
    dist.shutdown()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x04\x95binary", "ds.json: not readable as JSON ('utf-8' codec can't decode byte 0x80"),
        (b"[]", "ds.json: expected a JSON object, got []; see ds_configs/"),
        (b"3", "ds.json: expected a JSON object, got 3; see ds_configs/"),
        (b'{"zero_optimization": ' + b"9" * 5000 + b"}", "ds.json: not readable as JSON (Exceeds the limit"),
        (b"[" * 100_000, "ds.json: not readable as JSON (maximum recursion depth exceeded"),
        (b'{"zero_optimization": []}', "ds.json: no 'zero_optimization' section"),
        (b'{"zero_optimization": {"stage": "3"}}', "zero_optimization.stage is '3', expected 0, 1, 2 or 3"),
        (b'{"zero_optimization": {"stage": 7}}', "zero_optimization.stage is '7', expected 0, 1, 2 or 3"),
    ],
)
def test_a_ds_config_that_is_none_is_one_line(tmp_path, recipe, capsys, content, message):
    """Regression: a binary file gave exit code 1 and no message, since torch's hook buffered the traceback."""
    (tmp_path / "ds.json").write_bytes(content)
    assert message in error_of(capsys, str(recipe), f"engine.deepspeed={tmp_path}/ds.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda index: index | {"recipe": {"batch": 3}},
            "not a readable index (recipe.batch is 3, expected dict); pack again",
        ),
        (lambda index: index | {"shards": []}, "not a readable index (it lists no shards); pack again"),
        (lambda index: index | {"shards": [{"file": "x"}]}, "not a readable index ('bytes'); pack again"),
        (lambda index: index | {"recipe": {}}, "not a readable index ('batch'); pack again"),
        (lambda index: [index], "not a readable index (list indices must be integers or slices, not str); pack again"),
    ],
)
def test_an_index_that_is_damaged_json_is_one_line(tmp_path, recipe, shards, capsys, change, message):
    copy = Path(shutil.copytree(shards, tmp_path / "shards"))
    index = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps(change(index)))
    assert error_of(capsys, str(recipe), f"data.shards={copy}") == f"error: {copy}/index.json: {message}"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("x" * 300, ": File name too long; choose a shorter path"),
        ("file", "/file: File exists; something of this name is in the way; move it, or choose another place"),
        ("file/run", "/file/run: Not a directory; a part of this path is a file; choose another place"),
        ("logs-file", "/logs-file/logs: File exists; something of this name is in the way; move it, or choose another"),
        ("loop", "/loop"),
    ],
)
def test_an_output_dir_that_cannot_be_one_is_one_line(tmp_path, recipe, capsys, output, message):
    (tmp_path / "file").touch()
    (tmp_path / "logs-file").mkdir()
    (tmp_path / "logs-file/logs").touch()
    (tmp_path / "loop").symlink_to("loop")
    assert message in error_of(capsys, str(recipe), f"output_dir={tmp_path / output}")


def test_a_second_training_in_a_folder_is_refused_before_it_writes(tmp_path, recipe, capsys):
    """Regression: both runs exited with 0; the metrics were of one recipe, checkpoints and export of the other."""
    run = tmp_path / "run"
    run.mkdir()
    lock = run / ".lock"
    lock.write_text("process 12 on node3")
    with lock.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert error_of(capsys, str(recipe), "optim.lr=5e-2") == (
            f"error: {run}: another training is writing it (process 12 on node3); wait for it or choose another "
            f"output_dir; if that process is gone with its host, delete {lock}"
        )
    assert [path.name for path in run.iterdir()] == [".lock"]


def test_a_dry_run_needs_no_lock(tmp_path, recipe, capsys):
    from anchor.train import main

    (tmp_path / "run").mkdir()
    with (tmp_path / "run/.lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        main([str(recipe), "--dry-run", "--gpu", "cpu"])
    assert "memory" in capsys.readouterr().out.lower()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "RANK is set but WORLD_SIZE is not; start through a launcher, or unset RANK"),
        (
            {"RANK": "zero", "WORLD_SIZE": "2"},
            "RANK=zero, expected a whole number from 0 to 1; start through a launcher",
        ),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2, expected a whole number from 0 to 1; start through a launcher"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1, expected a whole number from 0 to 1; start through a launcher"),
        (
            {"RANK": "0", "WORLD_SIZE": "0"},
            "WORLD_SIZE=0, expected a whole number at least 1; start through a launcher",
        ),
        ({"RANK": "0", "WORLD_SIZE": "9" * 5000}, "expected a whole number at least 1; start through a launcher"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "x"}, "LOCAL_RANK=x, expected a whole number at least 0"),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "99999"},
            "MASTER_PORT=99999, expected a whole number from 1 to",
        ),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "29500"}, "RANK is set but MASTER_ADDR is not; start through"),
        ({"SLURM_NTASKS": "x", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, "started by srun without MASTER_ADDR"),
    ],
)
def test_rank_variables_that_make_no_sense_are_one_line(recipe, capsys, monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    said = error_of(capsys, str(recipe))
    assert said.startswith("error: environment: ")
    assert message in said


def test_a_port_in_use_is_one_line(recipe, capsys, monkeypatch):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        said = error_of(capsys, str(recipe))
    assert (
        said == f"error: port {port} of {socket.gethostname()} is in use by another program; choose another MASTER_PORT"
    )


CRASH = """
import sys, tempfile
import torch.distributed as dist
from anchor import log
log.setup()
sys.excepthook = log.crash_reporter(None if len(sys.argv) == 1 else __import__("pathlib").Path(sys.argv[1]))
dist.init_process_group("gloo", f"file://{tempfile.mkdtemp()}/x", world_size=1, rank=0)
raise KeyError("bug")
"""


@pytest.mark.parametrize("log_file", [None, "/dev/full", "/nowhere/at/all/rank.log"])
def test_a_crash_prints_its_traceback_under_torchs_hook(log_file):
    """init_process_group wraps our hook in one that shows its output only after it returns; ours ends the process."""
    arguments = [] if log_file is None else [log_file]
    command = [sys.executable, "-c", CRASH, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "rank 0 on" in done.stderr
    assert "KeyError: 'bug'" in done.stderr
