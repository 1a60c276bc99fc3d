"""Invariants: whatever a disk, an editor or an interrupted copy does to a run's folder, the next start names the damage
and resumes from what is intact, or ends with one line; it never prints a traceback."""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import blocks
from distributed import run_distributed
from test_train import train_ranks, write_recipe

from anchor import dist
from anchor.config.load import load_recipe
from anchor.config.train_recipe import TrainRecipe
from anchor.engine.checkpoint import checkpoint_step
from anchor.engine.console import print_summary
from anchor.engine.metrics import JsonLines, read_rows
from anchor.engine.plan import Plan, make_plan
from anchor.engine.provenance import provenance
from anchor.engine.run_folder import find_checkpoint, is_finished, prepare_folder
from anchor.errors import AnchorError, exit_on_user_error

ROOT = Path(__file__).parents[2]
ONE = dist.Ranks(0, 1, 0, torch.device("cpu"))
NEWEST, BEFORE = "step-00000004", "step-00000002"
STATE, METRICS, ABOUT = f"checkpoints/{NEWEST}/state.json", "metrics.jsonl", "export/anchor.json"
OPTIMIZER = f"checkpoints/{NEWEST}/engine/zero_pp_rank_0_mp_rank_00_optim_states.pt"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_dir, make_shards) -> Path:
    """Recipe of a finished run of 4 steps with 2 checkpoints."""
    shards = make_shards(pairs=16, pack_multiple=2, pack_tokens=1024, num_rows=32)
    changes = {"optim__total_steps": 4, "engine__checkpoint_every_steps": 2}
    recipe = write_recipe(tmp_path_factory.mktemp("damaged"), tiny_model_dir, shards, **changes)
    run_distributed(train_ranks, 1, recipe, True)
    return recipe


@pytest.fixture
def plan(tmp_path, finished) -> Plan:
    """Plan of the same run, over a copy of its folder."""
    shutil.copytree(finished.parent / "run", tmp_path / "run")
    recipe = load_recipe(finished, TrainRecipe, [f"output_dir={tmp_path}/run"])
    return make_plan(recipe, str(finished), 1)


def restart(plan: Plan) -> tuple[str, bool, int]:
    """Read the folder as a restart does; return the checkpoint used, whether all is done, and the rows of metrics."""
    folder, about = plan.recipe.output_dir, provenance(plan, ONE)
    state = {key: about[key] for key in ("recipe", "data_index_sha256", "num_ranks")} | {"zero_stage": 3}
    found = find_checkpoint(folder, ONE, state, resume=True)
    done = is_finished(folder, found, plan.recipe, about)
    prepare_folder(folder, about)
    first = 0 if found is None else checkpoint_step(found)
    for name in (METRICS, "held_out.jsonl"):
        JsonLines(folder / name, first).close()
    print_summary(folder)
    return ("" if found is None else found.name), done, len(read_rows(folder / METRICS))


