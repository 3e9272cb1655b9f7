"""report.html of a run: one file that tells what was trained, how it went and how good it is; it needs no network."""

import base64
import importlib.metadata
import io
import json
import math
import os
import platform
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from model_zoo.io.sharded_tensors import ShardedTensors
from trainer import TrainerError
from trainer.evaluation.reference_results import MEASURES, format_measured
from trainer.init_from import read_init_record
from trainer.telemetry import metric_lines

SAMPLE_COUNT = 6
SAMPLED = "sampled.png"  # of a generator's run
GENERATOR = "generator"  # run of a generator of its codes, in a tokenizer's run folder
MAX_POINTS = 240  # of a curve; longer ones are averaged down to it


@dataclass(frozen=True)
class Chart:
    """A chart's title, what it shows in words, and its curves: name in metrics.jsonl -> label."""

    title: str
    caption: str
    curves: dict[str, str]
    log: bool = False
    percent: bool = False
    from_zero: bool = False
    detail: bool = False  # folded away: for those who look for a fault
    only_beside: str | None = None  # drawn only where this metric was logged too


CHARTS = [
    Chart(
        "Reconstruction",
        "How far the pictures are from the originals. Lower is better.",
        {"loss/reconstruction": "L1", "loss/perceptual": "LPIPS"},
        log=True,
    ),
    Chart("Held-out pictures", "PSNR in dB as training went. Higher is better.", {"val/psnr": "PSNR"}),
    Chart(
        "Codebook usage",
        "Share of the codes that were chosen. A codebook that collapses falls towards 0.",
        {"codebook/usage": "training", "val/usage": "held-out"},
        percent=True,
    ),
    Chart(
        "Codebook perplexity",
        "With how many equally frequent codes the tokens would be as varied.",
        {"codebook/perplexity": "perplexity"},
        from_zero=True,
    ),
    Chart(
        "Quantizer",
        "Distances between encoder features and codes.",
        {
            "loss/double_quantization": "double quantization",
            "loss/commitment": "commitment",
            "loss/codebook": "codebook",
        },
        log=True,
    ),
    Chart(
        "Entropy",
        "Low for one token: sure of its code. High on average: all codes in use.",
        {"loss/sample_entropy": "of one token", "loss/average_entropy": "on average"},
    ),
    Chart(
        "Adversarial losses",
        "Generator and discriminator pull against each other; neither should run away.",
        {"loss/generator": "generator", "loss/discriminator": "discriminator"},
        only_beside="loss/discriminator",
    ),
    Chart(
        "Next code",
        "Cross-entropy in nats per code. Below the entropy of the codes' frequencies it has learned their order.",
        {
            "loss/cross_entropy": "training",
            "val/loss": "validation",
            "val/unigram_entropy": "frequencies alone",
        },
    ),
    Chart("Speed", "Images per second, over all processes.", {"images_per_second": "images/s"}, from_zero=True),
    Chart(
        "Use of the device", "Operations per second, of a plain matrix product's (MFU).", {"mfu": "MFU"}, percent=True
    ),
    Chart("Logits", "Mean of logsumexp squared.", {"loss/z": "z"}, detail=True),
    Chart("Total loss", "The weighted sum that is minimised.", {"loss/total": "total"}, detail=True),
    Chart(
        "Discriminator's logits",
        "Means over real pictures and over reconstructions.",
        {"discriminator/logits_real": "real", "discriminator/logits_fake": "reconstructed"},
        detail=True,
    ),
    Chart("LeCAM", "Regulariser of the discriminator.", {"loss/lecam": "LeCAM"}, detail=True),
    Chart("Generator's weight", "Weight of the adversarial loss.", {"weight/generator": "weight"}, detail=True),
    Chart(
        "Learning rates",
        "As scheduled.",
        {"lr/generator": "generator", "lr/discriminator": "discriminator"},
        detail=True,
    ),
    Chart(
        "Gradient norms",
        "Before clipping.",
        {"grad_norm/generator": "generator", "grad_norm/discriminator": "discriminator"},
        log=True,
        detail=True,
    ),
]


