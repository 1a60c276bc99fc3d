"""Invariants: the doctor's verdict names what hangs and what to do; a lock that a killed compilation has left is exit
code 1; hostfiles are read strictly; the two collectives are timed on real ranks.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from distributed import run_distributed

from anchor.doctor.collectives import time_collectives
from anchor.doctor.facts import Facts, gather_facts
from anchor.doctor.hosts import read_hostfile
from anchor.doctor.judge import blocking, differences, notes, skew
from anchor.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def here() -> Facts:
    return gather_facts()


def healthy(facts: Facts) -> Facts:
    return replace(facts, own_address="10.0.0.1", addresses={"lo": ("127.0.0.1",), "eth0": ("10.0.0.1",)}, locks={})


def test_a_healthy_machine_has_nothing_in_the_way(here: Facts) -> None:
    assert blocking(healthy(here), several_hosts=True, environment={}) == []
    assert here.versions["torch"] is not None
    assert here.commit is None or len(here.commit) == 40


@pytest.mark.parametrize(
    ("changes", "environment", "words"),
    [
        ({"own_address": "127.0.1.1"}, {}, "resolves to 127.0.1.1, which is what other hosts are told"),
        ({"own_address": None}, {}, "does not resolve here"),
        ({}, {"GLOO_SOCKET_IFNAME": "eth7"}, "GLOO_SOCKET_IFNAME is eth7, this machine has eth0, lo; correct it"),
        ({}, {"NCCL_SOCKET_IFNAME": "=eth"}, "NCCL_SOCKET_IFNAME is =eth, this machine has eth0, lo"),
        ({"listed_gpus": 8, "gpus": ()}, {}, "lists 8 GPUs, torch"),
        ({"gpus": ("H100",) * 8, "listed_gpus": 8, "shm_bytes": 64 << 20}, {}, "has 0.06 GiB; NCCL between 8 GPUs"),
        ({"locks": {"/x/lock": 3.0}}, {}, "/x/lock is 3 s old: a compilation was killed, or is still going on"),
        ({"versions": {"torch": "2", "peft": None}}, {}, "not installed: peft; run `bash launch/setup.sh`"),
    ],
)
def test_what_would_hang_is_named(here: Facts, changes: dict, environment: dict[str, str], words: str) -> None:
    (line,) = blocking(replace(healthy(here), **changes), several_hosts=True, environment=environment)
    assert words in line


def test_what_does_no_harm_does_not_stop_a_run(here: Facts) -> None:
    loopback = replace(healthy(here), own_address="127.0.1.1")
    assert blocking(loopback, several_hosts=False, environment={}) == []
    assert blocking(loopback, several_hosts=True, environment={"GLOO_SOCKET_IFNAME": "eth0"}) == []
    assert blocking(healthy(here), several_hosts=True, environment={"NCCL_SOCKET_IFNAME": "eth"}) == []  # a prefix
    assert "harmless on one machine" in notes(loopback, several_hosts=False)[0]


def test_hosts_that_differ_are_told_in_what(here: Facts) -> None:
    assert differences(here, here) == []
    other = replace(here, commit="0" * 40, python="3.10.0", versions={**here.versions, "torch": "1.0"})
    commit, python, versions = differences(other, here)
    assert commit.startswith("commit is 000000000000, expected ")
    assert python.startswith("Python is 3.10.0, expected 3.")
    assert versions.startswith("torch is 1.0, expected 2.")
    (files,) = differences(replace(here, code_sha256="other"), here)
    assert files.startswith("files differ from the launching machine's at the same commit")
    assert skew(100.0, 99.0, 101.0) is None
    assert skew(80.0, 99.0, 101.0) == "clock is 19 s off; set it by NTP"


def test_a_stale_lock_is_exit_code_1_and_the_last_line(tmp_path: Path) -> None:
    folder = tmp_path / "deepspeed_shm_comm"
    folder.mkdir()
    (folder / "lock").touch()
    done = subprocess.run(
        [sys.executable, "-m", "anchor.doctor"],
        cwd=ROOT,
        env={**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"problem: {folder / 'lock'} is ")
    assert "interfaces" in done.stdout


HANGING = """
import sys, threading, anchor.dist, anchor.doctor.__main__ as doctor, torch.distributed
doctor._JOIN_SECONDS, hang = 2, threading.Event().wait
anchor.dist.init = lambda timeout: anchor.dist.Ranks(0, 2, 0, None)
anchor.dist.set_timeout = lambda timeout: None
if sys.argv[1] == "first":
    anchor.dist.gather_objects = lambda facts: hang()
else:
    anchor.dist.gather_objects = lambda facts: [facts, facts]
    torch.distributed.barrier = torch.distributed.all_gather_into_tensor = hang
doctor.main(["--sizes", "4"])
"""


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        (
            "first",
            "problem: rank 0: the ranks did not meet at 127.0.0.1:1 within 2 s (the first collective has not ended); "
            "is every rank started, is the address rank 0's, is the port open?",
        ),
        (
            "later",
            "problem: rank 0: all-gather of 4 MiB did not end within 2 s, though the ranks had met; is a rank gone, is "
            "the network that they use (NCCL_SOCKET_IFNAME, NCCL_IB_HCA) open to all? NCCL_DEBUG=INFO says more",
        ),
    ],
)
def test_a_collective_that_hangs_is_exit_code_1_and_the_last_line(tmp_path: Path, which: str, expected: str) -> None:
    """Regression: an NCCL collective raises nothing when it hangs; NCCL killed the process before it said why."""
    of_two = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HANGING, which],
        cwd=ROOT,
        env={**os.environ, **of_two, "TORCH_EXTENSIONS_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node1 slots=8\nnode1 slots=8\n", "{path}:2: host 'node1' is given twice; keep one line"),
        ("node1\n", "{path}:1: expected `HOST slots=GPUS`, got 'node1'"),
        ("node1 slots=0\n", "{path}:1: expected `HOST slots=GPUS`, got 'node1 slots=0'"),
        ("# nothing\n\n", "{path}: names no host; write one line `HOST slots=GPUS` per host"),
    ],
)
def test_a_hostfile_that_cannot_be_meant_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "hostfile"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_hostfile(path)
    assert str(error.value) == message.format(path=path)


def test_a_hostfile_keeps_its_order(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text("node2 slots=4 # fast\n\nnode1 slots=8\n")
    assert list(read_hostfile(path).items()) == [("node2", 4), ("node1", 8)]
    assert read_hostfile(ROOT / "launch/hostfile.example") == {"node1": 8, "node2": 8}


def _time(ranks: object) -> list[tuple[str, int, bool]]:
    return [(one.name, one.size_mib, one.gib_per_second > 0) for one in time_collectives(ranks, [1, 2], turns=2)]


def test_both_collectives_are_timed_at_every_size() -> None:
    expected = [(name, size, True) for size in (1, 2) for name in ("all-gather", "reduce-scatter")]
    assert run_distributed(_time, 2) == [expected, expected]
