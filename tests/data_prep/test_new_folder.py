"""Invariants: a folder appears whole or not at all; what a killed writer left is written again; what a living one
writes, or nobody here wrote, is refused; nothing is left after an error."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from anchor.errors import DataError
from data_prep.new_folder import new_folder

ROOT = Path(__file__).parents[2]
WRITER = """
import sys, time
from pathlib import Path
from data_prep.new_folder import new_folder
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "part").mkdir()
    (folder / "part/half").write_text("half")
    print("writing", flush=True)
    time.sleep(300)
"""


def test_a_killed_writer_is_taken_over_and_a_living_one_is_not(tmp_path: Path) -> None:
    output = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WRITER, str(output)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        with pytest.raises(DataError) as caught, new_folder(output):
            pass
        writer.send_signal(signal.SIGKILL)
    assert str(caught.value) == (
        f"{output}.unfinished: another process is writing it; wait for it or choose another --output"
    )
    assert (tmp_path / "out.unfinished/part/half").is_file()
    with new_folder(output) as folder:
        (folder / "whole").write_text("whole")
        assert not output.exists()
    assert [path.name for path in output.iterdir()] == ["whole"]
    assert list(tmp_path.iterdir()) == [output]


def test_nothing_is_left_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), new_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("half")
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", [Path(), Path("/"), Path("..")])
def test_a_folder_without_a_name_of_its_own_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".lock").touch()
    with pytest.raises(DataError) as caught, new_folder(path):
        pass
    assert str(caught.value) == f"{path}: already exists and is not written over; delete it or choose another --output"
    assert (tmp_path / ".lock").exists()


@pytest.mark.parametrize("name", ["out", "out.unfinished"])
def test_a_folder_that_is_not_its_own_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "notes").write_text("mine")
    with pytest.raises(DataError) as caught, new_folder(tmp_path / "out"):
        pass
    assert str(caught.value) == (
        f"{tmp_path / name}: already exists and is not written over; delete it or choose another --output"
    )
    assert (tmp_path / name / "notes").read_text() == "mine"
