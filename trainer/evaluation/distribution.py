"""Distances between two sets of images from their features, in float64.

`model_zoo.eval_nets.inception` computes the features and so defines the protocol.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trainer import TrainerError

# Relative rounding error of squared distances, computed as |a|^2 + |b|^2 - 2ab over 2,048 dimensions in float64, with a
# margin.
ROUNDING = 1e-12
# Of a covariance that was computed or stored in float32, relative to its largest value: sqrt(2,048) times float32's
# rounding error, with a margin. Statistics do not tell in which precision they were computed.
COVARIANCE_ROUNDING = 1e-5


class GaussianMoments:
    """Count, mean and covariance of features over any number of batches and processes.

    Each batch is centred on its own mean, and batches are combined by the formula of Chan, Golub and LeVeque (1983), so
    a large mean costs no precision, as it would in sums of squares. Each rank updates its own moments; `merged`
    combines the ranks.
    """

    def __init__(self, dimensions: int, device: torch.device | str = "cpu"):
        self.count = 0
        self._mean_d = torch.zeros(dimensions, dtype=torch.float64, device=device)
        self._scatter_dd = torch.zeros(dimensions, dimensions, dtype=torch.float64, device=device)

    def update(self, features_nd: Tensor) -> None:
        """Adds features (n, d) of any float type."""
        if len(features_nd) == 0:
            return
        features_nd = features_nd.detach().to(self._mean_d.device, torch.float64)
        mean_d = features_nd.mean(dim=0)
        centred_nd = features_nd - mean_d
        step_d, count = mean_d - self._mean_d, self.count + len(features_nd)
        self._scatter_dd.addmm_(centred_nd.T, centred_nd)
        self._scatter_dd.addr_(step_d, step_d, alpha=self.count * len(features_nd) / count)
        self._mean_d += step_d * (len(features_nd) / count)
        self.count = count

    def merged(self, group: dist.ProcessGroup | None = None) -> "GaussianMoments":
        """The moments of all ranks of ``group`` as a new object; this rank's own moments stay unchanged."""
        total = GaussianMoments(len(self._mean_d), self._mean_d.device)
        count = self._mean_d.new_tensor(self.count)
        sum_d = self.count * self._mean_d
        if dist.is_initialized():
            dist.all_reduce(count, group=group)
            dist.all_reduce(sum_d, group=group)
        total.count = int(count)
        if total.count:
            total._mean_d = sum_d / count
            step_d = self._mean_d - total._mean_d
            total._scatter_dd = torch.addr(self._scatter_dd, step_d, step_d, alpha=self.count)
            if dist.is_initialized():
                dist.all_reduce(total._scatter_dd, group=group)
        return total

    def mean(self) -> Tensor:
        """(d,) float64; zeros before the first features."""
        return self._mean_d.clone()

    def covariance(self) -> Tensor:
        """(d, d) float64, divided by count - 1. Raises TrainerError for fewer than 2 features."""
        if self.count < 2:
            raise TrainerError(f"a covariance needs at least 2 images, not {self.count}")
        return self._scatter_dd / (self.count - 1)


