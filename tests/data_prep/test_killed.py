"""Invariants: the program killed at any moment (SIGKILL, with its workers) and started again ends in the bytes of a run
that nobody disturbed; a finished unit or file is not done again.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import english_pairs, write_jsonl
from packs import MakeRecipe, files_source, folder_bytes

ROOT = Path(__file__).parents[2]
# The command line itself, with units and files so small that there are many.
PROGRAM = """
import sys
import data_prep.sources.units, data_prep.packing.shard_files
data_prep.sources.units.UNIT_ROWS, data_prep.packing.shard_files.BATCHES_PER_SHARD = 32, 4
from data_prep.__main__ import main
main(sys.argv[1:])
"""


def start(recipe: Path, workers: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", PROGRAM, "pack", str(recipe), "--workers", str(workers)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def size(folder: Path) -> int:
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(path, name)).st_size  # noqa: PTH116, PTH118 - polled in a tight loop
            except FileNotFoundError:  # renamed or removed meanwhile
                continue
    return total


def kill_after(process: subprocess.Popen[bytes], folder: Path, grown_bytes: int) -> bool:
    """Kill the process and its workers once the folder has grown by so much; return whether it was still running."""
    before = size(folder)
    while process.poll() is None and abs(size(folder) - before) < grown_bytes:
        time.sleep(0.001)
    running = process.poll() is None
    if running:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return running


@pytest.mark.parametrize(
    ("kills", "workers"),
    [(2, 1), pytest.param(10, 1, marks=pytest.mark.slow), pytest.param(10, 2, marks=pytest.mark.slow)],
)
def test_a_killed_run_is_continued_to_the_same_bytes(
    tmp_path: Path, make_recipe: MakeRecipe, kills: int, workers: int
) -> None:
    draw = random.Random(kills + workers)
    rows = [english_pairs(320, seed=i) for i in range(2)]
    rows[0][7] = {"query": "q"}
    rows[1][300] = rows[1][2]
    sources = [files_source(write_jsonl(tmp_path / f"{i}.jsonl", rows[i]), name=f"s{i}") for i in range(2)]
    recipe = make_recipe(sources, on_bad_row="skip")
    folder = recipe.parent / "shards"
    undisturbed = start(recipe, 1)
    output, _ = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, output.decode()
    expected = folder_bytes(folder)
    assert len([name for name in expected if name.endswith(".arrow")]) >= 10
    shutil.rmtree(folder)
    # What is written in all: the spool, then the shards.
    total = 2 * sum(len(data) for name, data in expected.items() if name.endswith(".arrow"))
    done = 0
    while done < kills:
        if kill_after(start(recipe, workers), folder, draw.randrange(total // kills)):
            done += 1
        else:  # it came to its end before
            assert folder_bytes(folder) == expected
            shutil.rmtree(folder)
    last = start(recipe, workers)
    output, _ = last.communicate(timeout=300)
    assert last.returncode == 0, output.decode()
    assert folder_bytes(folder) == expected
