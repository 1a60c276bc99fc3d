"""Invariants: for any bad input, a command prints one line and exits with code 2 within seconds, without a traceback.

The tables of bad inputs are `bad_recipes.py`, `bad_files.py` and `bad_commands.py`.
"""

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from bad_commands import COMMANDS
from bad_files import ENDLESS, FILES
from bad_inputs import Bad, Ground
from bad_recipes import RECIPES

from anchor import dist

ROOT = Path(__file__).parents[1]
SECONDS = 30
CHARACTERS = 2100
ALL = [*RECIPES, *FILES, *COMMANDS]
# Run as processes too: signal handlers, exception hooks and exit handlers act only there.
PROCESSES = (
    "recipe of training is nested too deep",
    "recipe of packing is UTF-16",
    "training as a rank above all ranks",
    "the doctor as ranks that are a word",
    "the index of shards to inspect holds null",
)
PROCESS_SECONDS = 90  # imports alone take 10 s on a busy machine
_MODULES = {"train": "anchor.train", "doctor": "anchor.doctor", "study": "bench.study"}
_OF_EVAL = {"eval", "embed", "mteb", "fetch", "decode", "report", "table", "convert"}


def module_and_arguments(command: list[str]) -> tuple[str, list[str]]:
    """Return the module to run, and its arguments without the word that selects the module."""
    name, *arguments = command
    if name in _MODULES:
        return _MODULES[name], arguments
    # "eval" and "data_prep" stand for the program without a command.
    return "eval" if name in _OF_EVAL else "data_prep", arguments if name in ("eval", "data_prep") else command


def main_of(module: str) -> Callable[[list[str]], None]:
    return import_module(module if module == "anchor.train" else f"{module}.__main__").main


@contextmanager
def time_limit() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"still at it after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def good_shards(make_shards: Callable[..., Path]) -> Path:
    return make_shards(max_tokens=48)


@pytest.fixture
def ground(
    tmp_path: Path, good_shards: Path, tiny_model_dir: Path, export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Ground]:
    folder = tmp_path / "ground"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    environment = dict(os.environ)
    # An earlier test may have left its rank here.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    yield Ground(folder, good_shards, tiny_model_dir, export_dir)
    dist.shutdown()
    os.environ.clear()
    os.environ.update(environment)


def check_one_line(bad: Bad, code: Any, said: str) -> None:
    assert code == 2, said
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if "error: " in line]
    assert len(errors) == 1, said
    assert said.splitlines()[-1] == errors[0], said
    assert bad.says in errors[0]
    assert len(errors[0]) < CHARACTERS
    assert errors[0].isprintable()


@pytest.mark.parametrize("bad", ALL, ids=[bad.name for bad in ALL])
def test_a_bad_input_is_one_line_and_exit_code_2(bad: Bad, ground: Ground, capsys: pytest.CaptureFixture[str]) -> None:
    os.environ.update(bad.environment)
    module, arguments = module_and_arguments(bad.make(ground))
    main = main_of(module)
    with warnings.catch_warnings(), time_limit(), pytest.raises(SystemExit) as stop:
        warnings.simplefilter("default")  # as in a program; tests turn warnings into errors
        main(arguments)
    check_one_line(bad, stop.value.code, capsys.readouterr().err)


@pytest.mark.parametrize(
    "bad",
    [
        *(pytest.param(one, id=one.name) for one in ALL if one.name in PROCESSES),
        pytest.param(ENDLESS, id=ENDLESS.name, marks=pytest.mark.slow),
    ],
)
def test_a_process_says_it_in_one_line_too(bad: Bad, ground: Ground) -> None:
    module, arguments = module_and_arguments(bad.make(ground))
    environment = os.environ | bad.environment | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=PROCESS_SECONDS, check=False
    )
    check_one_line(bad, done.returncode, done.stderr)


def test_the_table_is_long_and_names_differ() -> None:
    assert len({bad.name for bad in ALL}) == len(ALL) >= 150
    assert set(PROCESSES) <= {bad.name for bad in ALL}
