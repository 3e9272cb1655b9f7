"""What codes tell of a picture: accuracy of a linear classifier on the mean of a picture's code vectors, beside PSNR.

    python benchmarks/claims/linear_probe.py off='probe/off/seed_*' on='probe/on/seed_*' --train TARS --test TARS

Pictures need a class: a .cls in tars, or class folders with ``--class-from-folder``. The classifier is multinomial
logistic regression on standardized features, fitted to the training pictures by L-BFGS in float64. Its L2 penalty is
the one of `PENALTIES` with the best accuracy in 5-fold cross-validation on the training pictures; the test pictures
choose nothing. The printed accuracy is over the test pictures. "balanced" is the mean over classes, for sets whose
classes differ in size; "majority" is the accuracy of always answering the most frequent class.
"""

import argparse
import glob
import json
import statistics
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import model_zoo
from data import DataError, evaluation_images
from trainer.metrics.image import psnr
from trainer.recipes import load_run_config

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FOLDS = 5
BATCH = 16
FIGURES = ("accuracy", "balanced", "majority", "psnr")


class Pictures(NamedTuple):
    """pooled_nd: float64 means of each picture's code vectors. label_n: classes. psnr: mean over pictures, in dB."""

    pooled_nd: Tensor
    label_n: Tensor
    psnr: float


@torch.no_grad()
def encode(tokenizer: model_zoo.Tokenizer, images: Iterator, device: str) -> Pictures:
    """Reads pictures of one size. Raises DataError for one without a class."""
    pooled, labels, decibels = [], [], []
    images = iter(images)
    while batch := list(islice(images, BATCH)):
        for image in batch:
            if image.label is None:
                raise DataError(f"{image.key} has no class: give tars with a .cls, or --class-from-folder")
        original = torch.stack([image.image_chw for image in batch]).to(device).float() / 127.5 - 1
        index_bhw = tokenizer.tokenize(original)
        pooled.append(tokenizer.quantize.lookup(index_bhw).double().mean(dim=(2, 3)).cpu())
        labels += [image.label for image in batch]
        decibels += psnr(tokenizer.detokenize(index_bhw).clamp(-1, 1), original).tolist()
    if not pooled:
        raise DataError("there are no pictures")
    return Pictures(torch.cat(pooled), torch.tensor(labels), statistics.fmean(decibels))


def fit(x_nd: Tensor, label_n: Tensor, classes: int, penalty: float) -> Tensor:
    """Weights ``(d + 1, classes)`` that minimize the mean cross-entropy plus ``penalty / 2`` times their squares, the
    last row, the bias, excepted."""
    weights = torch.zeros(x_nd.shape[1] + 1, classes, dtype=torch.float64, requires_grad=True)
    inputs = F.pad(x_nd, (0, 1), value=1.0)
    solver = torch.optim.LBFGS(
        [weights], max_iter=500, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(inputs @ weights, label_n) + penalty / 2 * weights[:-1].square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return weights.detach()


def predict(weights: Tensor, x_nd: Tensor) -> Tensor:
    return (F.pad(x_nd, (0, 1), value=1.0) @ weights).argmax(1)


def best_penalty(x_nd: Tensor, label_n: Tensor, classes: int) -> float:
    """By cross-validation; of equally good ones the largest."""
    fold_n = torch.randperm(len(x_nd), generator=torch.Generator().manual_seed(0)) % FOLDS
    right = {}
    for penalty in PENALTIES:
        found = 0
        for fold in range(FOLDS):
            held = fold_n == fold
            weights = fit(x_nd[~held], label_n[~held], classes, penalty)
            found += int((predict(weights, x_nd[held]) == label_n[held]).sum())
        right[penalty] = found
    return max(right, key=lambda penalty: (right[penalty], penalty))


def probe(train: Pictures, test: Pictures) -> dict[str, float]:
    """The figures of the classifier that the training pictures give, on the test pictures."""
    known, label_n = train.label_n.unique(return_inverse=True)
    if missing := sorted(set(test.label_n.tolist()) - set(known.tolist())):
        raise DataError(f"the training pictures have none of class {', '.join(map(str, missing))}")
    mean_d, std_d = train.pooled_nd.mean(0), train.pooled_nd.std(0).clamp(min=1e-12)
    x_nd, test_nd = ((of.pooled_nd - mean_d) / std_d for of in (train, test))
    penalty = best_penalty(x_nd, label_n, len(known))
    right = known[predict(fit(x_nd, label_n, len(known), penalty), test_nd)] == test.label_n
    of_class = [right[test.label_n == label].double().mean().item() for label in test.label_n.unique()]
    majority = known[label_n.bincount().argmax()]
    return {
        "accuracy": right.double().mean().item(),
        "balanced": statistics.fmean(of_class),
        "majority": (test.label_n == majority).double().mean().item(),
        "psnr": test.psnr,
        "penalty": penalty,
        "train_pictures": len(x_nd),
        "test_pictures": len(test_nd),
    }


def measure(run: Path, arguments: argparse.Namespace) -> dict:
    config = load_run_config(run, [])
    tokenizer = model_zoo.load_tokenizer(run).to(arguments.device)
    size = arguments.size or config.data.image_size
    options = dict(image_size=size, resize=config.data.resize, class_from_folder=arguments.class_from_folder)
    pictures = [
        encode(tokenizer, evaluation_images(paths, **options), arguments.device)
        for paths in (arguments.train, arguments.test)
    ]
    return {"run": str(run), "semantic_weight": config.loss.semantic.weight, **probe(*pictures)}


def said(values: list[float], name: str) -> str:
    form = "{:.2f}" if name == "psnr" else "{:.1%}"
    deviation = f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
    return form.format(statistics.fmean(values)) + deviation


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN", help="RUN may be a glob pattern: a run for each seed")
    parser.add_argument("--train", required=True, nargs="+", help="pictures with classes to fit the classifier to")
    parser.add_argument("--test", required=True, nargs="+", help="pictures with classes that were not trained on")
    parser.add_argument("--size", type=int, help="side in pixels; default: data.image_size of the run")
    parser.add_argument("--class-from-folder", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("linear_probe.json"))
    arguments = parser.parse_args(words)
    found: dict[str, list[dict]] = {}
    try:
        for name, _, pattern in (pair.partition("=") for pair in arguments.runs):
            if not (runs := sorted(glob.glob(pattern))):
                parser.error(f"no run is at {pattern!r}: give NAME=RUN")
            found[name] = [measure(Path(run), arguments) for run in runs]
    except (DataError, model_zoo.ModelError) as error:
        parser.error(str(error))
    print(f"| runs | seeds | {' | '.join(FIGURES)} |\n|---|---|---|---|---|---|")
    for name, runs in found.items():
        figures = (said([run[figure] for run in runs], figure) for figure in FIGURES)
        print(f"| {name} | {len(runs)} | {' | '.join(figures)} |")
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
