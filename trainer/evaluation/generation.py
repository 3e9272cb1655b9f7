"""`ibq evaluate generation`: gFID, Inception score, precision and recall of samples, by protocol ``adm``."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.cache import cache_folder
from data.errors import DataError
from data.file_names import fitted
from data.locks import file_lock
from data.npz import FORM, IMAGES, Npz
from data.sources import digest
from model_zoo.eval_nets.inception import FEATURES, InceptionFeatures
from trainer import TrainerError
from trainer.evaluation.distribution import (
    GaussianMoments,
    fault_of_moments,
    frechet_distance,
    inception_score,
    precision_recall,
)
from trainer.evaluation.features import PROTOCOL, FeatureExtractor, FolderImages, ImageSet, NpzImages, SetFeatures
from trainer.evaluation.generation_report import (
    SPLITS,
    EvaluatedGeneration,
    GenerationReport,
    comparison_table,
    report_files,
    write_evaluated_generation,
)
from trainer.evaluation.provenance import StageTimer, environment, weights_files
from trainer.evaluation.reconstruction_report import check_report
from trainer.jobs.sample_output import RECORD, not_as_recorded, output_bytes
from trainer.jobs.setup import choose_device, job_world, one_writer, read_record
from trainer.parallel import World, run_on_all_ranks, run_on_main

METRICS = {"fid": ("gfid",), "is": ("inception_score",), "pr": ("precision", "recall")}
NEIGHBOURS = 3
FEW_IMAGES = 10_000  # fewer than these bias gFID
ORDER = "shuffled once, by numpy.random.default_rng(SEED).permutation(COUNT), for the Inception score's splits"

Progress = Callable[[int, int, str], None]


class Statistics(NamedTuple):
    """Of pooled features, float64."""

    mean_d: Tensor
    covariance_dd: Tensor


class Reference(NamedTuple):
    """images: None if the file holds statistics only. statistics: None if they must be computed from the images."""

    path: Path
    images: ImageSet | None
    statistics: Statistics | None

    def describe_statistics(self) -> str:
        """Where gFID's statistics of the reference come from."""
        if self.statistics:
            return f"mu and sigma stored in {self.path.name}"
        return f"computed from the {self.images.count:,} images of {self.path.name}"


class _Inputs(NamedTuple):
    """not_measured: of METRICS, each with the reason."""

    samples: ImageSet
    reference: Reference
    not_measured: dict[str, str]


class _Features(NamedTuple):
    """reference: None if no measure needs its images."""

    samples: SetFeatures
    reference: SetFeatures | None


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
    on_progress: Progress = lambda done, total, what: None,
) -> EvaluatedGeneration | None:
    """Evaluates samples and writes FILE.json and FILE.md. All processes of torchrun call it; returns None on all ranks
    but 0.

    samples: an .npz with ``arr_0``, uint8 (n, height, width, 3), or a folder of images of one size. reference: the
    same, or ADM's .npz, whose stored ``mu`` and ``sigma`` are then used for gFID. report_path: default
    NAME_generation.json next to the samples. metrics: a comma-separated list of METRICS; default all that are
    possible. seed: see ORDER. cache: a folder for features, or "none"; default one in `cache_folder`. on_progress:
    called with the finished number, the total, and what is counted. Raises TrainerError, one line.
    """
    _check_options(metrics, seed, batch_size, device)
    options = dict(metrics=metrics, seed=seed, batch_size=batch_size)
    with job_world(device, **options) as world, ExitStack() as held:
        timer = StageTimer(world.device)
        json_path = Path(report_path) if report_path is not None else _default_report(Path(samples))
        run_on_main(world, lambda: check_report(report_files(json_path)))
        held.enter_context(one_writer(world, file_lock(json_path), json_path, "--report"))
        weights = run_on_main(world, lambda: weights_files(["inception"]))
        inputs = run_on_all_ranks(lambda: _open(Path(samples), Path(reference), metrics))
        extractor = FeatureExtractor(world, batch_size, _cache(cache))
        features = _extract(inputs, extractor, timer, on_progress)

        def measure() -> EvaluatedGeneration:
            with timer.stage("measures"):
                values = _measure(inputs, features, seed, world.device, on_progress)
            provenance = {
                **_provenance(inputs, features, world),
                "seed": seed,
                "batch_size": batch_size,
                "weights_files": weights,
                "seconds": timer.seconds(),
            }
            report = _make_report(inputs, values, extractor.warnings, provenance)
            evaluated = EvaluatedGeneration(report, comparison_table(report), json_path, json_path.with_suffix(".md"))
            write_evaluated_generation(evaluated)
            return evaluated

        evaluated = run_on_main(world, measure)
        return evaluated if world.is_main else None


