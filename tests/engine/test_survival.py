"""Invariants: a run that is killed at any moment, again and again, ends with the bits of one that was left alone; it
goes on with other numbers of ranks; signals stop all ranks at one step with a checkpoint; whatever breaks (a rank, a
file, the disk) ends the run with a message and leaves what was checkpointed."""

import fcntl
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import blocks
from safetensors.torch import load_file
from test_train import CONTRASTIVE, LORA, losses, write_recipe

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 240.0
STEPS = 80


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


class Run:
    """Real processes, one per rank, started as ``srun python -m anchor.train`` starts them."""

    def __init__(self, recipe: Path, world_size: int, *overrides: str) -> None:
        self.folder = recipe.parent / "run"
        self.out = recipe.parent / f"out-{time.monotonic_ns()}"
        self.out.mkdir()
        common = os.environ | {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        common |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "LOCAL_SIZE": str(world_size)}
        self.ranks = []
        for rank in range(world_size):
            with (self.out / f"{rank}").open("wb") as stderr:
                command = [sys.executable, "-m", "anchor.train", str(recipe), *overrides]
                env = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                self.ranks.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=stderr, stderr=stderr))

    def console(self, rank: int = 0) -> str:
        return (self.out / f"{rank}").read_text(errors="replace")

    def steps(self) -> int:
        path = self.folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for the condition; fail if the run ends first."""
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < end, self.console()
            assert all(process.poll() is None for process in self.ranks), self.console()
            time.sleep(0.002)

    def wait(self, seconds: float = PATIENCE_SECONDS) -> list[int]:
        """Return the exit codes of all ranks."""
        end = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, end - time.monotonic())) for process in self.ranks]
        finally:
            self.kill()

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()
        for process in self.ranks:
            process.wait()


@pytest.fixture(scope="module")
def shards(make_shards):
    return make_shards(pairs=16, pack_multiple=4, pack_tokens=512, num_rows=160)


def checkpointed(folder: Path, model: Path, shards: Path, **changes) -> Path:
    """Write a recipe of many short steps with a checkpoint after each."""
    changes = {"optim__total_steps": STEPS, "engine__checkpoint_every_steps": 1, **changes}
    return write_recipe(folder, model, shards, **changes)


@pytest.fixture(scope="module")
def make_variant(tiny_model_dir, tiny_untied_model_dir, shards):
    """``make_variant(folder, "full" | "lora", **changes)`` writes a recipe of full training or of LoRA with dropout."""

    def make(folder: Path, name: str, **changes) -> Path:
        if name == "full":
            return checkpointed(folder, tiny_model_dir, shards, optim__weight_decay=0.1, **changes)
        lora = {"objective": CONTRASTIVE, "backbone__trained": LORA}
        return checkpointed(folder, tiny_untied_model_dir, shards, **lora, **changes)

    return make


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, make_variant):
    """Folders of an uninterrupted full run and an uninterrupted LoRA run, on two ranks."""
    found = {}
    for name in ("full", "lora"):
        recipe = make_variant(tmp_path_factory.mktemp(name), name, engine__checkpoint_every_steps=STEPS)
        assert Run(recipe, 2).wait() == [0, 0]
        found[name] = recipe.parent / "run"
        assert len(losses(found[name])) == STEPS
    return found


def assert_same_bits(run: Path, reference: Path) -> None:
    assert losses(run) == losses(reference)
    ours, theirs = (load_file(folder / "export/model.safetensors") for folder in (run, reference))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(("name", "kills"), [("full", 20), ("lora", 5)])
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(name, kills, tmp_path, undisturbed, make_variant):
    recipe = make_variant(tmp_path, name)
    draw, interrupted_writes = random.Random(7), 0
    for kill in range(kills):
        run = Run(recipe, 2)
        if kill % 5 == 4:  # while it starts, loads or has just begun
            time.sleep(draw.uniform(0.0, 8.0))
        else:
            goal = run.steps() + draw.randint(1, 3)
            run.until(lambda run=run, goal=goal: run.steps() >= goal)
            if kill % 2:  # while a checkpoint is written
                run.until(lambda: any((tmp_path / "run/checkpoints").glob(".writing-*")))
            else:
                time.sleep(draw.uniform(0.0, 0.2))
        run.kill()
        interrupted_writes += any((tmp_path / "run/checkpoints").glob(".writing-*"))
    last = Run(recipe, 2)
    assert last.wait() == [0, 0], last.console()
    assert interrupted_writes > 0
    assert_same_bits(tmp_path / "run", undisturbed[name])
    assert not list((tmp_path / "run/checkpoints").glob(".*"))


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_run_goes_on_with_other_numbers_of_ranks(name, tmp_path, undisturbed, make_variant):
    """Regression: DeepSpeed's universal checkpoint had one step counter for all parameters: wrong bias correction in
    Adam."""
    recipe = make_variant(tmp_path, name, engine__checkpoint_every_steps=1000)
    for world_size, until in ((2, 20), (1, 40)):
        run = Run(recipe, world_size)
        run.until(lambda run=run, until=until: run.steps() >= until)
        run.ranks[-1].send_signal(signal.SIGUSR1)  # one rank alone
        assert run.wait() == [85] * world_size, run.console()
    last = Run(recipe, 4)
    assert last.wait() == [0] * 4, last.console()
    rows, reference = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "run", undisturbed[name])
    )
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["data/tokens"] for row in rows] == [row["data/tokens"] for row in reference]
    assert [row["loss/total_nats"] for row in rows] == pytest.approx(
        [row["loss/total_nats"] for row in reference], rel=1e-4
    )


def after_five_steps(command: list[str], tmp_path: Path, signalled: Callable[[int], None]) -> tuple[int, str]:
    """Signal a launcher after five steps; return its exit code and output."""
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    out, metrics = tmp_path / "out", tmp_path / "run/metrics.jsonl"
    with (
        out.open("wb") as file,
        subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True) as launched,
    ):
        end = time.monotonic() + PATIENCE_SECONDS
        while not metrics.is_file() or metrics.read_bytes().count(b"\n") < 5:
            assert launched.poll() is None, out.read_text()
            assert time.monotonic() < end, out.read_text()
            time.sleep(0.002)
        signalled(launched.pid)
        code = launched.wait(60)
    assert out.read_text().count(": stop after this step, with a checkpoint") == 2
    assert "without a checkpoint" not in out.read_text()
    return code, out.read_text()


def test_a_signal_to_all_processes_of_a_launcher_leaves_a_checkpoint(tmp_path, undisturbed, make_variant):
    """Signal the whole group, as `timeout` does.

    Regression: the launcher forwarded the signal to ranks that had it already, and the checkpoint was lost.
    """
    recipe = make_variant(tmp_path, "full", engine__checkpoint_every_steps=STEPS)
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", "--master_port"]
    command = [*launcher, free_port(), "--module", "anchor.train", str(recipe)]
    after_five_steps(command, tmp_path, lambda pid: os.killpg(pid, signal.SIGTERM))
    last = Run(recipe, 2)
    assert last.wait() == [0, 0], last.console()
    assert "resumed at step" in last.console()
    assert_same_bits(tmp_path / "run", undisturbed["full"])


def test_a_signal_to_the_script_or_its_group_leaves_a_checkpoint(tmp_path, make_variant):
    """Signal the group, as Ctrl-C does; a cluster signals a pod's first process.

    Regression: DeepSpeed's first process died of the signal and left the ranks.
    """
    recipe = make_variant(tmp_path, "full", engine__checkpoint_every_steps=STEPS)
    code, said = after_five_steps(onenode(recipe), tmp_path, lambda pid: os.killpg(pid, signal.SIGTERM))
    assert code == 85, said
    assert "stopped by a signal; the same command goes on" in said
    assert len(list((tmp_path / "run/checkpoints").glob("step-*"))) == 1
    assert left_over(recipe) == ""


@pytest.mark.parametrize("after", [0.0, 1.0, 4.0])
def test_a_signal_while_the_ranks_start_is_85(tmp_path, make_variant, after):
    """Regression: the exit code was 246, since USR1 killed ranks that were still importing."""
    recipe = make_variant(tmp_path, "full")
    with subprocess.Popen(onenode(recipe), cwd=ROOT, start_new_session=True) as launched:
        while "anchor.train" not in left_over(recipe):
            assert launched.poll() is None
        time.sleep(after)
        launched.terminate()
        assert launched.wait(60) == 85
    assert left_over(recipe) == ""


def test_nothing_outlives_a_killed_script(tmp_path, make_variant):
    """Regression: the launcher's processes and the ranks survived, and trained on."""
    recipe = make_variant(tmp_path, "full")
    with subprocess.Popen(onenode(recipe), cwd=ROOT, start_new_session=True) as launched:
        while len(list((tmp_path / "run/checkpoints").glob("step-*"))) == 0:
            assert launched.poll() is None
            time.sleep(0.05)
        launched.kill()
    time.sleep(1.0)
    assert left_over(recipe) == ""
    with (tmp_path / "run/.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_port_in_use_ends_all_ranks_with_one_line(tmp_path, make_variant):
    """Regression: rank 0 ended with a traceback while rank 1 kept waiting."""
    recipe = make_variant(tmp_path, "full")
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        done = subprocess.run(onenode(recipe, port), cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if "INFO" not in line and "WARNING" not in line] == [
        f"error: port {port} of {socket.gethostname()} is in use by another program; choose another MASTER_PORT"
    ]
    assert left_over(recipe) == ""


def onenode(recipe: Path, port: int | str | None = None) -> list[str]:
    return ["launch/onenode.sh", "--ranks", "2", "--master-port", str(port or free_port()), str(recipe)]


def left_over(recipe: Path) -> str:
    """Return the command lines of a run's remaining processes."""
    return subprocess.run(["pgrep", "-af", str(recipe)], capture_output=True, text=True, check=False).stdout


def test_a_rank_that_dies_ends_the_others_within_a_minute(tmp_path, tiny_model_dir, shards):
    run = Run(checkpointed(tmp_path, tiny_model_dir, shards), 2)
    run.until(lambda: run.steps() >= 3)
    run.ranks[1].kill()
    assert run.wait(60)[0] == 1
    assert f"rank 0 on {socket.gethostname()} failed" in run.console()
    assert "Traceback" in run.console()
    assert ", step " in run.console() or "checkpoint of step" in run.console()
    assert "failed" in (tmp_path / "run/logs/rank-00000.log").read_text()


def test_a_rank_that_hangs_ends_the_run_by_time_out_and_names_the_step(tmp_path, tiny_model_dir, shards):
    run = Run(checkpointed(tmp_path, tiny_model_dir, shards, engine__timeout_seconds=20), 2)
    run.until(lambda: run.steps() >= 3)
    run.ranks[1].send_signal(signal.SIGSTOP)
    code = run.ranks[0].wait(90)
    run.kill()
    assert code == 70  # the watchdog's, not the collective's own
    assert " step " in run.console().split("CRITICAL")[-1]


@pytest.mark.parametrize("share_written", [None, 0.0, 0.25, 0.5, 0.8])
def test_a_full_disk_ends_the_run_and_leaves_the_earlier_checkpoint(
    share_written, tmp_path, undisturbed, small_disk, make_variant
):
    """Fill the disk before the free-space check, or inside any of the files that the ranks write.

    The check compares free bytes with an estimate, and a tiny model's files are larger than the estimate.
    """
    checkpoint = blocks(undisturbed["lora"] / f"checkpoints/step-{STEPS:08d}")
    adapter = load_file(undisturbed["lora"] / "export/adapter/adapter_model.safetensors")
    estimate = 16 * sum(tensor.numel() for tensor in adapter.values())
    assert checkpoint > estimate + 40_000
    room = estimate // 2 if share_written is None else estimate + int(share_written * (checkpoint - estimate))
    records = 28_000  # run.yaml, metrics and logs of one step
    disk = small_disk(checkpoint + room + records)
    run = Run(make_variant(tmp_path, "lora", output_dir=str(disk / "run")), 2)
    codes = run.wait()
    assert 2 in codes, run.console(0) + run.console(1)
    message = next(line for rank in (0, 1) for line in run.console(rank).splitlines() if line.startswith("error: "))
    assert "free some disk and start again, the run goes on from step-00000001" in message
    assert ("GiB are free" in message) == (share_written is None)
    left = disk / "run/checkpoints"
    assert [path.name for path in left.glob("step-*")] == ["step-00000001"]
    files = json.loads((left / "step-00000001/state.json").read_text())["files"]
    assert all((left / "step-00000001" / name).stat().st_size == about["bytes"] for name, about in files.items())
