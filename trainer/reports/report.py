"""report.html of a run: one self-contained file with its configuration, curves, measurements and images."""

import json
import math
import os
import platform
from html import escape
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf

from data.unfinished import remove_dead
from model_zoo.io.load import read_newest
from model_zoo.io.sharded_tensors import ShardedTensors
from trainer import TrainerError
from trainer.changes import Change, read_changes
from trainer.checkpoint import load_state
from trainer.evaluation.provenance import installed_version
from trainer.files import write_text
from trainer.reports import sections
from trainer.reports.charts import CHARTS, Curve, Point, draw_chart
from trainer.reports.html import image, page
from trainer.telemetry import metric_lines

SAMPLE_COUNT = 6  # images of the folder ``samples`` that are shown


def write_report(run_folder: str | Path) -> Path:
    """Writes RUN/report.html from config.yaml, metrics.jsonl, samples/, report.json and its images; returns its path.

    Only config.yaml is required; the page says what else is missing. Raises TrainerError with one line if the folder is
    no run, a file is damaged or the page cannot be written.
    """
    run = Path(run_folder)
    if not (run / "config.yaml").is_file():
        raise TrainerError(f"{run} is not a run folder (it has no config.yaml): give the folder that `ibq train` wrote")
    config = OmegaConf.load(run / "config.yaml")
    curves = read_metrics(run / "metrics.jsonl")
    if OmegaConf.select(config, "task") == "generator":
        content = [
            sections.generator_summary(run, config),
            sections.generation(run, config, curves),
            _training(curves),
            _samples(run / "samples", "Drawn from the same random numbers each time."),
            _facts(run, config, curves, None),
            sections.generator_next_steps(run),
        ]
    else:
        evaluation = sections.read_evaluation(run / "report.json")
        content = [
            sections.tokenizer_summary(run, config),
            sections.results(run, evaluation),
            sections.initialization(run),
            sections.reconstructions(run, evaluation),
            sections.demonstration(run / sections.GENERATOR),
            _training(curves),
            _samples(run / "samples", "Validation images above, reconstructions below."),
            _facts(run, config, curves, evaluation),
            sections.tokenizer_next_steps(run),
        ]
    path = run / "report.html"
    try:
        remove_dead(run, path.name)
        write_text(path, page(run.resolve().name, content))
    except OSError as error:
        raise TrainerError(f"cannot write {path}: {error.strerror}") from error
    return path


def read_metrics(path: Path) -> dict[str, Curve]:
    """The curves of a metrics.jsonl by name, in order of steps, without values that are not finite numbers.

    If a step was logged twice (by a resumed run), the last value counts. Damaged lines are passed over.
    """
    if not path.is_file():
        return {}
    values: dict[str, dict[float, float]] = {}
    for step, line in metric_lines(path):
        for name, value in json.loads(line).items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                values.setdefault(name, {})[step] = float(value)
    return {name: [Point(*pair) for pair in sorted(curve.items())] for name, curve in values.items()}


class Work(NamedTuple):
    """What training steps took: their seconds, and their images."""

    seconds: float
    images: float


def training_work(curves: dict[str, Curve], images_per_step: int | None) -> Work | None:
    """What all training steps took, by the logged images per second and seconds; None if these were not logged.
    images_per_step: for lines of earlier versions, which have no seconds; None where it depends on the step."""
    speed = curves.get("images_per_second")
    seconds = {point.step: point.value for point in curves.get("training_seconds", ())}
    if not speed or (images_per_step is None and any(point.step not in seconds for point in speed)):
        return None
    work, start = Work(0.0, 0.0), 0.0
    for point in speed:
        if point.step in seconds:
            work = Work(work.seconds + seconds[point.step], work.images + seconds[point.step] * point.value)
        else:
            images = (point.step - start) * images_per_step
            work = Work(work.seconds + (images / point.value if point.value else 0), work.images + images)
        start = point.step
    return work


def _training(curves: dict[str, Curve]) -> str:
    """All charts of what was logged."""
    drawn = {False: [], True: []}
    for chart in CHARTS:
        logged = {label: curves[name] for name, label in chart.curves.items() if curves.get(name)}
        if logged and (chart.only_beside is None or chart.only_beside in curves):
            drawn[chart.detail].append(draw_chart(chart, logged))
    if not drawn[False] and not drawn[True]:
        return "<section><h2>Training</h2><p>Nothing was logged.</p></section>"
    more = ""
    if drawn[True]:
        more = f"<details><summary>More curves</summary><div class=charts>{''.join(drawn[True])}</div></details>"
    return f"<section><h2>Training</h2><div class=charts>{''.join(drawn[False])}</div>{more}</section>"