def check_generation(
    reference: str | Path,
    count: int,
    *,
    metrics: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    device: str = "auto",
) -> None:
    """Raises what `evaluate_generation` with these options would raise for ``count`` samples that do not exist yet."""
    _check_options(metrics, seed, batch_size, device)
    if count < 2:
        raise TrainerError(f"--count {count}: at least 2 samples are needed, and 50,000 for published results")
    weights_files(["inception"])
    _not_measured(metrics, count, open_reference(Path(reference)))


def _check_options(metrics: str | None, seed: int, batch_size: int, device: str) -> None:
    _parse_metrics(metrics)
    if batch_size < 1:
        raise TrainerError(f"--batch-size {batch_size} must be at least 1")
    if seed < 0:
        raise TrainerError(f"--seed {seed} must be at least 0")
    choose_device(device)


def _parse_metrics(text: str | None) -> list[str]:
    names = list(METRICS) if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in METRICS:
            raise TrainerError(f"--metrics {name} is unknown: give a comma-separated list of {', '.join(METRICS)}")
    return list(dict.fromkeys(names))


def _cache(option: str | Path | None) -> Path | None:
    if option is None:
        return cache_folder() / "features"
    return None if str(option) == "none" else Path(option)


def _default_report(samples: Path) -> Path:
    path = samples.resolve()
    return path.with_name(fitted("", path.name if path.is_dir() else path.stem, "_generation.json"))


def _open(samples: Path, reference: Path, metrics: str | None) -> _Inputs:
    opened, against = open_samples(samples), open_reference(reference)
    return _Inputs(opened, against, _not_measured(metrics, opened.count, against))


def _not_measured(metrics: str | None, count: int, reference: Reference) -> dict[str, str]:
    """The METRICS that ``count`` samples do not allow or that the user leaves out, and why. Raises TrainerError if the
    user asked for one that is not possible."""
    reasons = {}
    if count < SPLITS:
        reasons["is"] = f"{SPLITS} splits need at least {SPLITS} samples, not {count}"
    if reference.images is None:
        reasons["pr"] = f"{reference.path} holds statistics only, and precision and recall need images"
    elif min(count, reference.images.count) <= NEIGHBOURS:
        reasons["pr"] = (
            f"{NEIGHBOURS} neighbours need more than {NEIGHBOURS} images, not {count} samples and "
            f"{reference.images.count} reference images"
        )
    asked = _parse_metrics(metrics)
    if metrics is not None and (refused := [name for name in asked if name in reasons]):
        raise TrainerError(f"--metrics {refused[0]}: {reasons[refused[0]]}")
    return {name: "not among --metrics" for name in METRICS if name not in asked} | reasons


def _extract(inputs: _Inputs, extractor: FeatureExtractor, timer: StageTimer, on_progress: Progress) -> _Features:
    """All processes call it together."""
    with timer.stage("samples"):
        samples = extractor.extract(inputs.samples, lambda *progress: on_progress(*progress, "samples"))
    reference, against = None, inputs.reference
    if "pr" not in inputs.not_measured or ("fid" not in inputs.not_measured and against.statistics is None):
        with timer.stage("reference"):
            reference = extractor.extract(against.images, lambda *progress: on_progress(*progress, "reference images"))
    return _Features(samples, reference)


