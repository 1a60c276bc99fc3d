"""Invariants: a user's error, or a disk's refusal, is one line on stderr and exit code 2; a bug keeps its traceback."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from anchor import errors
from anchor.errors import AnchorError, ConfigError, did_you_mean, exit_on_user_error


def test_a_users_error_becomes_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        raise ConfigError("x.yaml: unknown key a")
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", "error: x.yaml: unknown key a\n")


def test_a_file_in_the_way_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        (tmp_path / "file/folder").mkdir()
    assert stop.value.code == 2
    expected = f"error: {tmp_path}/file/folder: Not a directory; a part of this path is a file; choose another place\n"
    assert capsys.readouterr().err == expected


def test_a_full_disk_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, exit_on_user_error(), Path("/dev/full").open("w") as full:
        full.write("x")
    assert stop.value.code == 2
    expected = "error: a file being written: No space left on device; free some disk and start again\n"
    assert capsys.readouterr().err == expected


class SafetensorError(Exception):
    """Error of the same name that safetensors raises."""


FULL = os.strerror(errno.ENOSPC)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (shutil.Error([("a", "b/c", f"[Errno 28] {FULL}: 'b/c'"), ("a", "b/d", "x")]), "b/c: No space left on device"),
        (
            SafetensorError(f"Error while serializing: I/O error: {FULL} (os error 28)"),
            "a file being written: No space",
        ),
        (OSError("524288 requested and 12288 written"), "a file being written: No space left on device; free some"),
        (RuntimeError(f"[enforce fail at inline_container] {FULL}"), "a file being written: No space left on device"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "x"), "x: Disk quota exceeded; free some of your quota and"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), "x: File name too long; choose a shorter path"),
        (
            FileExistsError(errno.EEXIST, "File exists", "x"),
            "x: File exists; something of this name is in the way; move",
        ),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "x"), "x: Is a directory; a folder is where a file should"),
    ],
)
def test_a_disks_refusal_is_one_line_however_a_library_words_it(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        raise error
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("error", [shutil.Error("x"), shutil.Error([("a", "b", "x")]), OSError("x"), RuntimeError("x")])
def test_an_error_that_is_not_the_disks_stays_a_bug(error: Exception) -> None:
    with pytest.raises(type(error)), exit_on_user_error():
        raise error


@pytest.mark.parametrize("bug", [KeyError("bug"), FileNotFoundError(errno.ENOENT, "No such file", "x")])
def test_a_bug_is_not_hidden(bug: Exception) -> None:
    with pytest.raises(type(bug)), exit_on_user_error():
        raise bug


def test_every_error_of_the_project_has_one_root() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(classes) >= 6
    assert all(issubclass(cls, AnchorError) for cls in classes)


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("temprature", ["alpha", "temperature"], "; did you mean 'temperature'?"),
        ("xyz", ["beta", "alpha"], "; known are alpha, beta"),
        ("xyz", [], ""),
    ],
)
def test_a_near_miss_is_suggested(name: str, known: list[str], hint: str) -> None:
    assert did_you_mean(name, known) == hint


def test_a_reader_that_has_gone_ends_the_program_without_a_word() -> None:
    program = 'from anchor.errors import exit_on_user_error\nwith exit_on_user_error():\n    print("x\\n" * 100000)'
    pipe = subprocess.run(
        ["bash", "-c", f"{sys.executable} -c '{program}' | head -n 1; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (pipe.returncode, pipe.stdout, pipe.stderr) == (141, "x\n", "")


def test_too_many_open_files_say_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        raise OSError(errno.EMFILE, "Too many open files", "x")
    assert stop.value.code == 2
    expected = "error: x: Too many open files; raise the limit of open files (`ulimit -n`) and start again\n"
    assert capsys.readouterr().err == expected
