"""Invariants: what is gathered on one machine installs on another without a network, the same commit; an altered or
unfinished copy is refused by name.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([*map(str, words)], capture_output=True, text=True, check=False, env=env, timeout=120)


@pytest.fixture
def gathered(tmp_path: Path, tiny_model_dir: Path) -> Path:
    if not (ROOT / ".git").exists():
        pytest.skip("gathering needs a git checkout")
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs/squad.jsonl").write_text('{"query": "q", "positive": "p", "negative": "n"}\n')
    folder = tmp_path / "disk"
    sources = ("--model", tiny_model_dir, "--data", tmp_path / "pairs")
    done = run("bash", ROOT / "launch/airgap/gather.sh", "--no-wheels", *sources, folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_gathered_folder_installs_the_same_commit_with_models_and_data(gathered: Path, tmp_path: Path) -> None:
    target = tmp_path / "checkout"
    done = run(
        "bash", gathered / "install.sh", target, https_proxy="http://127.0.0.1:9", http_proxy="http://127.0.0.1:9"
    )
    assert done.returncode == 0, done.stderr
    heads = [run("git", "-C", folder, "rev-parse", "HEAD").stdout for folder in (ROOT, target)]
    assert heads[0] == heads[1] != ""
    assert (target / "data/pairs/squad.jsonl").is_file()
    assert len(list(target.glob("models/*/config.json"))) == 1
    assert run("bash", gathered / "install.sh", target).returncode == 0  # again: nothing to do


def test_an_altered_or_unfinished_folder_is_refused_by_name(gathered: Path, tmp_path: Path) -> None:
    (gathered / "data/pairs/squad.jsonl").write_text("altered")
    done = run("bash", gathered / "install.sh", tmp_path / "checkout")
    assert (done.returncode, done.stderr) == (
        2,
        f"error: install: {gathered}: altered or missing: ./data/pairs/squad.jsonl; copy again\n",
    )
    (gathered / "SHA256SUMS").unlink()
    done = run("bash", gathered / "install.sh", tmp_path / "checkout")
    assert done.returncode == 2
    assert "no SHA256SUMS; run launch/airgap/gather.sh to its end" in done.stderr
    assert not (tmp_path / "checkout").exists()


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("airgap/gather.sh", ["disk"], "error: gather: no .venv here; run launch/setup.sh first"),
        (
            "slurm/pipeline.sh",
            ["launch/recipes/quickstart", "--tasks", "SciFact"],
            "error: pipeline: no .venv here; run launch/setup.sh first; see launch/slurm/pipeline.sh --help",
        ),
    ],
)
def test_a_checkout_that_was_not_set_up_is_one_line(
    tmp_path: Path, script: str, arguments: list[str], message: str
) -> None:
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    done = run("bash", tmp_path / "launch" / script, *arguments)
    assert (done.returncode, done.stderr) == (2, f"{message}\n")
    assert not list(tmp_path.rglob("disk"))


def test_a_wrong_call_is_one_line() -> None:
    done = run("bash", ROOT / "launch/airgap/gather.sh", "--modle", "x")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "unknown option --modle" in done.stderr


def test_linked_files_are_gathered_as_files_and_two_of_one_name_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("gathering needs a git checkout")
    linked = tmp_path / "a/export"
    linked.mkdir(parents=True)
    for file in tiny_model_dir.iterdir():
        (linked / file.name).symlink_to(file)
    gather = ("bash", ROOT / "launch/airgap/gather.sh", "--no-wheels", "--model", linked)
    assert run(*gather, tmp_path / "my disk").returncode == 0
    there = tmp_path / "my disk/models/export/config.json"
    assert there.is_file()
    assert not there.is_symlink()
    assert "./models/export/config.json" in (tmp_path / "my disk/SHA256SUMS").read_text()
    done = run(*gather, "--model", tmp_path / "b/export", tmp_path / "second")
    assert (done.returncode, (tmp_path / "second").exists()) == (2, False)
    assert done.stderr == "error: gather: two models are called 'export'; link one under another name\n"


@pytest.mark.slow
def test_each_of_several_benchmarks_has_a_folder_of_its_own(tmp_path: Path) -> None:
    # In one folder the second was refused, after hours, where it wants another revision of a data set.
    if not (ROOT / ".git").exists():
        pytest.skip("gathering needs a git checkout")
    (tmp_path / "empty").mkdir()
    gather = ("bash", ROOT / "launch/airgap/gather.sh", "--no-wheels", "--source", tmp_path / "empty")
    for more, to in (((), "mteb"), (("--benchmark", "MTEB(eng, v1)"), "MTEB-eng-v2")):
        done = run(*gather, "--benchmark", "MTEB(eng, v2)", *more, tmp_path / "disk")
        assert f"gather: MTEB data of MTEB(eng, v2) into data/{to}\n" in done.stdout
        assert done.returncode == 2  # the source holds nothing
        assert done.stderr.count("Traceback") == 0


def test_a_newer_bundle_brings_an_installed_checkout_to_its_commit(gathered: Path, tmp_path: Path) -> None:
    target = tmp_path / "checkout"
    assert run("bash", gathered / "install.sh", target).returncode == 0
    newer = tmp_path / "newer"
    run("git", "clone", "--quiet", target, newer)
    git = ("git", "-C", newer, "-c", "user.name=n", "-c", "user.email=e")
    run(*git, "commit", "--quiet", "--allow-empty", "-m", "newer")
    run(*git, "bundle", "create", "--quiet", gathered / "code.bundle", "HEAD")
    sums = run("sha256sum", *sorted(p for p in gathered.rglob("*") if p.is_file() and p.name != "SHA256SUMS")).stdout
    (gathered / "SHA256SUMS").write_text(sums)
    done = run("bash", gathered / "install.sh", target)
    assert done.returncode == 0, done.stderr
    heads = [run("git", "-C", folder, "rev-parse", "HEAD").stdout for folder in (newer, target)]
    assert heads[0] == heads[1] != run("git", "-C", ROOT, "rev-parse", "HEAD").stdout


@pytest.mark.parametrize(
    ("script", "option", "message"),
    [
        ("airgap/gather.sh", "--model", "error: gather: --model needs a value; see launch/airgap/gather.sh --help"),
        ("slurm/pipeline.sh", "--parts", "error: pipeline: --parts needs a value; see launch/slurm/pipeline.sh --help"),
        ("multinode.sh", "--hostfile", "error: multinode: --hostfile needs a value"),
        ("onenode.sh", "--ranks", "error: onenode: --ranks needs a number, got nothing"),
    ],
)
def test_an_option_without_its_value_is_one_line(script: str, option: str, message: str) -> None:
    done = run("bash", ROOT / "launch" / script, option)
    assert (done.returncode, done.stderr) == (2, f"{message}\n")


@pytest.mark.parametrize(
    ("variables", "tasks"),
    [
        ({}, "--ntasks=2 --ntasks-per-node=1"),
        ({"SLURM_GPUS_PER_NODE": "h100:8"}, "--ntasks=16 --ntasks-per-node=8"),
        ({"SLURM_GPUS_PER_NODE": "0"}, "--ntasks=2 --ntasks-per-node=1"),
        ({"SLURM_GPUS_ON_NODE": "8"}, "--ntasks=16 --ntasks-per-node=8"),  # --gres=gpu:8
    ],
)
def test_a_job_starts_one_rank_per_gpu_however_they_were_asked_for(variables: dict[str, str], tasks: str) -> None:
    """The arithmetic of the job scripts; the real SLURM is in tests/cluster."""
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a,b"}
    job |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "16"}
    source = (ROOT / "launch/slurm/job.sh").read_text()
    functions = source[source.index("run_ranks()") : source.index("# run_or_requeue")]
    script = f'set -euo pipefail\nrestarts=0 max_restarts=1\nsrun() {{ echo "$@"; }}\n{functions}\nrun_ranks program'
    done = run("bash", "-c", script, **job, **variables)
    assert done.returncode == 0, done.stderr
    assert tasks in done.stdout
