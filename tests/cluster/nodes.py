"""Two hosts on one machine: a node is a set of namespaces (network, mounts, host name, IPC, process ids).

1. A switch is a network namespace with a bridge and no way out; the machine's own network is never touched.
2. A node's eth0 is one end of a veth pair, the other end is in the switch. Files are shared with the machine, as on
   a cluster with a network file system, but for ``/run``, ``/dev/shm`` and the files in ``/etc`` that say who it is.
3. Ending the node's first process ends every process in it, and the kernel then removes interfaces and mounts. The
   first process itself dies with pytest, so nothing outlives even a ``kill -9`` of the tests.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
SWITCH = "switch"
_SBIN = "/usr/sbin:/sbin"
_INIT = 'echo ready; while :; do sleep 3600 & wait "$!"; done'


def why_not(programs: Sequence[str]) -> str | None:
    """Return why this machine cannot have such nodes, or None."""
    if os.geteuid() != 0:
        return f"needs root (uid is {os.geteuid()})"
    path = f"{os.environ['PATH']}:{_SBIN}"
    for program in ("unshare", "nsenter", "setpriv", "ip", *programs):
        if shutil.which(program, path=path) is None:
            return f"no program {program}; run tests/cluster/install_debian.sh"
    probe = "ip link add probe0 type veth peer name probe1; ip link add probe2 type bridge; mount -t tmpfs none /mnt"
    done = subprocess.run(
        ["unshare", "-n", "-m", "-u", "-i", "-p", "--fork", "--mount-proc", "sh", "-ec", probe],
        env={"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    return None if done.returncode == 0 else f"no namespaces, veth, bridge or tmpfs here: {done.stderr.strip()}"


class Node:
    """One host.

    Args:
        folder: its files (logs, configuration), made here.
        name: host name.
        address: IPv4 address; None makes a switch.
    """

    def __init__(self, folder: Path, name: str, address: str | None) -> None:
        self.folder, self.name, self.address = folder, name, address
        self._unshare: subprocess.Popen[str] | None = None
        self._init_pid = 0

    def boot(self, switch: "Node | None", hosts: Path, mounts: dict[str, str]) -> None:
        """Power on.

        Args:
            switch: to which eth0 is connected; None for the switch itself.
            hosts: what the node sees as /etc/hosts.
            mounts: further file or folder -> what it is shown as in the node.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        kinds = ["-n", "-p"] if switch is None else ["-n", "-m", "-u", "-i", "-p", "--mount-proc"]
        # setpriv: the first process dies with this one, however this one dies.
        self._unshare = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", *kinds, "--fork", "--kill-child=KILL", "bash", "-c", _INIT],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
        assert self._unshare.stdout is not None
        assert self._unshare.stdout.readline() == "ready\n"
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children").read_text()
        self._init_pid = int(children.split()[0])
        if switch is None:
            self._setup(["-n"], "ip link set lo up; ip link add br0 type bridge; ip link set br0 up")
            return
        wire = f"wire-{self.name}"
        add = f"ip link add {wire} type veth peer name eth0 netns {self._init_pid}; ip link set {wire} master br0 up"
        switch._setup(["-n"], add)
        self._setup(["-n"], f"ip link set lo up; ip addr add {self.address}/24 dev eth0; ip link set eth0 up")
        (self.folder / "hostname").write_text(f"{self.name}\n")
        (self.folder / "resolv.conf").write_text("")
        (self.folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files\n")
        shown = {str(self.folder / file): f"/etc/{file}" for file in ("hostname", "resolv.conf", "nsswitch.conf")}
        shown |= {str(hosts): "/etc/hosts"} | mounts
        binds = [f"mount --bind '{source}' '{target}'" for source, target in shown.items()]
        no_keys = "if [ -d /root/.ssh ]; then mount -t tmpfs -o mode=700 none /root/.ssh; fi"
        memory = [f"mount -t tmpfs -o mode={mode} none {at}" for at, mode in (("/run", 755), ("/dev/shm", 1777))]  # noqa: S108
        folders = "mkdir -p /run/sshd /run/lock /run/munge /run/slurm"
        self._setup(["-m", "-u"], "; ".join([f"hostname {self.name}", *binds, no_keys, *memory, folders]))

    def mount(self, source: Path, target: Path) -> None:
        """Show a folder of the machine at another place, in this node only."""
        self._setup(["-m"], f"mount --rbind '{source}' '{target}'")

    def unmount(self, target: Path) -> None:
        """Undo :meth:`mount`."""
        self._setup(["-m", "-p"], f"umount -R '{target}'")

    def _setup(self, namespaces: list[str], script: str) -> None:
        """Run a script in some of the namespaces, as root of the machine."""
        command = ["nsenter", "-t", str(self._init_pid), *namespaces, "sh", "-ec", script]
        env = {"PATH": f"{os.environ['PATH']}:{_SBIN}"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{self.name}: {script}: {done.stderr}"

    def command(self, argv: Sequence[object], timeout_seconds: float) -> list[str]:
        """Return the command that runs ``argv`` in this node and ends it there after the time limit."""
        inside = ["nsenter", "-t", str(self._init_pid), "-n", "-m", "-u", "-i", "-p", f"--wd={ROOT}"]
        return [*inside, "timeout", "-k", "5", str(timeout_seconds), *map(str, argv)]

    def start(self, *argv: object, log: Path, timeout_seconds: float = 400, **changes: str) -> subprocess.Popen[bytes]:
        """Run in the background; ``changes`` are environment variables."""
        with log.open("wb") as out:
            return subprocess.Popen(
                self.command(argv, timeout_seconds),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment(**changes),
            )

    def run(
        self, *argv: object, check: bool = True, timeout_seconds: float = 400, **changes: str
    ) -> subprocess.CompletedProcess[str]:
        """Run and wait; stderr is part of stdout."""
        done = subprocess.run(
            self.command(argv, timeout_seconds),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(**changes),
            check=False,
        )
        assert not check or done.returncode == 0, f"{self.name}: {argv}: {done.returncode}\n{done.stdout[-6000:]}"
        return done

    def pids(self, words: str, program: str = "python") -> list[int]:
        """Return the process ids, in this node, of a program's processes whose command line contains ``words``."""
        lines = self.run("ps", "-eo", "pid=,args=").stdout.splitlines()
        found = [line.split(None, 1) for line in lines]
        return [int(pid) for pid, arguments in found if words in arguments and program in arguments.split()[0]]

    def off(self) -> None:
        """Pull the plug."""
        if self._unshare is None:
            return
        for pid in (self._init_pid, self._unshare.pid):
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
        self._unshare.wait()
        wait_until(lambda: not Path(f"/proc/{self._init_pid}/root").exists(), 5, f"{self.name} to be off")
        assert self._unshare.stdout is not None
        self._unshare.stdout.close()
        self._unshare = None


def environment(**changes: str) -> dict[str, str]:
    """Return the environment of a cluster's login shell, with this project's programs first."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "TORCH_EXTENSIONS_DIR") if name in os.environ}
    path = f"{ROOT / '.venv/bin'}:/usr/local/bin:/usr/bin:/bin:{_SBIN}"
    return kept | {"PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | changes


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Poll until ``condition`` holds; after the time limit fail and name ``what``."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)
