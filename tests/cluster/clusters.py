"""Fixtures of the tests marked `cluster`: two hosts with sshd, two hosts under SLURM, and a run of one process.

On a machine that cannot provide them the tests skip with the reason; ``ANCHOR_REQUIRE_CLUSTER=1`` makes that a failure.
"""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest
import yaml
from nodes import ROOT, SWITCH, Node, environment, wait_until, why_not


class Cluster:
    """Two nodes on one switch.

    Args:
        folder: state and logs; a short path, since sockets are made below it.
        prefix: first three numbers of the addresses.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder = folder
        self.switch = Node(folder / SWITCH, SWITCH, None)
        self.nodes = [Node(folder / f"node{i}", f"node{i}", f"{prefix}.{i}") for i in (1, 2)]
        self.hosts = folder / "hosts"
        self.hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{n.address} {n.name}\n" for n in self.nodes))

    def off(self) -> None:
        """Power off both nodes and the switch."""
        for node in [*self.nodes, self.switch]:
            node.off()


Kind = TypeVar("Kind", bound=Cluster)


@contextmanager  # the folder's path is short because sockets are made below it
def cluster(kind: type[Kind], prefix: str, programs: tuple[str, ...]) -> Iterator[Kind]:
    """Two nodes without processes; skips where that is impossible."""
    reason = why_not(programs)
    if reason is not None:
        if os.environ.get("ANCHOR_REQUIRE_CLUSTER") == "1":
            pytest.fail(f"ANCHOR_REQUIRE_CLUSTER=1, but {reason}")
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="anchor-", dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        made = kind(Path(folder), prefix)
        made.switch.boot(None, made.hosts, {})
        try:
            yield made
        finally:
            made.off()


_SSHD = """ListenAddress {address}
HostKey {folder}/host_key
PidFile {folder}/sshd.pid
AuthorizedKeysFile {state}/id.pub
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
MaxStartups 64
"""
_SSH = """Host node*
  User root
  IdentityFile {state}/id
  IdentitiesOnly yes
  UserKnownHostsFile {state}/known_hosts
  BatchMode yes
  ServerAliveInterval 5
  ServerAliveCountMax 3