class Point(NamedTuple):
    step: float
    value: float


def write_report(run_folder: str | Path) -> Path:
    """Writes RUN/report.html from config.yaml, metrics.jsonl, samples/, report.json and its pictures; returns its path.

    Only config.yaml must be there: what was not logged or not evaluated yet is left out, and said to be.
    Raises TrainerError with one line where the folder is no run, a file is damaged or the page cannot be written.
    """
    run = Path(run_folder)
    if not (run / "config.yaml").is_file():
        raise TrainerError(f"{run} is no run folder (no config.yaml in it): give the folder that `ibq train` wrote")
    config = OmegaConf.load(run / "config.yaml")
    curves = read_metrics(run / "metrics.jsonl")
    if OmegaConf.select(config, "task") == "generator":
        sections = [
            _generator_head(run, config),
            _generated(run, config, curves),
            _curves(curves),
            _samples(run / "samples", "Drawn from the same random numbers each time."),
            _facts(run, config, curves, None),
            _generator_next_steps(run),
        ]
    else:
        evaluation = _read_evaluation(run / "report.json")
        sections = [
            _head(run, config),
            _results(run, evaluation),
            _start(run),
            _pictures(run, evaluation),
            _its_generator(run / GENERATOR),
            _curves(curves),
            _samples(run / "samples", "Held-out pictures above, reconstructions below."),
            _facts(run, config, curves, evaluation),
            _next_steps(run),
        ]
    title = escape(run.resolve().name)
    page = _PAGE.format(title=title, css=_CSS, body="\n".join(section for section in sections if section))
    path = run / "report.html"
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise TrainerError(f"cannot write {path}: {error.strerror}") from error
    return path


# What the run left behind


def read_metrics(path: Path) -> dict[str, list[Point]]:
    """The curves of a metrics.jsonl by name, in order of steps; values that are no finite number are left out.

    A step that was logged twice (a resumed run) counts as logged last. A last line cut off by a kill is ignored;
    any other damaged line is a TrainerError.
    """
    if not path.is_file():
        return {}
    values: dict[str, dict[float, float]] = {}
    for step, line in metric_lines(path):
        for name, value in json.loads(line).items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                values.setdefault(name, {})[step] = float(value)
    return {name: [Point(*pair) for pair in sorted(curve.items())] for name, curve in values.items()}


