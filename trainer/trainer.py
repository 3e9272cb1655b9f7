"""Training on one rank, from top to bottom: batch, loss, optimizer step, log, validation, checkpoint."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

import data
from trainer import TrainerError
from trainer.checkpoint import CheckpointError, Checkpoints
from trainer.config import RunConfig
from trainer.parallel import (
    World,
    check_same_on_all_ranks,
    gather_objects,
    max_over_ranks,
    mean_over_ranks,
    run_on_main,
)
from trainer.prefetch import Prefetcher, summary
from trainer.run_folder import RunFolder
from trainer.skipped_steps import SkippedSteps
from trainer.start_plan import StartPlan, open_folder, plan_batch, random_state, restore, seed_everything
from trainer.tasks import make_task
from trainer.tasks.base import Step
from trainer.telemetry import describe, open_telemetry, scanning
from trainer.throughput import Throughput
from trainer.watchdog import LossSpikes, Stopped, StopSignal, Watchdog


class Due(NamedTuple):
    """What is to be done after a step. last: training ends."""

    log: bool
    validate: bool
    save: bool
    last: bool


class Trainer:
    """Trains one run on one rank: ``setup``, ``train``, and ``close`` whatever happens in between."""

    def __init__(
        self, config: RunConfig, world: World, plan: StartPlan, tokens: data.TokenSpec | None, folder: RunFolder
    ):
        self.config, self.world, self.plan, self.tokens, self.folder = config, world, plan, tokens, folder
        self.run, self.step, self.save_pending = Path(config.run), plan.step, False
        self.resources = ExitStack()

    def setup(self) -> None:
        """Builds the models, opens the data and loads the weights. Nothing is written until all of it has succeeded."""
        config, world, plan = self.config, self.world, self.plan
        micro_batch_size, micro_batches = plan_batch(config, world)
        with scanning("asking for tars") as progress:
            run_on_main(world, lambda: data.check_remote_data(config.data, plan.state["data"], progress))
        self.task = task = make_task(config, world, micro_batch_size, micro_batches)
        task.check()
        self.init_from = None if plan.checkpoint else task.load_initial_weights()
        with scanning("reading the sizes of samples") as progress:
            stream = data.train_batches(
                config.data,
                global_batch_size=config.trainer.global_batch_size,
                micro_batch_size=micro_batch_size,
                rank=world.rank,
                world_size=world.size,
                seed=config.seed,
                state=plan.state["data"],
                tokens=self.tokens,
                progress=progress,
            )
        self.resources.callback(stream.close)
        check_same_on_all_ranks("the training data", stream.seen())
        self.plan = plan = plan.with_changed_tars(run_on_main(world, stream.changed_tars))
        seed_everything(config.seed, plan.step, world)
        if plan.checkpoint:
            restore(plan, task.state, world)
        self.batches = Prefetcher(stream, micro_batches, world, task.check_batch)
        self.batches.read_ahead()
        self.batches.stop_together("nothing was trained")
        if not plan.checkpoint:
            task.init_from_data(map(task.inputs, self.batches.ready))
        run_on_main(world, lambda: open_folder(self.folder, config, plan, self.init_from))
        self._open_logs()

    def _open_logs(self) -> None:
        config, settings, world, run = self.config, self.config.trainer, self.world, self.run
        self.telemetry = open_telemetry(run, self.step, settings.max_steps, world)
        start = [str(self.init_from)] if self.init_from else []
        data_line = self.batches.stream.describe(settings.max_steps - self.step)
        for line in (
            *self.plan.notes,
            *self.task.notes(),
            *start,
            describe(config, world, self.task, self.step),
            data_line,
        ):
            self.telemetry.say(line)
        self.batches.open_logs(run, config.data.audit, self.step)
        self.resources.enter_context(self.telemetry)
        self.stop = self.resources.enter_context(StopSignal())
        self.watchdog = self.resources.enter_context(Watchdog(*world[:2], settings.timeout_seconds))
        self.checkpoints = Checkpoints(
            run,
            world,
            keep_last=settings.keep_last,
            keep_every_steps=settings.keep_every_steps,
            continues=self.plan.checkpoint,
            asynchronous=settings.async_checkpoints,
            beat=self.watchdog.beat,
        )
        self.skipped, self.spikes = SkippedSteps(run, world, settings.max_skipped_steps), LossSpikes()

    def close(self) -> None:
        """Releases whatever `setup` opened."""
        self.resources.close()

    def train(self) -> None:
        """All steps that are left. Raises Stopped after a signal to stop, with everything saved."""
        self.throughput = Throughput()
        if self.init_from and self.config.data.val is not None:
            self.validate(self.step)  # what training starts from
            self.throughput.restart()
        for step in range(self.step + 1, self.config.trainer.max_steps + 1):
            self.step = step
            self.after_step(step, self.train_step(step))

    def train_step(self, step: int) -> Step:
        """Trains on one global batch (step from 1), then reads the next one ahead."""
        self.watchdog.beat(step)
        batches = self.batches.take(step)
        self.data_state, self.keys = batches[-1].state, [key for batch in batches for key in batch.keys]
        result = self.task.step([self.task.inputs(batch) for batch in batches], step - 1)
        self.throughput.count(self.world.size * sum(len(batch.values) for batch in batches))
        if step < self.config.trainer.max_steps:
            self.batches.read_ahead()
        return result

    def after_step(self, step: int, result: Step) -> None:
        """Logs, validates and saves, where it is time; ends all ranks together where any of them must stop."""
        flags = self.stop.requested, self.batches.failed is not None, self.folder.is_gone()
        signal, starving, gone = ends = max_over_ranks(self.world, *flags)
        if gone:
            self.run = self.folder.replace(self.config)
            for part in (self.checkpoints, self.telemetry, self.batches, self.skipped):
                part.move_to(self.run)
        try:
            note = self.skipped.update(step, result.skipped, self.keys, step == self.config.trainer.max_steps)
        except TrainerError:
            self.checkpoints.finish()  # the checkpoint that is being written is from a good step
            raise
        spike = None if result.skipped else self.spikes.update(float(result.scalars["loss/total"]))
        for line in filter(None, (note, spike and f"step {step}: {spike}", result.warning)):
            self.telemetry.say(line)
        due = self._due(step, result, any(ends))
        self.telemetry.advance(step)
        if due.log:
            self.log(step, result, due.last)
        with self.throughput.paused():
            if due.validate and not any(ends) and self.config.data.val is not None:
                self.validate(step)
            self.save(step, due)
        if due.log:
            self.throughput.restart()
        saved = f"step {step} is saved: resume with `ibq resume {self.run}`"
        if gone:
            raise TrainerError(
                f"the run's folder was moved or deleted, or taken by another process, while it trained; {saved}"
            )
        if starving:
            self.batches.stop_together(saved)
        if signal:
            raise Stopped(signal, step, self.run)

    def _due(self, step: int, result: Step, ends: bool) -> Due:
        settings = self.config.trainer
        final = step == settings.max_steps
        last = ends or final
        # A checkpoint that falls on a skipped step waits for the next good one: weights that only give NaN must not
        # push out the checkpoints to resume from.
        self.save_pending = last or self.save_pending or step % settings.checkpoint_every_steps == 0
        save = self.save_pending and (last or not result.skipped)
        log = save or last or step % settings.log_every_steps == 0
        return Due(log, final or step % settings.validate_every_steps == 0, save, last)

    def log(self, step: int, result: Step, last: bool) -> None:
        """Writes the step's scalars, averaged over ranks, beside those of model, data and speed."""
        values = [torch.as_tensor(value, dtype=torch.float32) for value in result.scalars.values()]
        means = mean_over_ranks(torch.stack([value.to(self.world.device) for value in values])).tolist()
        scalars = dict(zip(result.scalars, means, strict=True))
        scalars |= self.task.scalars(step - 1) | self.batches.report(step)
        seconds = self.throughput.seconds()
        scalars |= self.task.speed(self.throughput.images / seconds) | {"training_seconds": seconds}
        self.telemetry.alarm(step, self.task.alarm)
        self.telemetry.log(step, scalars)
        for line in summary(scalars) if last else ():
            self.telemetry.say(line)

    def validate(self, step: int) -> None:
        """Evaluates the model on ``data.val``."""
        validation = self.task.validate(self.watchdog.beat)
        for note in validation.notes:
            self.telemetry.say(f"step {step}: {note}")
        for name, picture_chw in validation.pictures.items():
            self.telemetry.picture(step, name, picture_chw)
        if validation.scalars:
            self.telemetry.log(step, validation.scalars)

    def save(self, step: int, due: Due) -> None:
        """Starts a checkpoint where one is due, else completes one that is being written."""
        try:
            if not due.save:
                return self.checkpoints.poll()
            self.save_pending = False
            data_state = data.merge_states(gather_objects(self.data_state))
            state = {"data": data_state, "task": self.task.state.numbers(), "world_size": self.world.size}
            state |= self.plan.record(self.config)
            self.checkpoints.save(step, state, self.task.state.tensors() + random_state(self.world))
            if due.last:
                self.checkpoints.finish()
        except CheckpointError as error:
            if due.last:
                raise
            self.telemetry.say(f"ALARM at step {step}: {error}; training continues without this checkpoint")
