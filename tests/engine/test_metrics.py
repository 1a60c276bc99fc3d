"""Invariants: after a resume no step is in metrics.jsonl twice, and a half line of a killed run is no error; loggers
that were asked for write what the file has, or stop the run at its start."""

import json
import subprocess
import sys

import pytest

from anchor.config.train_recipe import TelemetrySection
from anchor.engine.metrics import JsonLines, open_sinks, read_rows
from anchor.errors import ConfigError

ROW = {"source": "squad", "loss/total_nats": 2.5, "optim/lr": 1e-3}


def test_rows_after_the_step_resumed_at_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, **ROW}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "sou')
    sink = JsonLines(path, 2)
    sink.write({"step": 3, **ROW})
    sink.close()
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]


def test_tensorboard_gets_every_value_and_the_loss_by_source(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for sink in open_sinks(TelemetrySection(loggers=("tensorboard",)), tmp_path, 0, {}):
        for step in (1, 2):
            sink.write({"step": step, **ROW, "loss/total_nats": 3.0 - step})
        sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"loss/total_nats", "loss_by_source/squad", "optim/lr"} <= set(events.Tags()["scalars"])
    assert [(e.step, e.value) for e in events.Scalars("loss_by_source/squad")] == [(1, 2.0), (2, 1.0)]
    assert [row["loss/total_nats"] for row in read_rows(tmp_path / "metrics.jsonl")] == [2.0, 1.0]


def test_weights_and_biases_writes_offline_and_goes_on_under_one_id(tmp_path):
    """Run in a separate process: wandb starts a service and leaves threads behind."""
    program = (
        "import sys; from pathlib import Path\n"
        "from anchor.config.train_recipe import TelemetrySection\n"
        "from anchor.engine.metrics import open_sinks\n"
        "section = TelemetrySection(loggers=('wandb',), wandb_project='p', wandb_mode='offline')\n"
        "for sink in open_sinks(section, Path(sys.argv[1]), 0, {'seed': 1}):\n"
        "    sink.write({'step': 1, 'source': 'squad', 'loss/total_nats': 2.0})\n"
        "    sink.close()\n"
    )
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    identity = (tmp_path / "wandb-id").read_text()
    runs = sorted((tmp_path / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
    assert runs
    assert all(run.stat().st_size > 100 for run in runs)


@pytest.mark.parametrize(
    ("section", "module"),
    [
        (TelemetrySection(loggers=("tensorboard",)), "tensorboard"),
        (TelemetrySection(loggers=("wandb",), wandb_project="p"), "wandb"),
    ],
)
def test_a_logger_that_is_not_installed_stops_the_run_at_its_start(section, module, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("torch.utils.tensorboard", module))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"telemetry.loggers: {module} cannot start \(.*; install it"):
        open_sinks(section, tmp_path, 0, {})


def test_a_service_that_refuses_stops_the_run_at_its_start(tmp_path):
    """The refusal is real: there is no network and no login here."""
    program = (
        "import sys; from pathlib import Path\n"
        "from anchor.config.train_recipe import TelemetrySection\n"
        "from anchor.engine.metrics import open_sinks\n"
        "from anchor.errors import exit_on_user_error\n"
        "with exit_on_user_error():\n"
        "    open_sinks(TelemetrySection(loggers=('wandb',), wandb_project='p'), Path(sys.argv[1]), 0, {})\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "error: telemetry.loggers: wandb cannot start" in done.stderr


def test_a_project_without_its_logger_is_refused():
    with pytest.raises(ValueError, match="loggers and wandb_project disagree"):
        TelemetrySection(wandb_project="p")