def _measure(
    inputs: _Inputs, features: _Features, seed: int, device: torch.device, on_progress: Progress
) -> dict[str, float | None]:
    """Fields of `GenerationReport`."""
    values = dict.fromkeys(("gfid", "inception_score", "inception_score_std", "precision", "recall"))
    samples = InceptionFeatures(*(rows.to(device) for rows in features.samples.features))
    reference_nd = features.reference.features.pool_nd.to(device) if features.reference else None
    if "fid" not in inputs.not_measured:
        statistics = inputs.reference.statistics or _statistics(reference_nd)
        values["gfid"] = frechet_distance(*_statistics(samples.pool_nd), *(value.to(device) for value in statistics))
    if "is" not in inputs.not_measured:
        order_n = torch.from_numpy(np.random.default_rng(seed).permutation(len(samples.logits_nk))).to(device)
        score = inception_score(samples.logits_nk[order_n], SPLITS)
        values |= {"inception_score": score.mean, "inception_score_std": score.std}
    if "pr" not in inputs.not_measured:
        values |= precision_recall(
            reference_nd,
            samples.pool_nd,
            NEIGHBOURS,
            on_progress=lambda *progress: on_progress(*progress, "blocks of precision and recall"),
        )._asdict()
    return values


def _statistics(features_nd: Tensor) -> Statistics:
    moments = GaussianMoments(features_nd.shape[1], features_nd.device)
    for part_nd in features_nd.split(2**12):
        moments.update(part_nd)
    return Statistics(moments.mean(), moments.covariance())


def _provenance(inputs: _Inputs, features: _Features, world: World) -> dict:
    """What a reader needs to repeat the measurement."""

    def describe(images: ImageSet, found: SetFeatures) -> dict:
        size = {"count": images.count, "height": images.height, "width": images.width}
        return {"path": str(images.path), "sha256": found.sha256, **size}

    samples, reference = inputs.samples, inputs.reference
    sampling = sampling_record(samples.path, features.samples.sha256)
    return {
        "samples": {**describe(samples, features.samples), "sampling": sampling},
        "reference": describe(reference.images, features.reference)
        if features.reference
        else {"path": str(reference.path)},
        "order": ORDER,
        "splits": SPLITS,
        "neighbours": NEIGHBOURS,
        "environment": environment(world.device),
        "processes": world.size,
    }


def _make_report(
    inputs: _Inputs, values: dict[str, float | None], warnings: list[str], provenance: dict
) -> GenerationReport:
    samples, reference = inputs.samples, inputs.reference
    return GenerationReport(
        **values,
        sample_count=samples.count,
        reference_count=reference.images.count if reference.images else 0,
        reference_statistics=reference.describe_statistics(),
        protocol=PROTOCOL,
        not_measured={
            measure: inputs.not_measured[name]
            for name, measures in METRICS.items()
            for measure in measures
            if name in inputs.not_measured
        },
        warnings=_warnings(samples, reference.images) + warnings,
        provenance=provenance,
    )


def _warnings(samples: ImageSet, reference: ImageSet | None) -> list[str]:
    found = []
    if samples.count < FEW_IMAGES:
        found.append(
            f"only {samples.count:,} samples: published results use 50,000, and gFID of fewer is biased upwards"
        )
    if reference and reference.count < FEW_IMAGES:
        found.append(f"only {reference.count:,} reference images: ADM's reference has 10,000")
    if reference and (samples.width, samples.height) != (reference.width, reference.height):
        found.append(
            f"the samples have {samples.width}x{samples.height} pixels, the reference images "
            f"{reference.width}x{reference.height}"
        )
    return found


# ----------------------------------------------------------------------------------------------------- what is compared


def open_samples(path: Path) -> ImageSet:
    """Raises DataError if there are fewer than two images."""
    images = _open_images(path)
    if not isinstance(images, FolderImages):
        if not images.count:
            raise DataError(f"{path} holds no {IMAGES}: samples are {FORM}")
        images = NpzImages(images)
    if images.count < 2:
        raise DataError(f"{path} holds 1 image: at least 2 samples are needed, and 50,000 for published results")
    return images