def content(name: str, new: bytes | Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Replace a file's content."""

    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(new if isinstance(new, bytes) else new(path.read_bytes()))

    return damage


def value(name: str, key: str, new: object) -> Callable[[Path], None]:
    """Replace a value in a JSON file; None removes the key."""

    def change(raw: bytes) -> bytes:
        found = json.loads(raw)
        node = found
        *path, last = key.split("/")
        for part in path:
            node = node[part]
        del node[last]
        if new is not None:
            node[last] = new
        return json.dumps(found).encode()

    return content(name, change)


def folder_instead(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir(parents=True)

    return damage


def copied(name: str) -> Callable[[Path], None]:
    """Copy the newest checkpoint under another name."""
    return lambda folder: shutil.copytree(folder / "checkpoints" / NEWEST, folder / "checkpoints" / name) and None


def line(number: int, new: bytes) -> Callable[[Path], None]:
    """Replace a line of the metrics."""

    def change(raw: bytes) -> bytes:
        lines = raw.splitlines(keepends=True)
        return b"".join(new + b"\n" if at == number else one for at, one in enumerate(lines))

    return content(METRICS, change)


def flipped(raw: bytes) -> bytes:
    middle = len(raw) // 2
    return raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :]


DEEP = b"[" * 100_000
CHECKPOINTS = {
    "state that is a list": (content(STATE, b"[]"), "state.json cannot be read"),
    "state that is null": (content(STATE, b"null"), "state.json cannot be read"),
    "empty state": (content(STATE, b""), "state.json cannot be read"),
    "state of an empty object": (content(STATE, b"{}"), "state.json cannot be read: step is None"),
    "state that is not UTF-8": (content(STATE, b'{"step": "\xff"}'), "state.json cannot be read"),
    "state nested too deep": (content(STATE, DEEP), "state.json cannot be read"),
    "state with a number of 5,000 digits": (content(STATE, b"1" * 5000), "state.json cannot be read"),
    "state cut off": (content(STATE, lambda raw: raw[:300]), "state.json cannot be read"),
    "state of zeros": (content(STATE, lambda raw: bytes(len(raw))), "state.json cannot be read"),
    "state that is a folder": (folder_instead(STATE), "state.json cannot be read: it is no file"),
    "state without files": (value(STATE, "files", None), "state.json cannot be read: files is None"),
    "state without ranks": (value(STATE, "num_ranks", None), "state.json cannot be read: num_ranks is None"),
    "state without recipe": (value(STATE, "recipe", None), "state.json cannot be read: recipe is None"),
    "step that is a text": (value(STATE, "step", "4"), "state.json cannot be read: step is 4"),
    "altered recipe": (value(STATE, "recipe/optim/lr", 3e-2), "state.json checksum differs"),
    "altered state": (content(STATE, lambda raw: raw.replace(b'"seed": 0', b'"seed": 1')), "checksum differs"),
    "state of another step": (
        lambda folder: shutil.copy(folder / f"checkpoints/{BEFORE}/state.json", folder / STATE),
        "state.json is of step 2",
    ),
    "share that is gone": (lambda folder: (folder / OPTIMIZER).unlink(), "optim_states.pt is missing"),
    "share that is a folder": (folder_instead(OPTIMIZER), "optim_states.pt is missing"),
    "share of one other bit": (content(OPTIMIZER, flipped), "optim_states.pt: checksum differs"),
    "share cut off": (content(OPTIMIZER, lambda raw: raw[:100]), "optim_states.pt has 100 bytes instead of"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(name, plan, caplog):
    damage, named = CHECKPOINTS[name]
    damage(plan.recipe.output_dir)
    with caplog.at_level(logging.ERROR):
        assert restart(plan) == (BEFORE, False, 2)
    assert f"{NEWEST} is damaged (" in caplog.text
    assert named in caplog.text


OTHERS = {
    "copy of a checkpoint": (copied(f"{NEWEST}.bak"), True, 4, ""),
    "checkpoint of a short name": (copied("step-9"), True, 4, ""),
    "checkpoint of no number": (copied("step-last"), True, 4, ""),
    "file among the checkpoints": (content("checkpoints/step-00000009", b""), True, 4, ""),
    "file of an interrupted writer": (content("checkpoints/.writing-step-00000006", b""), True, 4, ""),
    "latest that is gone": (lambda folder: (folder / "checkpoints/latest").unlink(), True, 4, ""),
    "metrics with a byte that is not UTF-8": (
        line(1, b'{"step": 2, "source": "\xff"}'),
        True,
        3,
        "metrics.jsonl:2: the",
    ),
    "metrics with a line of zeros": (
        line(1, bytes(200)),
        True,
        3,
        "metrics.jsonl:2: the line cannot be read: not used",
    ),
    "metrics with a list": (line(0, b"[1, 2]"), True, 3, "metrics.jsonl:1: the line cannot be read: it holds [1, 2]"),
    "metrics nested too deep": (line(0, DEEP), True, 3, "metrics.jsonl:1: the line cannot be read: not used"),
    "metrics without a step": (line(0, b'{"source": "x"}'), True, 3, ""),
    "metrics without numbers": (line(0, b'{"step": 1, "source": 3}'), True, 4, ""),
    "metrics that are gone": (lambda folder: (folder / METRICS).unlink(), True, 0, ""),
    "held-out metrics of zeros": (content("held_out.jsonl", bytes(100)), True, 4, ""),
    "export's record cut off": (content(ABOUT, lambda raw: raw[:100]), False, 4, "anchor.json is damaged (cannot be"),
    "export's record that is a list": (content(ABOUT, b"[]"), False, 4, "anchor.json is damaged (cannot be read: it"),
    "export's record that is not UTF-8": (content(ABOUT, b"\xff\xfe\xfd"), False, 4, "anchor.json is damaged (cannot"),
    "export's record without a recipe": (
        value(ABOUT, "recipe", None),
        False,
        4,
        "anchor.json is damaged (it holds no recipe)",
    ),
    "export's record of a wrong recipe": (value(ABOUT, "recipe", 3), False, 4, "anchor.json is damaged (it holds"),
    "export's record of an unknown key": (value(ABOUT, "recipe/optim/lr", "x"), False, 4, "anchor.json is damaged ("),
    "run.yaml of zeros": (content("run.yaml", bytes(50)), True, 4, ""),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_restart_goes_on_whatever_else_is_damaged(name, plan, caplog):
    damage, done, rows, named = OTHERS[name]
    damage(plan.recipe.output_dir)
    with caplog.at_level(logging.WARNING):
        assert restart(plan) == (NEWEST, done, rows)
    assert named in caplog.text
    assert bool(caplog.text) == bool(named)


def test_with_all_checkpoints_damaged_one_line_says_so(plan):
    for state in plan.recipe.output_dir.glob("checkpoints/*/state.json"):
        state.write_text("[]")
    with pytest.raises(AnchorError, match="all 2 checkpoints are damaged; restore one, or delete the folder"):
        restart(plan)


def test_a_file_where_the_checkpoints_belong_is_one_line_before_training(plan, capsys):
    shutil.rmtree(plan.recipe.output_dir / "checkpoints")
    content("checkpoints", b"")(plan.recipe.output_dir)
    with pytest.raises(SystemExit, match="2"), exit_on_user_error():
        restart(plan)
    assert "/run/checkpoints: File exists; something of this name is in the way; move it" in capsys.readouterr().err


@pytest.mark.slow
def test_a_finished_run_of_which_much_is_damaged_is_finished_again(tmp_path, finished, plan, caplog):
    """Restart for real: first only export again, then repeat the last steps too."""
    folder = plan.recipe.output_dir
    (folder / "export/mteb").mkdir()
    for name in ("export's record cut off", "copy of a checkpoint", "metrics with a byte that is not UTF-8"):
        OTHERS[name][0](folder)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(finished.read_text().replace(str(finished.parent / "run"), str(folder)))
    run_distributed(train_ranks, 1, recipe, True)
    assert json.loads((folder / ABOUT).read_text())["recipe"]["seed"] == 0
    assert (folder / "mteb-step-unknown").is_dir()
    content(STATE, b"[]")(folder)
    run_distributed(train_ranks, 1, recipe, True)
    weights = [(one / "export/model.safetensors").read_bytes() for one in (folder, finished.parent / "run")]
    assert weights[0] == weights[1]
    assert json.loads((folder / STATE).read_text())["step"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.05, 0.5])
def test_a_full_disk_while_exporting_is_one_line_and_the_same_command_goes_on(share, finished, small_disk):
    """Regression: shutil and safetensors raise errors of their own, which became tracebacks."""
    run = finished.parent / "run"
    exported, others = blocks(run / "export"), blocks(run) - blocks(run / "export")
    disk = small_disk(others + int(share * exported) + 16_384)
    shutil.copytree(run, disk / "run", ignore=shutil.ignore_patterns("export"))
    command = [sys.executable, "-m", "anchor.train", str(finished), f"output_dir={disk}/run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith("error: cannot export: ")
    assert said.endswith(
        "No space left on device; free some disk and start again; the same command goes on with the export"
    )
    assert not list((disk / "run").glob("export*"))
    small_disk(others + 4 * exported)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (disk / "run/export/model.safetensors").read_bytes() == (run / "export/model.safetensors").read_bytes()