def _read_evaluation(path: Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TrainerError(
            f"{path} is not valid JSON: delete it and run `ibq evaluate reconstruction` again"
        ) from error


def training_seconds(curves: dict[str, list[Point]], global_batch_size: int) -> float | None:
    """Time spent in training steps, from the logged images per second; None where they were not logged."""
    speed = curves.get("images_per_second")
    if not speed:
        return None
    starts = [0.0, *(point.step for point in speed)]
    return sum(
        (p.step - start) * global_batch_size / p.value for start, p in zip(starts, speed, strict=False) if p.value
    )


# Sections of the page


def _head(run: Path, config: DictConfig) -> str:
    codes, size = OmegaConf.select(config, "model.codebook_size"), OmegaConf.select(config, "data.image_size")
    story = "An image tokenizer: it turns pictures into codes, and codes back into pictures."
    multipliers = OmegaConf.select(config, "model.channel_multipliers")
    if codes and size and multipliers:
        factor = OmegaConf.select(config, "model.patch_size", default=1) * 2 ** (len(multipliers) - 1)
        side = size // factor
        bits = math.log2(codes)
        ratio = size * size * 24 / (side * side * bits)
        story = (
            f"An image tokenizer: it turns a picture of {size}&times;{size} pixels into {side}&times;{side} = "
            f"{side * side:,} tokens, each one of {codes:,} codes ({bits:.4g} bits), and back. "
            f"That is {ratio:.0f} times fewer bits than the raw pixels."
        )
    return _header(run, story)


def _header(run: Path, story: str) -> str:
    return (
        f"<header><p class=kicker>ibq training report</p><h1>{escape(run.resolve().name)}</h1><p>{story}</p></header>"
    )


def _generator_head(run: Path, config: DictConfig) -> str:
    rows, columns = OmegaConf.select(config, "model.grid")
    codes, classes = OmegaConf.select(config, "model.vocabulary"), OmegaConf.select(config, "model.classes")
    return _header(
        run,
        f"An autoregressive generator: from one of {classes:,} classes it draws the {rows}&times;{columns} = "
        f"{rows * columns:,} codes of a picture, one after another, each one of {codes:,}. A tokenizer turns them into "
        "the picture.",
    )


def _generated(run: Path, config: DictConfig, curves: dict[str, list[Point]]) -> str:
    """How well the next code is told, and samples."""
    losses = {name: curves[name][-1].value for name in ("val/loss", "val/unigram_entropy") if curves.get(name)}
    tiles = ""
    if len(losses) == 2:
        loss, unigram = losses["val/loss"], losses["val/unigram_entropy"]
        held_out = OmegaConf.select(config, "data.val") != OmegaConf.select(config, "data.train")
        on = "in validation" if held_out else "on the training pictures"
        tiles = "".join(
            f"<div class=tile><b>{value:.2f}</b><span>{label}</span></div>"
            for value, label in ((loss, f"nats per code, {on}"), (unigram, "nats by the frequencies of codes"))
        )
        tiles = f"<div class=tiles>{tiles}</div><br>"
    return f"<section><h2>What it generates</h2>{tiles}{_sampled(run)}</section>"


def _sampled(run: Path) -> str:
    if not (run / SAMPLED).is_file():
        command = escape(f"ibq sample {shlex.quote(str(run))} --count 16 --out {shlex.quote(str(run / SAMPLED))}")
        return f"<p>No samples yet. This draws some:</p><pre>{command}</pre>"
    return (
        f'<img class=wide src="{_data_uri(run / SAMPLED)}" alt="Samples of the generator, a row for each class">'
        "<p class=note>A row for each class, the first samples of a seed, not chosen by hand.</p>"
    )


def _its_generator(run: Path) -> str:
    """Of the generator that was trained on a tokenizer's codes, where `ibq quickstart` has trained one."""
    if not (run / SAMPLED).is_file():
        return ""
    return (
        "<section><h2>What a generator makes of its codes</h2>"
        "<p>A small transformer has learned the codes of the training photographs, one class for each, and draws new "
        "ones. From so few pictures it can do little but recite them; it shows that the way from pictures through "
        f"codes to generated pictures works. Its own report is <code>{run.name}/report.html</code>.</p>{_sampled(run)}"
        "</section>"
    )


def verdict(evaluation: dict) -> str:
    """One honest sentence: does the tokenizer clear the palette's bar, at the same bits per token?"""
    ours, palette = _decibels(evaluation["psnr"]), _decibels(evaluation["baseline_palette_psnr"])
    codes = f"{evaluation['codebook_size']:,}"
    numbers = f"{_db_text(ours)} against {_db_text(palette)}"
    bar = f"a palette of {codes} colours, one per token's patch, fitted to these very pictures"
    if ours > palette:
        return f"The tokenizer beats {bar}: {numbers}, at the same bits per token."
    if ours == palette:
        return f"The tokenizer is as good as {bar}: {numbers}, at the same bits per token."
    return (
        f"The tokenizer does not beat {bar} yet: {numbers}, at the same bits per token. "
        f"That is the bar for a longer run on more pictures."
    )


def _results(run: Path, evaluation: dict | None) -> str:
    if evaluation is None:
        command = escape(f"ibq evaluate reconstruction {shlex.quote(str(run))}")
        return f"<section><h2>Results</h2><p>Not evaluated yet. This does it:</p><pre>{command}</pre></section>"
    ours, mean = _decibels(evaluation["psnr"]), _decibels(evaluation["baseline_mean_color_psnr"])
    palette = _decibels(evaluation["baseline_palette_psnr"])
    count = evaluation["image_count"]
    tiles = [
        (
            f"{ours:.1f} dB" if math.isfinite(ours) else "exact",
            "PSNR on held-out pictures" if evaluation["manifest"]["held_out"] else "PSNR",
        ),
        (f"{ours - mean:+.1f} dB" if math.isfinite(ours - mean) else "none", "above the mean colour"),
        (f"{evaluation['usage']:.0%}", f"of {evaluation['codebook_size']:,} codes used"),
    ]
    rows = [("PSNR (dB)", _db_text(ours, ""), _db_text(palette, ""), _db_text(mean, ""))]
    rows += [
        (measure.title, format_measured(key, evaluation[key]), "", "")
        for key, measure in MEASURES.items()
        if key != "psnr" and evaluation.get(key) is not None
    ]
    body = "".join(
        f"<tr><th scope=row>{name}</th>" + "".join(f"<td>{value}</td>" for value in values) + "</tr>"
        for name, *values in rows
    )
    notes = [
        f"{_count(count, 'picture')}, {_count(evaluation['token_count'], 'token')}; protocol <b>"
        f"{escape(evaluation['protocol'])}</b>{_crop(evaluation)}, means over pictures.",
        "Mean colour: each picture replaced by its average colour. Palette: k-means colours found on these very "
        "pictures, one for each token's patch, which favours the palette.",
    ]
    if evaluation["token_count"] < 8 * evaluation["codebook_size"]:
        notes.append(
            f"These few tokens for {evaluation['codebook_size']:,} codes make it a small test: the palette has room "
            "for nearly every patch's own colour, and codes may be idle by chance."
        )
    notes += [f"Warning: {escape(warning)}." for warning in evaluation.get("warnings", [])]
    notes += [
        f"{MEASURES[key].title} was not measured: {escape(reason)}."
        for key, reason in evaluation.get("not_measured", {}).items()
    ]
    if evaluation["infinite_psnr_count"]:
        notes.append(f"{_count(evaluation['infinite_psnr_count'], 'picture')} came back exact and left out of PSNR.")
    if evaluation["skipped"]:
        notes.append(
            f"{_count(len(evaluation['skipped']), 'picture')} skipped, the first: {escape(evaluation['skipped'][0])}."
        )
    return (
        "<section><h2>Results</h2><div class=tiles>"
        + "".join(f"<div class=tile><b>{value}</b><span>{label}</span></div>" for value, label in tiles)
        + f"</div><p class=verdict>{verdict(evaluation)}</p>"
        + "<div class=scroll><table><thead><tr><td></td><th scope=col>tokenizer</th><th scope=col>palette</th>"
        + f"<th scope=col>mean colour</th></tr></thead><tbody>{body}</tbody></table></div>"
        + f"<p class=note>{' '.join(notes)}</p></section>"
    )


def _start(run: Path) -> str:
    """Of a run that began from other weights: which, and what validation found then and now."""
    if (account := read_init_record(run)) is None:
        return ""
    kept = {
        None: "Nothing was frozen.",
        "encoder": "The encoder and the codebook are frozen: the codes, and generators trained on them, stay valid.",
        "decoder": "The decoder is frozen.",
    }[account["freeze"]]
    told = (
        f"<p>From {escape(account['origin'])}, fingerprint <code>{escape(account['fingerprint'])}</code>. {kept} "
        f"Discriminator: {escape(account['discriminator'])}.</p>"
    )
    if "validation" not in account:
        return f"<section><h2>What it started from</h2>{told}<p>Without data.val it was not validated.</p></section>"
    start, now = account["validation"]["start"], account["validation"]["now"]
    rows = "".join(
        f"<tr><th scope=row>{name}</th><td>{form.format(now[key])}</td><td>{form.format(start[key])}</td></tr>"
        for name, key, form in (
            ("PSNR, dB", "psnr", "{:.2f}"),
            ("L1 on [-1, 1]", "l1", "{:.4f}"),
            ("codebook usage", "usage", "{:.1%}"),
        )
    )
    return (
        f"<section><h2>What it started from</h2>{told}<div class=scroll><table><thead><tr><td></td>"
        f"<th scope=col>now, step {now['step']:,}</th><th scope=col>at the start</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
        "<p class=note>As validated while it trained, in the precision of training.</p></section>"
    )


def _crop(evaluation: dict) -> str:
    size, resize = evaluation["manifest"]["image_size"], escape(evaluation["manifest"]["resize"])
    return ", original size" if size == "original" else f", centre crop {size}&times;{size} ({resize})"


def _pictures(run: Path, evaluation: dict | None) -> str:
    if evaluation is None:
        return ""
    shown = {}
    for name, file in evaluation["manifest"].get("pictures", {"first": "report.png"}).items():
        if (run / file).is_file():
            alt = f"{name.capitalize()} pictures: each one's original, the palette's drawing of it, and the tokenizer's"
            shown[name] = f'<img class=wide src="{_data_uri(run / file)}" alt="{alt} reconstruction">'
    first = shown.pop("first", "")
    if first:
        first += "<p class=note>The first pictures of the set, not chosen by hand.</p>"
    if not first and not shown:
        return ""
    chosen = "by LPIPS" if _has_lpips(evaluation) else "by PSNR"
    more = "".join(
        f"<details><summary>The {name} ones, {chosen}</summary>{picture}</details>" for name, picture in shown.items()
    )
    return f"<section><h2>Pictures</h2>{first}{more}</section>"


def _has_lpips(evaluation: dict) -> bool:
    return any(evaluation.get(key) is not None for key in ("lpips_vgg", "lpips_alex"))


def _curves(curves: dict[str, list[Point]]) -> str:
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


def _samples(folder: Path, what: str) -> str:
    paths = sorted(path for path in folder.glob("*.png")) if folder.is_dir() else []
    if not paths:
        return ""
    count = min(SAMPLE_COUNT, len(paths))
    chosen = [paths[round(i * (len(paths) - 1) / max(1, count - 1))] for i in range(count)]
    figures = []
    for path in chosen:
        digits = "".join(c for c in path.stem if c.isdigit())
        name = f"step {int(digits):,}" if digits else escape(path.stem)
        alt = f"Pictures at {name}. {what}"
        figures.append(
            f'<figure><figcaption>{name}</figcaption><img class=wide src="{_data_uri(path)}" alt="{alt}"></figure>'
        )
    return f"<section><h2>How it learned</h2><p class=note>{what}</p>" + "".join(figures) + "</section>"


def _facts(run: Path, config: DictConfig, curves: dict[str, list[Point]], evaluation: dict | None) -> str:
    def pick(key: str):
        return OmegaConf.select(config, key)

    steps = max((curve[-1].step for curve in curves.values()), default=0)
    batch = pick("trainer.global_batch_size")
    seconds = training_seconds(curves, batch) if batch else None
    engine = pick("engine.kind")
    if engine == "deepspeed":
        engine = f"deepspeed, {pick('engine.config')}"
    facts = {
        "quantizer": pick("model.quantizer"),
        "codebook": f"{pick('model.codebook_size'):,} codes of {pick('model.code_dim')} dimensions"
        if pick("model.codebook_size")
        else None,
        "blocks": f"{pick('model.depth')} of {pick('model.heads')} heads" if pick("model.depth") else None,
        "tokenizer": pick("tokenizer.fingerprint"),
        "parameters": _parameter_count(run),
        "trained on": pick("data.train"),
        "held out": pick("data.val") if pick("data.val") != pick("data.train") else None,
        "steps": f"{steps:,.0f} of {pick('trainer.max_steps'):,}" if steps and pick("trainer.max_steps") else None,
        "images a step": batch,
        "time in training steps": _duration(seconds) if seconds else None,
        "precision": pick("trainer.precision"),
        "engine": engine,
        "learning rate": pick("optimizer.lr"),
        "perceptual loss": "off (loss.perceptual.weight=0)" if pick("loss.perceptual.weight") == 0 else None,
        "seed": pick("seed"),
        "evaluated": _evaluated(evaluation),
        "report written on": _hardware(),
        "versions": _versions(),
    }
    rows = "".join(
        f"<dt>{name}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items() if value is not None
    )
    resolved = escape(OmegaConf.to_yaml(config))
    return (
        f"<section><h2>The run</h2><dl>{rows}</dl>"
        f"<details><summary>Whole configuration</summary><pre>{resolved}</pre></details></section>"
    )


def _next_steps(run: Path) -> str:
    folder = shlex.quote(str(run))
    steps = [
        ("Try it on your own pictures", f"ibq reconstruct {folder} --images MY_PHOTOS --out pictures"),
        (
            "Measure it on other pictures",
            f"ibq evaluate reconstruction {folder} --images MY_PHOTOS --report other.json",
        ),
        ("Go on training", f"ibq resume {folder} trainer.max_steps=STEPS"),
        ("Look at every scalar", f"tensorboard --logdir {folder}/tensorboard"),
        ("Train on your own pictures", "ibq shards pack MY_PHOTOS --out tars\nibq train quickstart data.train=tars"),
        (
            "Use it from Python",
            "import model_zoo\n"
            f"tokenizer = model_zoo.load_tokenizer({str(run)!r})\n"
            "index_bhw = tokenizer.tokenize(images_bchw)      # float images in [-1, 1]\n"
            "images_bchw = tokenizer.detokenize(index_bhw)",
        ),
    ]
    return _steps(steps)


def _generator_next_steps(run: Path) -> str:
    folder = shlex.quote(str(run))
    return _steps(
        [
            ("Draw more", f"ibq sample {folder} --classes 0,1 --count 64 --out samples"),
            ("Go on training", f"ibq resume {folder} trainer.max_steps=STEPS"),
            ("Look at every scalar", f"tensorboard --logdir {folder}/tensorboard"),
            (
                "Use it from Python",
                "import model_zoo\n"
                f"generator = model_zoo.load_generator({str(run)!r})\n"
                "logits_btk = generator(index_bt, class_b)      # logits_btk[:, t] predicts code t",
            ),
        ]
    )


def _steps(steps: list[tuple[str, str]]) -> str:
    items = "".join(f"<h3>{title}</h3><pre>{escape(command)}</pre>" for title, command in steps)
    return f"<section><h2>Where to go next</h2>{items}</section>"


def _parameter_count(run: Path) -> str | None:
    latest = run / "checkpoints" / "latest"
    if not latest.is_file():
        return None
    files = ShardedTensors(latest.parent / latest.read_text().strip())
    names = files.names("tokenizer/") + files.names("generator/")
    count = sum(math.prod(files.shape(name)) for name in names)
    return f"{count / 1e6:.2f} million" if count else None


def _evaluated(evaluation: dict | None) -> str | None:
    if evaluation is None:
        return None
    manifest = evaluation["manifest"]
    device = manifest.get("environment", manifest)["device"]  # reports of former versions have it outside
    return f"{manifest['checkpoint']}, {manifest['weights']} weights, on {device}"


def _hardware() -> str:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{cpus} CPU cores ({platform.machine()}), {', '.join(gpus) or 'no GPU'}, {platform.system()}"


def _versions() -> str:
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for name in ("ibq", "deepspeed"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:  # ibq run from a checkout that is not installed
            continue
    return ", ".join(versions)


# Charts, drawn by hand: small, sharp, and coloured by the page's own CSS in light and dark


def draw_chart(chart: Chart, curves: dict[str, list[Point]]) -> str:
    """A figure with an SVG of curves by label. On a log scale values that are not positive are left out."""
    curves = {label: _thin(curve) for label, curve in curves.items()}
    if chart.log and all(point.value <= 0 for curve in curves.values() for point in curve):
        chart = Chart(chart.title, chart.caption, chart.curves)
    if chart.log:
        curves = {label: [p for p in curve if p.value > 0] for label, curve in curves.items()}
        curves = {label: curve for label, curve in curves.items() if curve}
    width, height, left, right, top, bottom = 360, 204, 48, 10, 8, 28
    points = [point for curve in curves.values() for point in curve]
    x_low, x_high = min(p.step for p in points), max(p.step for p in points)
    x_ticks = _ticks(x_low, x_high, 4)
    y_low, y_high = min(p.value for p in points), max(p.value for p in points)
    if chart.percent:
        y_high = min(1.0, max(0.1, y_high * 1.05))
    if chart.percent or chart.from_zero:
        y_low = 0.0
    y_ticks = _log_ticks(y_low, y_high) if chart.log else _ticks(y_low, y_high, 4)
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])

    def x(step: float) -> float:
        return left + (width - left - right) * ((step - x_low) / (x_high - x_low) if x_high > x_low else 0.5)

    def y(value: float) -> float:
        low, high, at = (math.log(v) if chart.log else v for v in (y_low, y_high, value))
        return height - bottom - (height - top - bottom) * ((at - low) / (high - low) if high > low else 0.5)

    def text(value: float) -> str:
        return f"{value:.0%}" if chart.percent else _short(value)

    marks = []
    for tick in y_ticks:
        marks.append(f'<line class=grid x1={left} x2={width - right} y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        marks.append(f'<text x={left - 6} y="{y(tick) + 4:.1f}" text-anchor=end>{text(tick)}</text>')
    for tick in x_ticks:
        anchor = "end" if x(tick) > width - 30 else "middle"
        marks.append(f'<text x="{x(tick):.1f}" y={height - 7} text-anchor={anchor}>{_short(tick)}</text>')
    marks.append(f"<text x={left - 6} y={height - 7} text-anchor=end>step</text>")
    for i, (label, curve) in enumerate(curves.items()):
        if len(curve) == 1:
            marks.append(f'<circle class=c{i} cx="{x(curve[0].step):.1f}" cy="{y(curve[0].value):.1f}" r=3 />')
        path = " ".join(f"{x(p.step):.1f},{y(p.value):.1f}" for p in curve)
        marks.append(f'<polyline class=c{i} points="{path}"><title>{escape(label)}</title></polyline>')
    legend = "".join(
        f"<span><i class=c{i}></i>{escape(label)} <b>{text(curve[-1].value)}</b></span>"
        for i, (label, curve) in enumerate(curves.items())
    )
    spoken = "; ".join(
        f"{label} from {text(curve[0].value)} at step {curve[0].step:.0f} "
        f"to {text(curve[-1].value)} at step {curve[-1].step:.0f}"
        for label, curve in curves.items()
    )
    scale = " (log scale)" if chart.log else ""
    return (
        f"<figure class=chart><figcaption><b>{chart.title}</b>{scale}<small>{chart.caption}</small></figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role=img aria-label="{escape(chart.title)} over training steps: '
        f'{escape(spoken)}">{"".join(marks)}</svg><div class=legend>{legend}</div></figure>'
    )


def _thin(curve: list[Point]) -> list[Point]:
    """At most MAX_POINTS points, each the mean of its neighbours."""
    size = math.ceil(len(curve) / MAX_POINTS)
    groups = [curve[i : i + size] for i in range(0, len(curve), size)]
    return [Point(group[-1].step, math.fsum(p.value for p in group) / len(group)) for group in groups]


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers within [low, high], or that one value where both are equal."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)] or [low, high]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 between them where the range is short; at least one beyond each end."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps: Iterable[int] = (1,) if last - first > 3 else (1, 2, 5)
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in steps]
    begin = max((i for i, tick in enumerate(ticks) if tick <= low), default=0)
    end = min((i for i, tick in enumerate(ticks) if tick >= high), default=len(ticks) - 1)
    return ticks[begin : end + 1]