def frechet_distance(mean_d: Tensor, covariance_dd: Tensor, other_mean_d: Tensor, other_covariance_dd: Tensor) -> float:
    """|m - n|^2 + tr(S) + tr(T) - 2 tr((S T)^(1/2)) of two Gaussians: FID's formula (Heusel et al. 2017).

    With S = A A^T and T = B B^T, the nonzero eigenvalues of S T are those of the symmetric A^T T A, and their roots are
    the singular values of A^T B. Computing these avoids roots of rounding errors if a covariance is singular, as it is
    with fewer images than dimensions. The traces are those of A A^T and B B^T, so that negative eigenvalues, which are
    rounding errors, do not make the distance smaller. Raises TrainerError if the given values are no mean and
    covariance (see `fault_of_moments`), and if the result is not finite or negative beyond rounding.
    """
    mean_d, covariance_dd, other_mean_d, other_covariance_dd = (
        values.double() for values in (mean_d, covariance_dd, other_mean_d, other_covariance_dd)
    )
    if len(mean_d) != len(other_mean_d):
        raise TrainerError(f"features of {len(mean_d)} and of {len(other_mean_d)} dimensions cannot be compared")
    first_dr, second_dr = _factor(mean_d, covariance_dd), _factor(other_mean_d, other_covariance_dd)
    traces = first_dr.square().sum() + second_dr.square().sum()
    rest = float(traces - 2 * torch.linalg.svdvals(first_dr.T @ second_dr).sum())
    rounding = 10 * len(mean_d) * torch.finfo(torch.float64).eps * float(traces)
    distance = float((mean_d - other_mean_d).square().sum()) + max(rest, 0.0)
    if not (rest >= -rounding and math.isfinite(distance)):
        raise TrainerError(
            f"the Fréchet distance came out as {distance:.3g}, with {rest:.3g} for the covariances, which it cannot "
            "be: the images or statistics are damaged"
        )
    return distance


def fault_of_moments(mean_d: Tensor, covariance_dd: Tensor) -> str | None:
    """Why these cannot be the mean and the covariance of features, or None. Rounding errors of float32 are no fault."""
    return _plain_fault(mean_d, covariance_dd) or _negative_fault(torch.linalg.eigvalsh(covariance_dd.double()))


def _plain_fault(mean_d: Tensor, covariance_dd: Tensor) -> str | None:
    """A fault that is seen without eigenvalues, which exist of finite symmetric matrices only."""
    if covariance_dd.shape != (len(mean_d), len(mean_d)):
        return f"a mean of {len(mean_d)} values and a covariance of shape {tuple(covariance_dd.shape)}"
    for name, values in (("mean", mean_d), ("covariance", covariance_dd)):
        if not values.isfinite().all():
            return f"the {name} is not finite"
    uneven = float((covariance_dd - covariance_dd.T).abs().max())
    if uneven > COVARIANCE_ROUNDING * float(covariance_dd.abs().max()):
        return f"the covariance is not symmetric: mirrored values differ by up to {uneven:.3g}"
    return None


def _negative_fault(eigenvalues_d: Tensor) -> str | None:
    smallest, largest = float(eigenvalues_d[0]), float(eigenvalues_d[-1])
    if smallest >= -COVARIANCE_ROUNDING * max(largest, 0.0):
        return None
    return f"the covariance has the negative eigenvalue {smallest:.3g} (the largest is {largest:.3g})"


def _factor(mean_d: Tensor, covariance_dd: Tensor) -> Tensor:
    """A (d, r) with A A^T the covariance, r its rank. Raises TrainerError for what is none."""
    fault = _plain_fault(mean_d, covariance_dd)
    if fault is None:
        eigenvalues_d, vectors_dd = torch.linalg.eigh(covariance_dd)
        fault = _negative_fault(eigenvalues_d)
    if fault is not None:
        raise TrainerError(f"no Fréchet distance: {fault}; the images or statistics are damaged")
    rounding = len(eigenvalues_d) * torch.finfo(torch.float64).eps * eigenvalues_d[-1]
    real_d = eigenvalues_d > rounding
    return vectors_dd[:, real_d] * eigenvalues_d[real_d].sqrt()


class InceptionScore(NamedTuple):
    """Mean and standard deviation (divided by n, not n - 1) of the splits' scores."""

    mean: float
    std: float


