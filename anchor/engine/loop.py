"""Training run from a plan to the exported folder.

1. Find the newest intact checkpoint of this run, or start from scratch.
2. Load the model, wrap it in objective and engine, and load the checkpoint.
3. Take steps: read, train, write metrics. Run held-out evaluation and write checkpoints every N steps and at the end.
4. Export.

A signal ends the run with a checkpoint, after the step during which it arrives (:mod:`anchor.engine.stop`).
"""

import json
import logging
import os
import time
from io import TextIOBase
from pathlib import Path
from typing import Any

from anchor import dist
from anchor.data.batches import batch_stream
from anchor.data.shards import Batch
from anchor.engine.build import load_engine
from anchor.engine.checkpoint import checkpoint_step, load_checkpoint, read_state, save_checkpoint
from anchor.engine.console import StepDisplay, print_summary
from anchor.engine.deepspeed import Engine
from anchor.engine.metrics import JsonLines, Row, Sink, memory_metrics, open_sinks
from anchor.engine.optim import learning_rate
from anchor.engine.plan import Plan
from anchor.engine.provenance import provenance
from anchor.engine.run_folder import check_shared, find_checkpoint, is_finished, prepare_folder
from anchor.engine.step import NotFiniteError, StepResult, objective_of, train_step
from anchor.engine.stop import StopRequest, Watchdog
from anchor.estimate.utilisation import Utilisation
from anchor.model_folder.export import export_model

log = logging.getLogger(__name__)


def train(
    plan: Plan, ranks: dist.Ranks, stop: StopRequest, *, resume: bool = True, stacks: TextIOBase | None = None
) -> bool:
    """Train and export; every rank calls it.

    Args:
        plan: result of :func:`anchor.engine.plan.make_plan`.
        ranks: this process among all ranks.
        stop: records whether a signal came.
        resume: True to resume from the newest intact checkpoint, or start if there is none; False to refuse a folder
            that holds a run.
        stacks: where a stuck process writes the stacks of all its threads; standard error when None.

    Returns:
        True if the run is finished; False if a signal stopped it, with a checkpoint.

    Raises:
        AnchorError: the output folder is another run's, the model cannot be loaded, the loss is not finite, or the disk
            is full.
    """
    recipe, folder = plan.recipe, plan.recipe.output_dir
    about = dist.broadcast_object(provenance(plan, ranks))
    zero_stage = plan.ds_config["zero_optimization"].get("stage", 0)
    state = {key: about[key] for key in ("recipe", "data_index_sha256", "num_ranks")} | {"zero_stage": zero_stage}
    # 1.
    found = find_checkpoint(folder, ranks, state, resume=resume)
    if resume and is_finished(folder, found, recipe, about):
        log.info("%s: finished already; nothing to do", folder)
        return True
    if dist.is_first_rank():
        prepare_folder(folder, about)
    dist.barrier()
    check_shared(folder)
    # 2.
    with Watchdog(float(recipe.engine.timeout_seconds), stop, stacks).watching() as watchdog:
        moved = found is not None and read_state(found)["num_ranks"] != ranks.world_size
        engine = load_engine(plan, ranks, universal=moved and zero_stage > 0)
        first = 0
        if found is not None:
            load_checkpoint(engine, found)
            first = checkpoint_step(found)
            log.info("resumed at step %d from %s", first, found)
        # 3.
        run = _Run(plan, engine, folder, first, state, about, watchdog)
        if not run.steps(stop):
            return False
        # 4.
        watchdog.begin("export")
        export_model(
            objective_of(engine),
            engine.gathered,
            folder / "export",
            recipe,
            plan.reader.index,
            recipe.data.shards,
            about,
        )
        log.info("exported %s", folder / "export")
    if dist.is_first_rank():
        print_summary(folder)
    return True