"""


@pytest.fixture(scope="session")
def ssh_cluster() -> Iterator[Cluster]:
    """node1 and node2, which reach each other by ssh as root with a throw-away key."""
    with cluster(Cluster, "10.91.0", ("sshd", "ssh", "ssh-keygen", "pdsh")) as made:
        state = made.folder
        _key(state / "id")
        for node in made.nodes:
            node.folder.mkdir()
            _key(node.folder / "host_key")
            public = (node.folder / "host_key.pub").read_text()
            with (state / "known_hosts").open("a") as known:
                known.write(f"{node.name} {public}")
            (node.folder / "sshd_config").write_text(
                _SSHD.format(address=node.address, folder=node.folder, state=state)
            )
            (node.folder / "ssh_config").write_text(_SSH.format(state=state))
            node.boot(made.switch, made.hosts, {str(node.folder / "ssh_config"): "/etc/ssh/ssh_config"})
            node.run("/usr/sbin/sshd", "-f", node.folder / "sshd_config", "-E", node.folder / "sshd.log")
        assert made.nodes[0].run("ssh", "node2", "hostname").stdout == "node2\n"
        (state / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
        yield made


def _key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "throw-away", "-f", path], check=True)


_SLURM_CONF = """ClusterName=test
SlurmctldHost=node1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its credential expires.
AuthInfo=cred_expire=5
StateSaveLocation={state}/slurmctld
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmctldLogFile={state}/slurmctld.log
SlurmdPidFile=/run/slurm/slurmd.pid
SlurmdSpoolDir={state}/%n/spool
SlurmdLogFile={state}/%n/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2
ReturnToService=2
JobRequeue=1
KillWait=30
MinJobAge=600
SlurmdTimeout=15
MailProg=/bin/true
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=node1 NodeAddr={node1} CPUs=8 RealMemory=8000 Gres=gpu:2 State=UNKNOWN
NodeName=node2 NodeAddr={node2} CPUs=8 RealMemory=8000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
"""


class Slurm(Cluster):
    """Two nodes under SLURM: node1 has the controller; each pretends to have 8 CPUs and 2 GPUs."""

    def prepare(self) -> None:
        """Write keys and configuration."""
        etc = self.folder / "etc"
        etc.mkdir()
        (self.folder / "slurmctld").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        addresses = {str(node.name): str(node.address) for node in self.nodes}
        (etc / "slurm.conf").write_text(_SLURM_CONF.format(state=self.folder, **addresses))
        (etc / "cgroup.conf").write_text("CgroupPlugin=autodetect\n")
        for number in (0, 1):  # SLURM wants a device file for each GPU: twins of /dev/null
            os.mknod(self.folder / f"gpu{number}", 0o20666, os.makedev(1, 3))
        (etc / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-1]\n")

    def boot(self, node: Node) -> None:
        """Power a node on, with munged and slurmd."""
        for folder in (node.folder / "spool", node.folder / "munge"):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o755 if folder.name == "spool" else 0o700)
        node.boot(self.switch, self.hosts, {str(self.folder / "etc"): "/etc/slurm"})
        munge = node.folder / "munge"
        node.run(
            *("munged", f"--key-file={self.folder / 'munge.key'}", f"--seed-file={munge / 'seed'}"),
            *(f"--log-file={munge / 'log'}", "--pid-file=/run/munge/munged.pid"),
        )
        if node is self.nodes[0]:
            node.run("slurmctld")
        node.run("slurmd")

    def states(self) -> str:
        """Return a line `NODE STATE` for each node."""
        return self.nodes[0].run("sinfo", "-h", "-N", "-o", "%N %T", check=False).stdout

    def ready(self) -> bool:
        """Return whether both nodes are idle."""
        return sorted(set(self.states().splitlines())) == ["node1 idle", "node2 idle"]

    def submit(self, *argv: object, **changes: str) -> str:
        """Run ``sbatch``; return the job id."""
        return self.nodes[0].run("sbatch", "--parsable", *argv, **changes).stdout.split()[-1]

    def job(self, job: str) -> dict[str, str]:
        """Return ``scontrol show job`` as a mapping."""
        shown = self.nodes[0].run("scontrol", "-o", "show", "job", job).stdout.splitlines()[0]
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def finished(self, job: str, seconds: float = 400) -> dict[str, str]:
        """Wait for a job's end (`sbatch --wait` polls too rarely); return SLURM's record of it."""
        going = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")
        end = time.monotonic() + seconds
        while (state := self.job(job))["JobState"] in going:
            assert time.monotonic() < end, f"job {job} is not over after {seconds} s: {state}"
            time.sleep(0.25)
        return state

    def clear(self) -> None:
        """Cancel all jobs and wait until both nodes are idle."""
        self.nodes[0].run("scancel", "-u", "root", check=False)
        wait_until(self.ready, 30, "idle nodes")


@pytest.fixture(scope="session")
def slurm_session() -> Iterator[Slurm]:
    """One SLURM for all tests of a file."""
    with cluster(Slurm, "10.92.0", ("munged", "slurmctld", "slurmd", "sbatch", "srun")) as made:
        made.prepare()
        for node in made.nodes:
            made.boot(node)
        wait_until(made.ready, 30, f"idle nodes; see {made.folder}")
        yield made


@pytest.fixture
def slurm(slurm_session: Slurm) -> Iterator[Slurm]:
    """SLURM without jobs, before and after the test."""
    yield slurm_session
    slurm_session.clear()


def losses(folder: Path) -> list[float]:
    """Return the loss of every step of a run."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss/total_nats"] for line in lines]


@pytest.fixture(scope="session")
def write_stage1(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, make_shards: Callable[..., Path]
) -> Callable[..., Path]:
    """``write_stage1(total_steps)`` writes the recipe of a tiny Stage I run and returns its path."""
    shards = make_shards(num_rows=256)

    def write(total_steps: int) -> Path:
        recipe = {
            "output_dir": str(tmp_path_factory.mktemp("run") / "stage1"),
            "seed": 0,
            "data": {"shards": str(shards)},
            "backbone": {"path": str(tiny_model_dir), "trained": {"kind": "full"}, "attention": "segments"},
            "objective": {"kind": "reconstruction", "alpha": 0.2},
            "optim": {"lr": 1e-3, "warmup_steps": 2, "total_steps": total_steps},
            "engine": {"deepspeed": "ds_configs/zero3.json", "dtype": "fp32", "log_every_steps": 1},
        }
        path = tmp_path_factory.mktemp("recipe") / "stage1.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    return write


@dataclass(frozen=True)
class Reference:
    """Run that a run started in any other way must equal.

    Attributes:
        recipe: Stage I, 40 steps.
        losses: of one process on this machine, by step.
    """

    recipe: Path
    losses: list[float]


@pytest.fixture(scope="session")
def reference(write_stage1: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Reference run, trained once for all tests."""
    recipe, folder = write_stage1(total_steps=40), tmp_path_factory.mktemp("alone")
    command = ["python", "-m", "anchor.train", recipe, f"output_dir={folder}"]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, capture_output=True, timeout=600)
    found = losses(folder)
    assert len(found) == 40
    assert found[0] > found[-1] > 0
    return Reference(recipe, found)