# Text


def _short(value: float) -> str:
    """A number in a few characters: 1.2M, 450, 0.035, 1e-4."""
    if value == 0:
        return "0"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scale = 1e3 if unit == "k" else limit
            return f"{value / scale:.3g}{unit}"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}" if abs(value) >= 100 else f"{value:.3g}"


def _decibels(psnr: float | None) -> float:
    """report.json writes null for infinity."""
    return math.inf if psnr is None else psnr


def _db_text(psnr: float, unit: str = " dB") -> str:
    return "exact" if math.isinf(psnr) else f"{psnr:.2f}{unit}"


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _data_uri(path: Path) -> str:
    """The picture inside the page; large ones as JPEG."""
    data, kind = path.read_bytes(), "png"
    if len(data) > 400_000:
        buffer = io.BytesIO()
        with Image.open(path) as picture:
            picture.convert("RGB").save(buffer, "JPEG", quality=90)
        data, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: ibq report</title>
<style>{css}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_CSS = """
:root { color-scheme: light dark; --bg: #f6f7f9; --card: #fff; --text: #1b1e24; --faint: #5d6470; --line: #e1e4ea;
  --accent: #2563c9; --c0: #2563c9; --c1: #c8551b; --c2: #16825a; }
@media (prefers-color-scheme: dark) { :root { --bg: #121418; --card: #1b1e24; --text: #e8eaee; --faint: #a0a7b4;
  --line: #30353e; --accent: #7fb0ff; --c0: #7fb0ff; --c1: #ff9d66; --c2: #5fd0a0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--text); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 0 0 .8rem; }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
.kicker { color: var(--accent); font-weight: 600; margin: 0; }
header p:last-child { max-width: 44rem; font-size: 1.1rem; margin: 0; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 1.25rem;
  margin-top: 1.25rem; }
.tiles { display: grid; grid-template-columns: repeat(3, 1fr); gap: .6rem; }
.tile { border: 1px solid var(--line); border-radius: 10px; padding: .6rem .7rem; }
.tile b { display: block; font-size: clamp(1.05rem, 4.5vw, 1.7rem); line-height: 1.3; white-space: nowrap; }
.tile span, .note, small { line-height: 1.4; color: var(--faint); font-size: .875rem; }
.verdict { border-left: 4px solid var(--accent); padding-left: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .5rem; text-align: right; border-bottom: 1px solid var(--line); }
th[scope=row] { text-align: left; font-weight: 400; }
thead th { color: var(--faint); font-size: .875rem; font-weight: 600; }
tbody td:nth-child(2) { font-weight: 600; }
img.wide { display: block; width: 100%; height: auto; border-radius: 8px; image-rendering: auto; }
figure { margin: 0; }
figure + figure { margin-top: 1rem; }
figcaption { margin-bottom: .3rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 1.5rem 1.25rem; }
.chart + .chart { margin: 0; }
.chart { display: flex; flex-direction: column; }
.chart small { display: block; }
.chart svg { width: 100%; height: auto; margin-top: auto; }
svg text { fill: var(--faint); font-size: 12px; font-family: inherit; }
svg .grid { stroke: var(--line); }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
polyline.c0 { stroke: var(--c0); } polyline.c1 { stroke: var(--c1); } polyline.c2 { stroke: var(--c2); }
circle.c0 { fill: var(--c0); } circle.c1 { fill: var(--c1); } circle.c2 { fill: var(--c2); }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .875rem; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 3px; margin-right: .35em; }
i.c0 { background: var(--c0); } i.c1 { background: var(--c1); } i.c2 { background: var(--c2); }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .25rem 1.2rem; margin: 0; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--bg); border: 1px solid var(--line);
  border-radius: 8px; margin: 0; padding: .6rem .8rem; font: .85rem/1.5 ui-monospace, monospace; }
details { margin-top: 1rem; } summary { cursor: pointer; color: var(--accent); } summary + * { margin-top: .75rem; }
@media print { body { background: none; } section { break-inside: avoid; } }
"""
