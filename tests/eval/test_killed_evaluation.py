"""Invariants: `eval embed` and `eval mteb` ended by SIGKILL go on where their files say, and embed nothing that is
stored; started by DeepSpeed's launcher, two ranks write what one process writes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import english_pairs, write_jsonl
from retrieval import write_retrieval

from anchor.encoding.encoder import Encoder
from eval.embedding.embed import Options, embed
from eval.embedding.texts import Source
from eval.embedding.vectors import read_folder
from eval.scoring.benchmark import run_tasks
from eval.scoring.prompts import load_prompts
from eval.scoring.tasks import local_retrieval_task

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 240.0
# The command line itself, with blocks so small that there are many.
PROGRAM = "import sys, eval.scoring.cache, eval.__main__ as e; eval.scoring.cache.BLOCK_TEXTS = 4; e.main(sys.argv[1:])"
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def start(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, text=True, **pipes)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, output
    return output


def kill_when(process: subprocess.Popen[str], folder: Path, pattern: str, number: int) -> list[Path]:
    """Send SIGKILL once the folder holds so many files; return those files as they are afterwards."""
    end = time.monotonic() + PATIENCE_SECONDS
    while len(list(folder.rglob(pattern))) < number:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    return sorted(folder.rglob(pattern))


def write_texts(folder: Path, number: int) -> Path:
    rows = [{"id": f"n{i}", "text": row["positive"]} for i, row in enumerate(english_pairs(number))]
    return write_jsonl(folder / "texts.jsonl", rows)


def test_embed_killed_at_several_moments_embeds_no_part_twice(export_dir, tmp_path):
    texts = write_texts(tmp_path, 600)

    def command(name: str) -> list[str]:
        output = str(tmp_path / name)
        return ["embed", str(export_dir), "--input", str(texts), "--output", output, "--shard-texts", "4"]

    embed(Encoder(export_dir, dtype="fp32"), Source(texts), tmp_path / "whole", Options(shard_texts=4))
    for number in (5, 40):
        parts = kill_when(start(*command("killed")), tmp_path / "killed/.parts", "part-*.safetensors", number)
        assert number <= len(parts) < 150
        assert not (tmp_path / "killed/manifest.json").exists()
    output = finish(start(*command("killed")))
    assert f"rank 0: {150 - len(parts)} parts embedded, {len(parts)} kept of an earlier run" in output
    whole, killed = (read_folder(tmp_path / name) for name in ("whole", "killed"))
    assert killed.ids == whole.ids
    np.testing.assert_array_equal(killed.embeddings, whole.embeddings)
    assert len(np.unique(whole.embeddings.round(4), axis=0)) > 500


@pytest.mark.filterwarnings("ignore")  # other libraries' loading of data sets
def test_mteb_killed_embeds_no_stored_text_twice_and_scores_alike(export_dir, tmp_path):
    task = write_retrieval(tmp_path / "small", pairs=300)
    command = ("mteb", str(export_dir), "--retrieval", str(task), "--output")
    embedded = re.compile(r"(\d+) texts to embed, (\d+) known")

    def counted(output: str) -> tuple[int, int]:
        found = embedded.findall(output)
        return sum(int(new) for new, _ in found), sum(int(known) for _, known in found)

    encoder, prompts = Encoder(export_dir, dtype="fp32"), load_prompts("anchor")
    run_tasks(encoder, [local_retrieval_task(task)], tmp_path / "whole", prompts)
    blocks = kill_when(start(*command, str(tmp_path / "killed")), tmp_path / "killed", "block-*.safetensors", 20)
    assert 20 <= len(blocks) < 78
    new, known = counted(finish(start(*command, str(tmp_path / "killed"))))
    # Every block holds four texts; the last of the queries' three blocks holds two.
    assert known == 4 * len(blocks) - 2
    assert new == 310 - known  # 300 documents and 10 queries
    killed, whole = (json.loads(file.read_text())["scores"] for file in sorted(tmp_path.rglob("Local-small.json")))
    assert killed == whole
    # A random model finds little among the first ten.
    assert 0 < whole["test"][0]["ndcg_at_1000"] < 1
    assert not list((tmp_path / "killed").rglob("block-*.safetensors"))


def test_two_ranks_of_deepspeeds_launcher_write_what_one_process_writes(export_dir, tmp_path):
    texts = write_texts(tmp_path, 60)
    options = Options(shard_texts=8, prompt="query")
    embed(Encoder(export_dir, dtype="fp32"), Source(texts), tmp_path / "one", options)
    command = ["embed", str(export_dir), "--input", str(texts), "--shard-texts", "8", "--prompt", "query"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", "--master_port", port]
    done = subprocess.run(
        [*launcher, "--module", "eval", *command, "--output", str(tmp_path / "two")],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rank 0: 4 parts embedded, 0 kept of an earlier run" in done.stdout + done.stderr  # of eight
    one, two = (read_folder(tmp_path / name) for name in ("one", "two"))
    assert (one.manifest["ranks"], two.manifest["ranks"]) == (1, 2)
    assert two.ids == one.ids == [f"n{i}" for i in range(60)]
    np.testing.assert_array_equal(two.embeddings, one.embeddings)
    np.testing.assert_array_equal(two.norms, one.norms)
