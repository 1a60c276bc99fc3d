"""Invariants of `launch/slurm` on a real SLURM of two nodes: the losses of one process; a signal or a dead node costs
no human and no step that was checkpointed; a failure ends the job, and a finished job stays finished.
"""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from clusters import Reference, Slurm, losses
from nodes import Node, wait_until

pytestmark = pytest.mark.cluster
TRAIN = "launch/slurm/train.sbatch"
RANK = "-m anchor.train"


@pytest.fixture
def submit_training(slurm: Slurm, tmp_path: Path) -> Callable[..., str]:
    """``submit(recipe, output, **environment)`` submits a job of two nodes, one rank each; ``out`` gets its output."""

    def submit(recipe: Path, output: Path, **environment: str) -> str:
        options = ("--nodes=2", "--gpus-per-node=1", "--time=30", "-o", tmp_path / "out")
        return slurm.submit(*options, TRAIN, recipe, f"output_dir={output}", **environment)

    return submit


def reaches(step: int, out: Path) -> None:
    wait_until(lambda: out.exists() and f"step {step}/" in out.read_text(), 300, f"step {step} in {out}")


def gone(nodes: list[Node]) -> bool:
    return not any(node.pids(RANK) for node in nodes)


def test_two_nodes_give_the_losses_of_one_process_and_a_finished_job_stays_finished(
    slurm: Slurm, submit_training: Callable[..., str], reference: Reference, tmp_path: Path
) -> None:
    out, run = tmp_path / "out", tmp_path / "run"
    job = slurm.finished(submit_training(reference.recipe, run))
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "0"), out.read_text()
    assert "2 ranks on node[1-2], restart 0" in out.read_text()
    assert losses(run) == pytest.approx(reference.losses, rel=1e-5)
    again = slurm.finished(submit_training(reference.recipe, run))
    assert (again["JobState"], again["Restarts"]) == ("COMPLETED", "0"), out.read_text()
    assert out.read_text().count("step 40/40") == 1


def test_usr1_writes_a_checkpoint_requeues_and_resumes_with_the_same_losses(
    slurm: Slurm, submit_training: Callable[..., str], reference: Reference, tmp_path: Path
) -> None:
    out, run = tmp_path / "out", tmp_path / "run"
    job = submit_training(reference.recipe, run)
    reaches(3, out)
    slurm.nodes[0].run("scancel", "--signal=USR1", job)
    done = slurm.finished(job)
    assert (done["JobState"], done["Restarts"]) == ("COMPLETED", "1"), out.read_text()
    text = out.read_text()
    assert "stopped with a checkpoint, back into the queue" in text
    assert "restart 1 of at most 20" in text
    assert losses(run) == pytest.approx(reference.losses, rel=1e-5)
    steps = [line.split("step ")[1].split("/")[0] for line in text.splitlines() if ": step " in line]
    assert steps == [str(step) for step in range(1, 41)]  # none lost, none twice


def test_the_cap_on_restarts_ends_the_job_with_a_checkpoint(
    slurm: Slurm, submit_training: Callable[..., str], write_stage1: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    job = submit_training(write_stage1(total_steps=5000), tmp_path / "run", ANCHOR_MAX_RESTARTS="0")
    reaches(2, out)
    slurm.nodes[0].run("scancel", "--signal=USR1", job)
    done = slurm.finished(job)
    assert (done["JobState"], done["ExitCode"], done["Restarts"]) == ("FAILED", "85:0", "0"), out.read_text()
    assert "after 0 restarts, the most that ANCHOR_MAX_RESTARTS allows; submit it again" in out.read_text()
    assert list((tmp_path / "run/checkpoints").glob("step-*/state.json"))


def test_a_killed_rank_ends_the_job_and_scancel_leaves_nothing(
    slurm: Slurm, submit_training: Callable[..., str], write_stage1: Callable[..., Path], tmp_path: Path
) -> None:
    recipe, out = write_stage1(total_steps=5000), tmp_path / "out"
    job = submit_training(recipe, tmp_path / "killed")
    reaches(2, out)
    (rank,) = slurm.nodes[1].pids(RANK)
    start = time.monotonic()
    slurm.nodes[1].run("kill", "-KILL", rank)
    done = slurm.finished(job)
    assert time.monotonic() - start < 60
    assert (done["JobState"], done["Restarts"]) == ("FAILED", "0"), out.read_text()
    assert gone(slurm.nodes)

    out.unlink()
    job = submit_training(recipe, tmp_path / "cancelled")
    reaches(2, out)
    slurm.nodes[0].run("scancel", job)
    assert slurm.finished(job)["JobState"] == "CANCELLED"
    wait_until(lambda: gone(slurm.nodes), 20, "no process of the run")


def test_the_doctor_names_the_host_for_which_the_others_would_wait(slurm: Slurm, tmp_path: Path) -> None:
    first, second = slurm.nodes
    srun = ("srun", "--nodes=2", "--ntasks-per-node=1", "bash", "launch/slurm/rank.sh")
    doctor = (*srun, "python", "-m", "anchor.doctor", "--sizes=1")
    well = first.run(*doctor).stdout
    assert "node1" in well
    assert "node2" in well
    assert "collectives over 2 ranks" in well

    hosts = tmp_path / "hosts"
    hosts.write_text(slurm.hosts.read_text().replace(f"{second.address} node2", "127.0.1.1 node2"))
    second.mount(hosts, Path("/etc/hosts"))
    start = time.monotonic()
    try:
        ill = first.run(*doctor, check=False)
    finally:
        second.unmount(Path("/etc/hosts"))
    assert ill.returncode == 1
    assert "problem: the name node2 resolves to 127.0.1.1, which is what other hosts are told" in ill.stdout
    assert time.monotonic() - start < 110


def test_a_dead_node_requeues_the_job_which_resumes_from_its_checkpoint(
    slurm: Slurm,
    submit_training: Callable[..., str],
    write_stage1: Callable[..., Path],
    reference: Reference,
    tmp_path: Path,
) -> None:
    recipe, out, run = write_stage1(total_steps=40), tmp_path / "out", tmp_path / "run"
    recipe.write_text(recipe.read_text().replace("engine:\n", "engine:\n  checkpoint_every_steps: 4\n"))
    job = submit_training(recipe, run)
    reaches(5, out)
    second = slurm.nodes[1]
    second.off()
    # A node that is back before it was declared dead is not missed, and the job waits for its rank for ever.
    wait_until(lambda: "down" in slurm.states(), 120, "node2 to be declared dead")
    wait_until(lambda: slurm.job(job)["JobState"] == "PENDING", 60, "the job to be back in the queue")
    slurm.boot(second)
    done = slurm.finished(job)
    assert (done["JobState"], done["Restarts"]) == ("COMPLETED", "1"), out.read_text()
    assert "resumed at step " in out.read_text()
    assert losses(run) == pytest.approx(reference.losses, rel=1e-5)