class _Run:
    """Steps of a run, with metrics, held-out evaluation and checkpoints on the way.

    Args:
        plan, engine, folder: what to train, with what, and where to write.
        first: steps already taken.
        state: identifies the run in its checkpoints.
        about: provenance, for the loggers.
        watchdog: is told what the run is doing.
    """

    def __init__(
        self,
        plan: Plan,
        engine: Engine,
        folder: Path,
        first: int,
        state: dict[str, Any],
        about: dict[str, Any],
        watchdog: Watchdog,
    ) -> None:
        self.plan, self.engine, self.folder, self.first = plan, engine, folder, first
        self.state, self.watchdog = state, watchdog
        self.total, self.saved = plan.recipe.optim.total_steps, first
        self.sinks: list[Sink] = []
        self.held_out_sinks: list[Sink] = []
        self.display: StepDisplay | None = None
        self.utilisation: Utilisation | None = None
        if dist.is_first_rank():
            self.sinks = open_sinks(plan.recipe.telemetry, folder, first, about)
            if plan.held_out is not None:
                # Every start without a checkpoint evaluates step 0.
                self.held_out_sinks = [JsonLines(folder / "held_out.jsonl", first or -1), *self.sinks[1:]]
            self.display = StepDisplay(first, self.total, plan.recipe.engine.log_every_steps)
            zero = plan.ds_config["zero_optimization"]
            self.utilisation = Utilisation(objective_of(engine), plan.recipe, plan.reader.index, zero, engine.ranks)

    def steps(self, stop: StopRequest) -> bool:
        """Train to the end; return False if a signal stopped the run, after a checkpoint."""
        try:
            if not self._all_ranks_go_on(stop):
                log.warning("stopped by a signal before step %d; start the same command again to go on", self.first + 1)
                return False
            finished = self._steps(stop)
            if finished and self.saved < self.total:
                self._checkpoint(self.total)
            return finished
        finally:
            if self.display is not None:
                self.display.close()
            for sink in {id(sink): sink for sink in (*self.sinks, *self.held_out_sinks)}.values():
                sink.close()

    def _all_ranks_go_on(self, stop: StopRequest) -> bool:
        return not any(dist.gather_objects(stop.requested))

    def _steps(self, stop: StopRequest) -> bool:
        recipe, every = self.plan.recipe, self.plan.recipe.engine.checkpoint_every_steps
        if self.first == 0:
            self._evaluate(0)
        end = time.perf_counter()
        for step, batch in batch_stream(self.plan.reader, recipe.seed, self.first, self.total):
            self.watchdog.begin(f"step {step + 1}", tokens=sum(pack.num_tokens for pack in batch.packs))
            start = time.perf_counter()
            try:
                lr = learning_rate(step, recipe.optim)
                result = train_step(
                    self.engine, batch, step=step, seed=recipe.seed, lr=lr, stop_requested=lambda: stop.requested
                )
            except NotFiniteError as error:
                self._write_report(error, step)
                raise
            self._write(step + 1, batch, result, start, end)
            evaluated = self._evaluate(step + 1)
            saved = every is not None and (step + 1) % every == 0
            if saved:
                self._checkpoint(step + 1)
            # Both can take long; a signal during them need not wait for another step.
            stopping = result.stop or ((evaluated or saved) and not self._all_ranks_go_on(stop))
            if stopping and step + 1 < self.total:
                if self.saved < step + 1:
                    self._checkpoint(step + 1)
                log.warning("stopped by a signal after step %d; start the same command again to go on", step + 1)
                return False
            end = time.perf_counter()
        self.watchdog.end()
        return True

    def _write(self, step: int, batch: Batch, result: StepResult, start: float, end: float) -> None:
        if not dist.is_first_rank():
            return
        seconds = time.perf_counter() - start
        row: Row = {
            "step": step,
            "source": batch.source,
            **result.metrics,
            "data/pairs": batch.num_pairs,
            "data/tokens": result.num_tokens,
            "speed/pairs_per_second": batch.num_pairs / seconds,
            "speed/tokens_per_second": result.num_tokens / seconds,
            "time/step_seconds": seconds,
            "time/data_wait_seconds": start - end,
            **memory_metrics(),
        }
        used = self.utilisation.fraction(batch, seconds) if self.utilisation is not None else None
        if used is not None:
            row["speed/mfu_fraction"] = used
        for sink in self.sinks:
            sink.write(row)
        if self.display is not None:
            self.display.step(row)

    def _evaluate(self, step: int) -> bool:
        """Compute held-out loss and retrieval if they are due at this step; return whether they were."""
        held_out, section = self.plan.held_out, self.plan.recipe.evaluation
        if held_out is None or section is None or (step % section.every_steps and step != self.total):
            return False
        self.watchdog.begin(f"held-out evaluation after step {step}")
        metrics = held_out(self.engine)
        for sink in self.held_out_sinks:
            sink.write({"step": step, **metrics})
        log.info(
            "held out after step %d: loss %.4f nats, nDCG@10 x 100 %.2f",
            step,
            metrics["held_out/loss_total_nats"],
            100 * metrics["held_out/ndcg_at_10"],
        )
        return True

    def _checkpoint(self, step: int) -> None:
        self.watchdog.begin(f"checkpoint of step {step}")
        section = self.plan.recipe.engine
        save_checkpoint(
            self.engine,
            self.folder / "checkpoints",
            {"step": step, **self.state},
            keep=section.keep_checkpoints,
            keep_every=section.keep_every_steps,
        )
        self.saved = step

    def _write_report(self, error: NotFiniteError, step: int) -> None:
        if dist.is_first_rank():
            path = self.folder / f"not-finite-step-{step:08d}.json"
            with path.open("w", encoding="utf-8") as file:
                file.write(json.dumps(error.report, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
