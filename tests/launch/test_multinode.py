"""Invariants of `launch/multinode.sh` without hosts: any argument survives DeepSpeed's quoting, pdsh's letters and a
remote shell; a dry run says what would run where and contacts nobody; a wrong call is one line.
"""

import os
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
RECIPE = "launch/recipes/quickstart/stage1.yaml"
HOSTILE = [
    *("plain", "two words", "$HOME", "a $HOME b", "`id`", "x `id` y", "a;b", "a; b", "it's", "it's two", 'say "hi"'),
    *('"', "50%", "50% %h %n", "back\\slash", "back\\slash two", "a\\", "star*", "(x)", "a&b", "#no", "!!", "{a,b}"),
]


def multinode(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["launch/multinode.sh", *words]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=60)


def dry_run(*words: str, **environment: str) -> list[str]:
    done = multinode("--hostfile", "launch/hostfile.example", "--dry-run", *words, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_argument_survives_the_way_to_the_ranks() -> None:
    from deepspeed.launcher.multinode_runner import PDSHRunner

    command = shlex.split(dry_run(RECIPE, *HOSTILE)[-1].removeprefix("by:"))
    sent = command[command.index("anchor.train") + 1 :]
    runner = SimpleNamespace(args=SimpleNamespace(user_args=sent))
    line = " ".join(PDSHRunner.parse_user_args(runner))  # type: ignore[arg-type]
    assert "%%h" in line
    line = line.replace("%%", "%")  # what pdsh does; it replaces %h and %n where the letter stands alone
    arrived = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
    assert arrived.stdout.split("\0")[:-1] == [RECIPE, *HOSTILE]


def test_a_dry_run_says_what_runs_where_with_what() -> None:
    lines = dry_run("--interface", "ib0", "--env", "WORD=a $b", RECIPE, NCCL_DEBUG="INFO", SECRET="x")  # noqa: S106
    assert lines[0] == f"node1: ranks 0 to 7 of: python -m anchor.train {RECIPE}"
    assert lines[1] == f"node2: ranks 8 to 15 of: python -m anchor.train {RECIPE}"
    environment = [line.strip() for line in lines[3:-1]]
    assert {"GLOO_SOCKET_IFNAME=ib0", "NCCL_SOCKET_IFNAME=ib0", "NCCL_DEBUG=INFO", "HF_HUB_OFFLINE=1"} < set(
        environment
    )
    assert "WORD=a \\$b" in environment
    assert environment[0].startswith(f"PATH={ROOT}/.venv/bin:")
    assert not any("SECRET" in line for line in lines)
    assert not list(ROOT.glob(".deepspeed_env"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((RECIPE,), "no --hostfile; see launch/multinode.sh --help"),
        (("--hostfile", "missing", RECIPE), "missing: no such hostfile; write one line `HOST slots=GPUS` per host"),
        (("--hostfile", "launch/hostfile.example"), "no recipe; see launch/multinode.sh --help"),
        (("--hosts", "x"), "unknown option --hosts; see launch/multinode.sh --help"),
        (
            ("--hostfile", "launch/hostfile.example", RECIPE, "--dry-run"),
            "options stand before the recipe, got --dry-run after it",
        ),
        (
            ("--hostfile", "launch/hostfile.example", "--no-check", RECIPE),
            "--no-check needs --master-addr and --interface",
        ),
    ],
)
def test_a_wrong_call_is_one_line(words: tuple[str, ...], message: str) -> None:
    done = multinode(*words)
    assert (done.returncode, done.stderr) == (2, f"error: multinode: {message}\n")
