"""Invariants: what is gathered on one machine installs on another without a network, the same commit; an altered or
unfinished copy is refused by name.
"""

import os
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


def test_a_wrong_call_is_one_line() -> None:
    done = run("bash", ROOT / "launch/airgap/gather.sh", "--modle", "x")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "unknown option --modle" in done.stderr