def inception_score(logits_nk: Tensor, splits: int = 10) -> InceptionScore:
    """exp of the mean divergence of p(class | image) from p(class) (Salimans et al. 2016), over consecutive splits.

    It depends on the order: if images are sorted by class, each split has few classes and a low score. Raises
    TrainerError for fewer images than splits.
    """
    count = len(logits_nk)
    if count < splits:
        raise TrainerError(f"the Inception score of {splits} splits needs at least {splits} images, not {count}")
    scores = []
    for i in range(splits):
        log_p_nk = logits_nk[i * count // splits : (i + 1) * count // splits].double().log_softmax(dim=1)
        p_nk = log_p_nk.exp()
        # The entropy of the mean minus the mean entropy; a class of probability 0 contributes 0.
        entropy_k = torch.special.entr(p_nk.mean(dim=0))
        scores.append((entropy_k.sum() + (p_nk * log_p_nk).sum(dim=1).mean()).exp())
    scores = torch.stack(scores)
    return InceptionScore(float(scores.mean()), float(scores.std(correction=0)))


class PrecisionRecall(NamedTuple):
    """precision: share of samples in the reference's manifold. recall: share of the reference in the samples' one."""

    precision: float
    recall: float


def precision_recall(
    reference_nd: Tensor,
    samples_nd: Tensor,
    k: int = 3,
    block: int = 4096,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019): a set's manifold is the union of balls around its
    features, each with the distance to its k-th nearest neighbour as radius.

    At most ``block`` x ``block`` distances are in memory. on_progress: called with the number of finished blocks of
    rows and the total. Raises TrainerError if a set has k features or fewer.
    """
    for name, features_nd in (("reference", reference_nd), ("samples", samples_nd)):
        if len(features_nd) <= k:
            raise TrainerError(
                f"precision and recall with {k} neighbours need more than {k} images, not {len(features_nd)} ({name})"
            )
    rows = [len(part) for part in (reference_nd, samples_nd, samples_nd, reference_nd)]
    total, done = sum(-(-count // block) for count in rows), 0

    def count_block() -> None:
        nonlocal done
        done += 1
        on_progress(done, total)

    def radii(features_nd: Tensor) -> Tensor:
        """Squared distance of each feature to its k-th nearest neighbour."""
        parts = []
        for part_nd in features_nd.split(block):
            nearest_nk = None
            for other_nd in features_nd.split(block):
                distance_nm = _squared_distances(part_nd, other_nd)
                if nearest_nk is not None:
                    distance_nm = torch.cat([nearest_nk, distance_nm], dim=1)
                # One more, because the nearest is the feature itself.
                nearest_nk = distance_nm.topk(min(k + 1, distance_nm.shape[1]), largest=False).values
            parts.append(nearest_nk[:, k])
            count_block()
        return torch.cat(parts)

    def share_within(features_nd: Tensor, centers_nd: Tensor, radius_n: Tensor) -> float:
        """The share of features that lie in any ball."""
        within = 0
        for part_nd in features_nd.split(block):
            found_n = torch.zeros(len(part_nd), dtype=torch.bool, device=part_nd.device)
            for other_nd, other_n in zip(centers_nd.split(block), radius_n.split(block), strict=True):
                found_n |= (_squared_distances(part_nd, other_nd) <= other_n).any(dim=1)
            within += int(found_n.sum())
            count_block()
        return within / len(features_nd)

    reference_radius_n, sample_radius_n = radii(reference_nd), radii(samples_nd)
    return PrecisionRecall(
        precision=share_within(samples_nd, reference_nd, reference_radius_n),
        recall=share_within(reference_nd, samples_nd, sample_radius_n),
    )


def _squared_distances(x_nd: Tensor, y_md: Tensor) -> Tensor:
    """(n, m) float64; exactly 0 for equal features, so that copies lie in each other's balls."""
    x_nd, y_md = x_nd.double(), y_md.double()
    scale_nm = x_nd.square().sum(dim=1, keepdim=True) + y_md.square().sum(dim=1)
    distance_nm = torch.addmm(scale_nm, x_nd, y_md.T, alpha=-2)
    return distance_nm.masked_fill_(distance_nm < ROUNDING * scale_nm, 0)