def open_reference(path: Path) -> Reference:
    """Raises DataError if there are neither statistics nor at least two images, and for statistics that are damaged."""
    opened = _open_images(path)
    if isinstance(opened, FolderImages):
        reference = Reference(path, opened, None)
    else:
        reference = Reference(path, NpzImages(opened) if opened.count else None, _stored_statistics(opened))
    if reference.images is None and reference.statistics is None:
        raise DataError(f"{path} is not a reference: it has neither {IMAGES}, images that are {FORM}, nor mu and sigma")
    if reference.statistics is None and reference.images.count < 2:
        raise DataError(f"{path} holds 1 image: a reference needs at least 2, and published ones have 10,000")
    return reference


def _open_images(path: Path) -> Npz | FolderImages:
    if path.is_file():
        opened = Npz(path)
        _check_as_recorded(path)
        return opened
    if not path.is_dir():
        raise DataError(f"no such file or folder: {path}")
    damaged = DataError(f"{path / RECORD} is damaged, or not of `ibq sample`: remove it")
    begun = read_record(path / RECORD, {"settings", "finished"}, damaged)
    if begun is not None and begun["finished"] is None:
        raise DataError(f"{path} is not finished: wait for its `ibq sample`, or run it again, which continues")
    images = FolderImages(path)
    if not images.count:
        raise DataError(f"no image in the folder {path}")
    _check_as_recorded(path)
    return images


STATISTICS = {"mu": (FEATURES,), "sigma": (FEATURES, FEATURES)}  # arrays of an .npz


def _stored_statistics(npz: Npz) -> Statistics | None:
    """Of ADM's layout; None if there are none. Raises DataError for those that are no mean and covariance."""
    stored = STATISTICS.keys() & {*npz.names}
    if not stored:
        return None
    if missing := STATISTICS.keys() - stored:
        raise DataError(f"{npz.path} holds {stored.pop()} without {missing.pop()}: download or compute both again")
    statistics = Statistics(*(_stored(npz, name) for name in STATISTICS))
    if fault := fault_of_moments(*statistics):
        raise DataError(
            f"{npz.path}: mu and sigma are no mean and covariance of features: {fault}; download or compute them again"
        )
    return statistics


def _stored(npz: Npz, name: str) -> Tensor:
    values, shape = npz.array(name), STATISTICS[name]
    if values.shape != shape or values.dtype.kind != "f" or values.dtype.itemsize < 4:
        raise DataError(
            f"{npz.path}: {name} is {values.dtype} of shape {values.shape}, but must be {shape} floats of 32 or 64 bits"
        )
    return torch.from_numpy(values.astype(np.float64))  # also of the other byte order


def _check_as_recorded(samples: Path, sha256: str | None = None) -> dict | None:
    """The record that `ibq sample` wrote of these files; None if there is none, or one of an older version. sha256: of
    the .npz; None: only the size is compared. Raises DataError where the files are no longer those of the record."""
    path = samples / RECORD if samples.is_dir() else samples.with_name(fitted("", samples.name, ".json"))
    try:
        record = json.loads(path.read_bytes())
        size, hashed = record["finished"]["bytes"], record["finished"]["sha256"] if samples.is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if size != output_bytes(samples) or (sha256 is not None and sha256 != hashed):
        raise DataError(
            f"{not_as_recorded(samples, path)}; sample it again, or remove {path} to evaluate what is there"
        )
    return record


def sampling_record(samples: Path, sha256: str) -> dict | None:
    """What `ibq sample` recorded of these samples, with a hash of the list of classes; None if it recorded nothing.
    sha256: of the .npz. Raises DataError if the record describes other files."""
    record = _check_as_recorded(samples, sha256 if samples.is_file() else None)
    if record is None:
        return None
    classes = record["settings"]["classes"]
    settings = {**record["settings"], "classes": f"{len(classes):,} ({digest(classes)})"}
    return {"source": record["source"], "checkpoint": record["checkpoint"], **settings}
