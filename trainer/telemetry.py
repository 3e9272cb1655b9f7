"""Output of a run during training: progress bar, metrics.jsonl, TensorBoard, pictures. Only rank 0 writes."""

import json
import logging
import math
import os
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from data.text import printable
from trainer.config import RunConfig
from trainer.files import LineFile, os_errors, write_text
from trainer.parallel import World, run_on_all_ranks

logger = logging.getLogger(__name__)

TENSORBOARD = "TensorBoard's logs"
# The metrics that the progress line shows, if they are logged.
SHOWN = {
    "images_per_second": "{:.0f} images/s",
    "loss/cross_entropy": "loss {:.3f}",
    "mfu": "MFU {:.0%}",
    "loss/reconstruction": "L1 {:.3f}",
    "loss/perceptual": "LPIPS {:.3f}",
    "loss/convnext": "ConvNeXt {:.3f}",
    "loss/semantic": "semantic {:.3f}",
    "loss/generator": "G {:.2f}",
    "loss/discriminator": "D {:.2f}",
    "codebook/usage": "codes {:.0%}",
    "codebook/group_usage": "usage of groups {:.0%}",
    "val/psnr": "val {:.2f} dB",
    "val/loss": "val {:.3f}",
}


def metric_lines(path: Path) -> list[tuple[int, str]]:
    """Returns (step, line) for each line of a metrics.jsonl, without a last line that a kill has truncated. Other
    damaged lines are logged and passed over."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append((int(json.loads(line)["step"]), line))
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                logger.warning("%s, line %d, is passed over: it is not a JSON object with a step", path, number)
    return found


@contextmanager
def scanning(what: str = "scanning tars"):
    """Yields a function of (number done, number in all) that shows progress on the terminal of the first process."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    silent = not console.is_terminal or os.environ.get("RANK", "0") != "0"
    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=silent) as progress:
        task = progress.add_task("", total=None, visible=False)
        yield lambda done, total: progress.update(task, completed=done, total=total, visible=True)


class Telemetry:
    """Output during training that is discarded: on all ranks but 0, which has a `RunTelemetry`."""

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        pass

    def _discard(self, *_) -> None:
        pass

    advance = log = alarm = picture = say = move_to = _discard


