"""`ibq evaluate generation`: gFID, Inception score, precision and recall of sampled pictures, by protocol `adm`."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import DataError, cache_folder
from data.npz import FORM, IMAGES, Npz
from model_zoo.eval_nets.inception import FEATURES, InceptionFeatures
from trainer import TrainerError
from trainer.evaluation.distribution import GaussianMoments, frechet_distance, inception_score, precision_recall
from trainer.evaluation.features import PROTOCOL, FeatureMaker, FolderPictures, Made, NpzPictures, Pictures
from trainer.evaluation.provenance import environment, weights_files
from trainer.evaluation.reconstruction import Clock
from trainer.evaluation.reference_results import Measure, markdown_table, published_rows, seconds_line
from trainer.evaluation.run import choose_device, make_room
from trainer.jobs.resumable import writing
from trainer.jobs.sample import MANIFEST, bytes_of
from trainer.parallel import as_trainer_error, run_on_all_ranks, run_on_main, start_world, stop_world

METRICS = {"fid": ("gfid",), "is": ("inception_score",), "pr": ("precision", "recall")}
MEASURES = {  # by key of the report and of published.yaml
    "gfid": Measure("gFID"),
    "inception_score": Measure("Inception score"),
    "precision": Measure("precision", ".4f"),
    "recall": Measure("recall", ".4f"),
}
SPLITS = 10
NEIGHBOURS = 3
FEW_PICTURES = 10_000
ORDER = "shuffled once, by numpy.random.default_rng(SEED).permutation(COUNT), for the Inception score's splits"
WAIT_SECONDS = 7 * 86400.0  # of a process for the slowest


class Statistics(NamedTuple):
    """Of pooled features, float64."""

    mean_d: Tensor
    covariance_dd: Tensor


class Reference(NamedTuple):
    """What samples are held against. pictures: None where the file holds statistics alone; statistics: None where they
    must be computed from the pictures."""

    path: Path
    pictures: Pictures | None
    statistics: Statistics | None


@dataclass(frozen=True)
class GenerationReport:
    """Figures are None where they were not measured. inception_score_std: of the splits' scores. reference_count: of
    pictures, which precision and recall are measured on. reference_statistics: whence those of gFID are. not_measured:
    of MEASURES, each with the reason."""

    gfid: float | None
    inception_score: float | None
    inception_score_std: float | None
    precision: float | None
    recall: float | None
    sample_count: int
    reference_count: int
    reference_statistics: str
    protocol: str
    not_measured: dict[str, str]
    warnings: list[str]
    manifest: dict


class EvaluatedGeneration(NamedTuple):
    """comparison: rows of words beside published ones, the first of them headings, as in FILE.md."""

    report: GenerationReport
    comparison: list[list[str]]
    json_path: Path
    markdown_path: Path


def evaluate_generation(
    samples: str | Path,
    reference: str | Path,
    *,
    report_path: str | Path | None = None,
    metrics: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    device: str = "auto",
    cache: str | Path | None = None,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> EvaluatedGeneration | None:
    """Judges samples and writes FILE.json and FILE.md. All processes of torchrun call it; None on all but the first.

    samples: an .npz with `arr_0`, uint8 (n, height, width, 3), or a folder of pictures of one size. reference: the
    same, or ADM's .npz, whose stored `mu` and `sigma` then are gFID's. report_path: default NAME_generation.json beside
    the samples. metrics: of METRICS, with commas between; default all that can be measured. seed: see ORDER. cache: a
    folder for features, or "none"; default one in `cache_folder()`. on_progress: hears of how many are done, of how
    many, and of what. Raises TrainerError, one line.
    """
    _check_options(metrics, seed, batch_size, device)
    world = start_world(device, WAIT_SECONDS)
    clock = Clock(world.device)
    try:
        json_path = Path(report_path) if report_path is not None else _default_report(Path(samples))
        run_on_main(world, lambda: make_room(json_path))
        weights = run_on_main(world, lambda: as_trainer_error(lambda: weights_files(["inception"])))
        pictures, against = run_on_all_ranks(lambda: (open_samples(Path(samples)), open_reference(Path(reference))))
        reasons = _impossible(metrics, pictures.count, against)
        measured = [metric for metric in _wanted(metrics) if metric not in reasons]
        maker = FeatureMaker(world, batch_size, _cache(cache))
        with clock.part("samples"):
            sampled = maker.make(pictures, lambda *progress: on_progress(*progress, "samples"))
        referred = None
        if "pr" in measured or ("fid" in measured and against.statistics is None):
            with clock.part("reference"):
                referred = maker.make(against.pictures, lambda *progress: on_progress(*progress, "reference pictures"))

        def judge() -> EvaluatedGeneration:
            with clock.part("measures"):
                figures = _figures(measured, sampled, referred, against.statistics, seed, world.device, on_progress)
            manifest = {
                "samples": {**_account(pictures, sampled), "sampling": _sampling(pictures.path, sampled.content)},
                "reference": _account(against.pictures, referred) if referred else {"path": str(against.path)},
                "order": ORDER,
                "seed": seed,
                "splits": SPLITS,
                "neighbours": NEIGHBOURS,
                "batch_size": batch_size,
                "weights_files": weights,
                "environment": environment(world.device),
                "processes": world.size,
                "seconds": clock.read(),
            }
            report = GenerationReport(
                **figures,
                sample_count=pictures.count,
                reference_count=against.pictures.count if against.pictures else 0,
                reference_statistics=_whence(against),
                protocol=PROTOCOL,
                not_measured={
                    measure: reasons.get(metric, "not asked for")
                    for metric, measures in METRICS.items()
                    for measure in measures
                    if metric not in measured
                },
                warnings=_warnings(pictures, against) + maker.warnings,
                manifest=manifest,
            )
            evaluated = EvaluatedGeneration(report, _comparison(report), json_path, json_path.with_suffix(".md"))
            _write(evaluated)
            return evaluated

        evaluated = run_on_main(world, judge)
        return evaluated if world.is_main else None
    finally:
        stop_world()


def _figures(
    measured: list[str],
    sampled: Made,
    referred: Made | None,
    statistics: Statistics | None,
    seed: int,
    device: torch.device,
    on_progress: Callable[[int, int, str], None],
) -> dict[str, float | None]:
    figures = dict.fromkeys(("gfid", "inception_score", "inception_score_std", "precision", "recall"))
    samples = InceptionFeatures(*(rows.to(device) for rows in sampled.features))
    reference_nd = referred.features.pool_nd.to(device) if referred else None
    if "fid" in measured:
        statistics = statistics or _statistics(reference_nd)
        figures["gfid"] = frechet_distance(*_statistics(samples.pool_nd), *(value.to(device) for value in statistics))
    if "is" in measured:
        order_n = torch.from_numpy(np.random.default_rng(seed).permutation(len(samples.logits_nk))).to(device)
        score = inception_score(samples.logits_nk[order_n], SPLITS)
        figures |= {"inception_score": score.mean, "inception_score_std": score.std}
    if "pr" in measured:
        figures |= precision_recall(
            reference_nd,
            samples.pool_nd,
            NEIGHBOURS,
            on_progress=lambda *progress: on_progress(*progress, "blocks of precision and recall"),
        )._asdict()
    return figures


def _statistics(features_nd: Tensor) -> Statistics:
    moments = GaussianMoments(features_nd.shape[1], features_nd.device)
    for part_nd in features_nd.split(2**12):
        moments.update(part_nd)
    return Statistics(moments.mean(), moments.covariance())


# -------------------------------------------------------------------------------------------------------- what is asked


def check_generation(
    reference: str | Path,
    count: int,
    *,
    metrics: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    device: str = "auto",
) -> None:
    """Raises what `evaluate_generation`, asked the same, would raise of ``count`` samples that are still to be made."""
    _check_options(metrics, seed, batch_size, device)
    if count < 2:
        raise TrainerError(f"--count {count}: at least 2 samples are needed, and 50,000 for published figures")
    weights_files(["inception"])
    _impossible(metrics, count, open_reference(Path(reference)))


def _check_options(metrics: str | None, seed: int, batch_size: int, device: str) -> None:
    _wanted(metrics)
    if batch_size < 1:
        raise TrainerError(f"--batch-size {batch_size} must be at least 1")
    if seed < 0:
        raise TrainerError(f"--seed {seed} must be at least 0")
    choose_device(device)


def _wanted(text: str | None) -> list[str]:
    names = list(METRICS) if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in METRICS:
            raise TrainerError(f"--metrics {name} is unknown: choose of {', '.join(METRICS)}, with commas between")
    return list(dict.fromkeys(names))


def _cache(asked: str | Path | None) -> Path | None:
    if asked is None:
        return cache_folder() / "features"
    return None if str(asked) == "none" else Path(asked)


def open_samples(path: Path) -> Pictures:
    """Raises DataError where there are no pictures, or one alone."""
    pictures = _open(path)
    if not isinstance(pictures, FolderPictures):
        if not pictures.count:
            raise DataError(f"{path} holds no {IMAGES}: samples are {FORM}")
        pictures = NpzPictures(pictures)
    if pictures.count < 2:
        raise DataError(f"{path} holds 1 picture: at least 2 samples are needed, and 50,000 for published figures")
    return pictures


def open_reference(path: Path) -> Reference:
    """Raises DataError where there are neither statistics nor pictures, or one picture alone."""
    opened = _open(path)
    if isinstance(opened, FolderPictures):
        reference = Reference(path, opened, None)
    else:
        statistics = None
        if {"mu", "sigma"} <= {*opened.names}:
            statistics = Statistics(*(torch.from_numpy(_numbers(opened, name)).double() for name in ("mu", "sigma")))
        reference = Reference(path, NpzPictures(opened) if opened.count else None, statistics)
    if reference.pictures is None and reference.statistics is None:
        raise DataError(
            f"{path} holds neither {IMAGES}, pictures that are {FORM}, nor mu and sigma: it is no reference"
        )
    if reference.statistics is None and reference.pictures.count < 2:
        raise DataError(f"{path} holds 1 picture: a reference needs at least 2, and published ones have 10,000")
    return reference


def _open(path: Path) -> Npz | FolderPictures:
    if path.is_file():
        return Npz(path)
    if not path.is_dir():
        raise DataError(f"no such file or folder: {path}")
    pictures = FolderPictures(path)
    if not pictures.count:
        raise DataError(f"no picture in the folder {path}")
    return pictures


def _numbers(npz: Npz, name: str) -> np.ndarray:
    values, shape = npz.array(name), {"mu": (FEATURES,), "sigma": (FEATURES, FEATURES)}[name]
    if values.shape != shape or values.dtype.kind != "f":
        raise DataError(f"{npz.path}: {name} is {values.dtype} of shape {values.shape}, but statistics are {shape}")
    return values


def _impossible(metrics: str | None, count: int, against: Reference) -> dict[str, str]:
    """Of METRICS, what cannot be measured on ``count`` samples, and why. Raises TrainerError where it was asked for."""
    reasons = {}
    if count < SPLITS:
        reasons["is"] = f"{SPLITS} splits need at least {SPLITS} samples, not {count}"
    if against.pictures is None:
        reasons["pr"] = f"{against.path} holds statistics alone, and neighbours need pictures"
    elif min(count, against.pictures.count) <= NEIGHBOURS:
        reasons["pr"] = (
            f"{NEIGHBOURS} neighbours need more than {NEIGHBOURS} pictures, not {count} samples and "
            f"{against.pictures.count} of the reference"
        )
    if metrics is not None and (refused := [metric for metric in _wanted(metrics) if metric in reasons]):
        raise TrainerError(f"--metrics {refused[0]}: {reasons[refused[0]]}")
    return reasons


# -------------------------------------------------------------------------------------------------------- what is told


def _account(pictures: Pictures, made: Made) -> dict:
    size = {"count": pictures.count, "height": pictures.height, "width": pictures.width}
    return {"path": str(pictures.path), "sha256": made.content, **size}


def _sampling(samples: Path, sha256: str) -> dict | None:
    """What `ibq sample` told of them, without the list of classes; None where it did not make these very ones, or told
    nothing to know them by. sha256: of the .npz."""
    told = samples / MANIFEST if samples.is_dir() else samples.with_name(f"{samples.name}.json")
    try:
        account = json.loads(told.read_bytes())
        made = account["finished"]
        if made["bytes"] != bytes_of(samples) or (samples.is_file() and made["sha256"] != sha256):
            return None
        settings = {name: value for name, value in account["settings"].items() if name != "classes"}
        return {"source": account["source"], "checkpoint": account["checkpoint"], **settings}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _whence(against: Reference) -> str:
    if against.statistics:
        return f"mu and sigma stored in {against.path.name}"
    return f"computed from the {against.pictures.count:,} pictures of {against.path.name}"


def _warnings(pictures: Pictures, against: Reference) -> list[str]:
    found = []
    if pictures.count < FEW_PICTURES:
        found.append(f"only {pictures.count:,} samples: published figures are of 50,000, and gFID of fewer is higher")
    if against.pictures and against.pictures.count < FEW_PICTURES:
        found.append(f"only {against.pictures.count:,} reference pictures: ADM's reference has 10,000")
    sizes = [(one.width, one.height) for one in (pictures, against.pictures) if one]
    if len(set(sizes)) > 1:
        (width, height), (other_width, other_height) = sizes
        found.append(f"samples of {width}x{height} beside a reference of {other_width}x{other_height} pixels")
    return found


def in_words(report: GenerationReport, measure: str) -> str:
    """A figure of MEASURES; ``-`` where there is none."""
    value = getattr(report, measure)
    return "-" if value is None else format(value, MEASURES[measure].measured)


def _comparison(report: GenerationReport) -> list[list[str]]:
    table = [["model", *(measure.title for measure in MEASURES.values())]]
    table.append(["**measured here**", *(in_words(report, measure) for measure in MEASURES)])
    for row in published_rows("imagenet_generation"):
        table.append([row["model"], *(format(row[key], measure.published) for key, measure in MEASURES.items())])
    return table


def _default_report(samples: Path) -> Path:
    place = samples.resolve()
    return place.with_name(f"{place.name if place.is_dir() else place.stem}_generation.json")


def _write(evaluated: EvaluatedGeneration) -> None:
    """Both files, each whole or not at all; the numbers last."""
    for path, text in (
        (evaluated.markdown_path, markdown(evaluated)),
        (evaluated.json_path, json.dumps(asdict(evaluated.report), indent=1, allow_nan=False) + "\n"),
    ):
        with writing(path, "--report"):
            unfinished = path.with_name(f".unfinished_{path.name}")
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(path)


def markdown(evaluated: EvaluatedGeneration) -> str:
    """The report as Markdown: figures beside published ones, and how they were measured."""
    report, manifest = evaluated.report, evaluated.report.manifest
    notes = [f"Warning: {warning}." for warning in report.warnings]
    notes += [f"{MEASURES[measure].title} was not measured: {why}." for measure, why in report.not_measured.items()]
    if report.inception_score is not None:
        notes.append(
            f"Standard deviation of the Inception score over {SPLITS} splits: {report.inception_score_std:.2f}."
        )
    notes.append("Published: ImageNet 256 x 256, 50,000 samples, 50 of each class, ADM's reference batch.")
    samples, weights = manifest["samples"], manifest["weights_files"]["inception"]
    facts = {
        "protocol": report.protocol,
        "samples": f"{samples['path']}, SHA-256 {samples['sha256'][:16]}, {samples['width']} x {samples['height']}",
        "gFID's reference": report.reference_statistics,
        "order": manifest["order"].replace("SEED", str(manifest["seed"])).replace("COUNT", str(report.sample_count)),
        "weights": f"{Path(weights['file']).name}, SHA-256 {weights['sha256'][:16]}",
        "machine": f"{manifest['environment']['device']}, {manifest['processes']} processes",
        "seconds": seconds_line(manifest["seconds"]),
    }
    if samples["sampling"]:
        facts["sampling"] = ", ".join(f"{name} {value}" for name, value in samples["sampling"].items())
    parts = [
        f"# Generation: {report.sample_count:,} samples",
        markdown_table(evaluated.comparison),
        "\n".join(f"- {note}" for note in notes),
        "## How",
        "\n".join(f"- {name}: {fact}" for name, fact in facts.items()),
    ]
    return "\n\n".join(parts) + "\n"
