"""Invariants of `launch/multinode.sh` over real ssh between two hosts: the losses of one process, arguments unharmed,
what is wrong with a host is said before anything starts, and no failure leaves a process or an exit code of zero.
"""

import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from clusters import Cluster, Reference, losses
from nodes import ROOT, Node, wait_until

pytestmark = pytest.mark.cluster
RANK = "-m anchor.train --local_rank"
CHECKED = ("--no-check", "--interface", "eth0", "--master-addr", "node1")


def multinode(hostfile: Path, *words: object) -> tuple[object, ...]:
    return ("launch/multinode.sh", "--hostfile", hostfile, *words)


def gone(nodes: list[Node]) -> bool:
    return not any(node.pids(words) for node in nodes for words in (RANK, "deepspeed.launcher"))


def train_long(cluster: Cluster, recipe: Path, log: Path) -> subprocess.Popen[bytes]:
    """Start a run on both hosts that would take minutes; return once it has taken three steps."""
    run = cluster.nodes[0].start(*multinode(cluster.folder / "hostfile", *CHECKED, recipe), log=log)
    wait_until(lambda: "step 3/" in log.read_text() or run.poll() is not None, 300, f"step 3 in {log}")
    assert run.poll() is None, log.read_text()
    return run


def test_two_hosts_give_the_losses_of_one_process_and_arguments_arrive_unharmed(
    ssh_cluster: Cluster, reference: Reference, tmp_path: Path
) -> None:
    odd = tmp_path / 'two hosts $(x); `x` 100%h "q" it\'s'  # a recipe would expand $NAME itself
    done = ssh_cluster.nodes[0].run(*multinode(ssh_cluster.folder / "hostfile", reference.recipe, f"output_dir={odd}"))
    assert "node1: ok, 1 ranks\nnode2: ok, 1 ranks\n" in done.stdout
    assert "2 ranks" in done.stdout
    assert losses(odd) == pytest.approx(reference.losses, rel=1e-5)
    assert (odd / "export/config.json").is_file()


def test_an_unreachable_host_is_named_before_anything_starts(
    ssh_cluster: Cluster, write_stage1: Callable[..., Path], tmp_path: Path
) -> None:
    hostfile, output = tmp_path / "hostfile", tmp_path / "run"
    hostfile.write_text("node1 slots=1\nnode2 slots=2\nnode3 slots=1\n")
    done = ssh_cluster.nodes[0].run(
        *multinode(hostfile, write_stage1(total_steps=1), f"output_dir={output}"), check=False
    )
    assert done.returncode == 1
    assert "node2: ok, 2 ranks" in done.stdout
    assert "node3: not reachable by ssh: ssh: Could not resolve hostname node3" in done.stdout
    assert done.stdout.endswith("1 of 3 hosts cannot run this: node3\n")
    assert not output.exists()


def test_another_commit_other_files_and_missing_shards_are_named_by_host(
    ssh_cluster: Cluster, write_stage1: Callable[..., Path], tmp_path: Path
) -> None:
    first, second = ssh_cluster.nodes
    recipe, other, empty = write_stage1(total_steps=1), tmp_path / "other", tmp_path / "empty"
    subprocess.run(["git", "clone", "-q", "--shared", ROOT, other], check=True)
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", "-C", other, *identity, "commit", "-q", "--allow-empty", "-m", "other"], check=True)
    for folder in ("anchor", "data_prep", "eval", "ds_configs", "launch"):  # what is not committed yet, too
        shutil.copytree(ROOT / folder, other / folder, dirs_exist_ok=True)
    (other / ".venv").mkdir()
    empty.mkdir()
    shards = next(line.split(": ")[1] for line in recipe.read_text().splitlines() if "shards: " in line)
    second.mount(ROOT / ".venv", other / ".venv")
    second.mount(other, ROOT)
    second.mount(empty, Path(shards))
    try:
        done = first.run(*multinode(ssh_cluster.folder / "hostfile", recipe), check=False)
    finally:
        second.unmount(Path(shards))
        second.unmount(ROOT)
        second.unmount(other / ".venv")
    assert done.returncode == 1
    lines = [line for line in done.stdout.splitlines() if line.startswith("node")]
    assert lines[0] == "node1: ok, 1 ranks"
    assert lines[1].startswith("node2: commit is ")
    assert lines[1].endswith("; check the same one out")
    assert lines[2].startswith(f"node2: {shards}")
    assert len(lines) == 3


def test_a_killed_rank_ends_all_in_seconds_and_shows_where_it_was(
    ssh_cluster: Cluster, write_stage1: Callable[..., Path], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    run = train_long(ssh_cluster, write_stage1(total_steps=5000), log)
    (rank,) = ssh_cluster.nodes[1].pids(RANK)
    start = time.monotonic()
    ssh_cluster.nodes[1].run("kill", "-ABRT", rank)
    assert run.wait(timeout=60) != 0
    wait_until(lambda: gone(ssh_cluster.nodes), 40, "no process of the run")
    assert time.monotonic() - start < 60
    text = log.read_text()
    assert "node2: Fatal Python error: Aborted" in text
    assert "anchor/engine/" in text.split("Fatal Python error: Aborted")[1]


def test_a_signal_to_the_launcher_writes_a_checkpoint_from_which_the_same_command_goes_on(
    ssh_cluster: Cluster, write_stage1: Callable[..., Path], reference: Reference, tmp_path: Path
) -> None:
    recipe, log = write_stage1(total_steps=40), tmp_path / "log"
    run = train_long(ssh_cluster, recipe, log)
    (launcher,) = ssh_cluster.nodes[0].pids("launch/multinode.sh", program="bash")
    ssh_cluster.nodes[0].run("kill", "-USR1", launcher)
    assert run.wait(timeout=60) == 85, log.read_text()
    wait_until(lambda: gone(ssh_cluster.nodes), 10, "no process of the run")
    assert "stopped by a signal; the same command goes on" in log.read_text()
    done = ssh_cluster.nodes[0].run(*multinode(ssh_cluster.folder / "hostfile", *CHECKED, recipe))
    assert "resumed at step " in done.stdout
    folder = next(line.split(": ")[1] for line in recipe.read_text().splitlines() if line.startswith("output_dir"))
    assert losses(Path(folder)) == pytest.approx(reference.losses, rel=1e-5)