class RunTelemetry(Telemetry):
    """Writes metrics.jsonl, TensorBoard and samples of a run, and shows its progress on the terminal.

    A context manager. On resuming it deletes what was logged after ``start_step``.
    """

    def __init__(self, run: Path, start_step: int, max_steps: int):
        # Imported here because they are slow to import and only rank 0 needs them.
        from rich import progress as bars
        from rich.console import Console
        from torch.utils.tensorboard import SummaryWriter

        self.samples, self.metrics = run / "samples", LineFile(run / "metrics.jsonl")
        if start_step and self.metrics.path.exists():
            kept = "".join(line for number, line in metric_lines(self.metrics.path) if number <= start_step)
            if kept != self.metrics.path.read_text(encoding="utf-8", errors="replace"):
                write_text(self.metrics.path, kept)
        self.unsaid: list[str] = []
        self.failing: set[str] = set()  # what could not be written the last time
        self.open_writer = partial(SummaryWriter, run / "tensorboard")
        self.writer = self.open_writer(purge_step=start_step + 1)
        self.console = Console(stderr=True)
        self.shown: dict[str, float] = {}
        self.alarmed: str | None = None
        self.max_steps = max_steps
        self.progress = bars.Progress(
            bars.TextColumn("training"),
            bars.BarColumn(bar_width=20),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            bars.TextColumn("left"),
            bars.TimeRemainingColumn(),
            bars.TextColumn("{task.fields[text]}", markup=False),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.bar = self.progress.add_task("training", total=max_steps, completed=start_step, text="")

    def __enter__(self):
        self.progress.start()
        self.excepthook_before, threading.excepthook = threading.excepthook, self._excepthook
        return self

    def __exit__(self, *_):
        self.progress.stop()
        self._tell(self.metrics.append())
        if lost := len(self.metrics.waiting):
            self.say(f"ALARM: {lost:,} line{'s' * (lost > 1)} of {self.metrics.path} lost")
        if self.writer:
            with self._or_lost(TENSORBOARD):
                self.writer.close()
        threading.excepthook = self.excepthook_before

    def move_to(self, run: Path) -> None:
        """Writes into another run's folder from now on."""
        self.samples, self.writer = run / "samples", None
        self.open_writer = partial(self.open_writer.func, run / "tensorboard")
        self.metrics.move_to(run)

    def advance(self, step: int) -> None:
        """Sets the number of finished steps."""
        self.progress.update(self.bar, completed=step)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Writes scalars to all outputs. Non-finite values become null in the JSON, which has no NaN."""
        safe = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self._tell(self.metrics.append(json.dumps({"step": step, **safe})))
        self._to_tensorboard(lambda writer: [writer.add_scalar(*scalar, step) for scalar in scalars.items()])
        self.shown.update(scalars)
        self.progress.update(self.bar, text="CODEBOOK COLLAPSING  " * bool(self.alarmed) + _in_words(self.shown))
        if not self.console.is_terminal:
            with suppress(OSError):  # stderr is a file on a full disk; metrics.jsonl keeps the line
                print(f"step {step}/{self.max_steps}  {_in_words(scalars)}", file=sys.stderr, flush=True)

    def alarm(self, step: int, text: str | None) -> None:
        """Prints a problem of the model once when it begins and once when it ends (text: None); the progress line shows
        it in between."""
        if bool(text) != bool(self.alarmed):
            self.say(f"ALARM at step {step}: {text}" if text else f"step {step}: codebook usage has recovered")
        self.alarmed = text
        self._to_tensorboard(lambda writer: writer.add_scalar("codebook/alarm", float(bool(text)), step))

    def picture(self, step: int, name: str, image_chw: torch.Tensor) -> None:
        """Writes a uint8 picture ``(3, h, w)`` to TensorBoard and to the folder ``samples``."""
        with self._or_lost("pictures"):
            Image.fromarray(image_chw.movedim(0, -1).numpy()).save(self.samples / f"step_{step:08d}.png")
        self._to_tensorboard(lambda writer: writer.add_image(name, image_chw, step))

    @contextmanager
    def _or_lost(self, what: str):
        """Training continues if writing fails, for example on a full disk; this is reported when it begins and when it
        ends."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            if what not in self.failing:
                self.say(f"ALARM: cannot write {what} into {self.samples.parent} ({error}): they get lost")
            self.failing.add(what)
        else:
            if what in self.failing:
                self.say(f"{what} can be written again into {self.samples.parent}")
            self.failing.discard(what)

    def _to_tensorboard(self, write: Callable) -> None:
        """Calls ``write(writer)``. A writer that has failed never writes again, so it is replaced when the disk takes
        lines again; until then nothing is written."""
        if self.writer is None and self.metrics.waiting:
            return
        with self._or_lost(TENSORBOARD):
            self.writer, writer = None, self.writer or self.open_writer()
            write(writer)
            writer.flush()
            self.writer = writer

    def _excepthook(self, failed) -> None:
        # The thread of TensorBoard's writer prints a traceback; its error is raised again here, and reported.
        if type(failed.thread).__name__ != "_AsyncWriterThread":
            self.excepthook_before(failed)

    def _tell(self, line: str | None) -> None:
        if line:
            self.say(line)

    def say(self, line: str) -> None:
        """Prints one line above the progress bar. If stderr is a file on a full disk, it waits for the next one."""
        self.unsaid.append(line)
        with suppress(OSError):
            while self.unsaid:
                line = printable(self.unsaid[0], keep="\n")
                self.console.print(line, highlight=False, markup=False, soft_wrap=True)
                del self.unsaid[0]


def _in_words(scalars: dict[str, float]) -> str:
    return "  ".join(form.format(scalars[name]) for name, form in SHOWN.items() if name in scalars)


def open_telemetry(run: Path, start_step: int, max_steps: int, world: World) -> Telemetry:
    """Returns a `RunTelemetry` on rank 0, and a `Telemetry` that discards everything on other ranks. Raises
    TrainerError on all ranks if the run's folder cannot be written."""

    def open_it() -> Telemetry:
        if not world.is_main:
            return Telemetry()
        with os_errors(f"cannot write into {run}", "fix that and resume"):
            return RunTelemetry(run, start_step, max_steps)

    return run_on_all_ranks(open_it)


def describe(config: RunConfig, world: World, task, start: int) -> str:
    """Describes in one line the model, the devices, the batch and the steps. start: number of finished steps."""
    engine = task.main_engine
    kind = config.engine.kind
    if kind == "deepspeed":
        kind += f" {config.engine.config}"
    if kind == "fsdp2":
        kind += f" over {config.engine.shard_over}" if config.engine.shard_over else ""
        kind += " offload" if config.engine.offload else ""
    what = ", ".join([f"{task.parameters / 1e6:.2f}M parameters", *task.describe()])
    batch = f"{world.size} x {engine.micro_batches} x {engine.micro_batch_size} images per step"
    return (
        f"{config.run}: {what}, {world.size} x {world.device.type} ({kind}, {config.trainer.precision}), {batch}, "
        f"steps {start + 1} to {config.trainer.max_steps}"
    )