def _samples(folder: Path, caption: str) -> str:
    """Evenly spaced images that training wrote, the first and the last among them."""
    paths = sorted(folder.glob("*.png"))
    if not paths:
        return ""
    count = min(SAMPLE_COUNT, len(paths))
    figures = []
    for path in (paths[round(i * (len(paths) - 1) / max(1, count - 1))] for i in range(count)):
        digits = "".join(c for c in path.stem if c.isdigit())
        name = f"step {int(digits):,}" if digits else escape(path.stem)
        alt = f"Images at {name}. {caption}"
        figures.append(f"<figure><figcaption>{name}</figcaption>{image(path, alt)}</figure>")
    return f"<section><h2>Images during training</h2><p class=note>{caption}</p>" + "".join(figures) + "</section>"


def _facts(run: Path, config: DictConfig, curves: dict[str, Curve], evaluation: dict | None) -> str:
    """Settings and measurements of the run, and its whole configuration."""

    def pick(key: str):
        return OmegaConf.select(config, key)

    steps = max((curve[-1].step for curve in curves.values()), default=0)
    batch = pick("trainer.global_batch_size")
    divided = (
        pick("model.grids") or pick("data.buckets") or pick("data.pixels")
    )  # steps have different numbers of images
    work = training_work(curves, None if divided else batch)
    images = work.images / curves["images_per_second"][-1].step if work else None
    codes = pick("model.codebook_size")
    engine = pick("engine.kind")
    facts = {
        "quantizer": pick("model.quantizer"),
        "codebook": f"{codes:,} codes of {pick('model.code_dim')} dimensions" if codes else None,
        "blocks": f"{pick('model.depth')} of {pick('model.heads')} heads" if pick("model.depth") else None,
        "tokenizer": pick("tokenizer.fingerprint"),
        "parameters": _parameter_count(run),
        "training data": pick("data.train"),
        "validation data": pick("data.val") if pick("data.val") != pick("data.train") else None,
        "steps": f"{steps:,.0f} of {pick('trainer.max_steps'):,}" if steps and pick("trainer.max_steps") else None,
        "images per step": _images_per_step(batch, images, bool(divided)),
        "time in training steps": _duration(work.seconds) if work else None,
        "precision": pick("trainer.precision"),
        "engine": f"deepspeed, {pick('engine.config')}" if engine == "deepspeed" else engine,
        "learning rate": pick("optimizer.lr"),
        "perceptual loss": (
            "off (loss.perceptual.weight=0)" if pick("loss.perceptual.weight") == 0 else pick("loss.perceptual.kind")
        ),
        "discriminator": pick("discriminator.kind") if pick("loss.generator.weight") else None,
        "seed": pick("seed"),
        "changes": "; ".join(map(str, _changes(run))) or None,
        "evaluated": _evaluated(evaluation),
        "report written on": _hardware(),
        "versions": _versions(),
    }
    rows = "".join(
        f"<dt>{name}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items() if value is not None
    )
    return (
        f"<section><h2>The run</h2><dl>{rows}</dl><details><summary>Whole configuration</summary>"
        f"<pre>{escape(OmegaConf.to_yaml(config))}</pre></details></section>"
    )


def _images_per_step(batch: int | None, mean: float | None, divided: bool) -> str | None:
    """batch: trainer.global_batch_size, the most in a step. mean: of all steps, if known. divided: a step has images or
    codes of one of several sizes, fewer of larger ones."""
    if batch is None or not divided:
        return None if batch is None else f"{batch}"
    known = "" if mean is None else f"{mean:.3g} on average; "
    return f"{known}at most {batch} (trainer.global_batch_size), fewer of larger sizes"


def _parameter_count(run: Path) -> str | None:
    latest = run / "checkpoints" / "latest"
    if not latest.is_file():
        return None
    files = read_newest(run, ShardedTensors)
    names = files.names("tokenizer/") + files.names("generator/")
    count = sum(math.prod(files.shape(name)) for name in names)
    return f"{count / 1e6:.2f} million" if count else None


def _changes(run: Path) -> list[Change]:
    """The settings that were changed by resuming, up to the newest checkpoint."""
    if not (run / "checkpoints" / "latest").is_file():
        return []
    return read_newest(run, lambda checkpoint: read_changes(load_state(checkpoint)))


def _evaluated(evaluation: dict | None) -> str | None:
    if evaluation is None:
        return None
    provenance = evaluation["manifest"]
    device = provenance.get("environment", provenance)["device"]  # former versions wrote it one level higher
    return f"{provenance['checkpoint']}, {provenance['weights']} weights, on {device}"


def _hardware() -> str:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{cpus} CPU cores ({platform.machine()}), {', '.join(gpus) or 'no GPU'}, {platform.system()}"


def _versions() -> str:
    versions = {"Python": platform.python_version(), "torch": torch.__version__}
    versions |= {name: installed_version(name) for name in ("ibq", "deepspeed")}
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
