import math

import numpy as np
import pytest
import scipy.linalg
import torch
from comparing import refusal
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from trainer import TrainerError
from trainer.evaluation.distribution import (
    GaussianMoments,
    fault_of_moments,
    frechet_distance,
    inception_score,
    precision_recall,
)


def features(count: int, dimensions: int = 6, seed: int = 0, mean: float = 0.0) -> torch.Tensor:
    """float32, with correlated dimensions."""
    generator = torch.Generator().manual_seed(seed)
    mix_dd = torch.randn(dimensions, dimensions, generator=torch.Generator().manual_seed(99))
    return torch.randn(count, dimensions, generator=generator) @ mix_dd + mean


def moments_of(features_nd: torch.Tensor, batch: int = 7) -> GaussianMoments:
    moments = GaussianMoments(features_nd.shape[1])
    for part_nd in features_nd.split(batch):
        moments.update(part_nd)
    return moments


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_moments_are_numpys_however_the_features_come(batch):
    features_nd = features(100)
    moments = moments_of(features_nd, batch)
    assert moments.count == 100
    wanted_nd = features_nd.double().numpy()
    np.testing.assert_allclose(moments.mean(), wanted_nd.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance(), np.cov(wanted_nd, rowvar=False), rtol=1e-12, atol=1e-12)


def test_a_mean_far_above_the_spread_costs_no_digits():
    """Sums of squares would be of 1e16, whose digits float64 holds to 2, and leave nothing of a covariance of 1."""
    exact_nd = features(100).double()
    moments = moments_of(exact_nd + 1e8)
    np.testing.assert_allclose(moments.covariance(), np.cov(exact_nd.numpy(), rowvar=False), rtol=1e-6, atol=1e-6)


def test_moments_of_too_few():
    moments = GaussianMoments(3)
    moments.update(torch.zeros(0, 3))
    assert moments.merged().count == moments.count == 0
    moments.update(torch.ones(1, 3))
    assert torch.equal(moments.mean(), torch.ones(3, dtype=torch.float64))
    assert "at least 2 images, not 1" in refusal(TrainerError, moments.covariance)


def merge_on_a_rank() -> None:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    features_nd = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1000
    moments, total = GaussianMoments(5), GaussianMoments(5)
    total.update(features_nd)
    cuts = [0, 31, 40] if size == 2 else [0, 31, 40, 40]  # the last of three has nothing
    moments.update(features_nd[cuts[rank] : cuts[rank + 1]])
    for _ in range(2):  # merging twice must not count twice
        merged = moments.merged()
        assert merged.count == 40
        torch.testing.assert_close(merged.mean(), total.mean(), rtol=1e-9, atol=0)
        torch.testing.assert_close(merged.covariance(), total.covariance(), rtol=1e-9, atol=0)
    assert moments.count == cuts[rank + 1] - cuts[rank]


@pytest.mark.parametrize("size", [2, 3])
def test_moments_of_several_ranks_merge(ranks, size):
    ranks.call(size, merge_on_a_rank)


@pytest.mark.parametrize("counts", [(50, 60), (4, 5)], ids=["regular", "singular"])
def test_frechet_distance_by_scipys_root(counts):
    one_nd, other_nd = features(counts[0]), 1.3 * features(counts[1], seed=1) + 0.5
    one, other = moments_of(one_nd), moments_of(other_nd)
    distance = frechet_distance(one.mean(), one.covariance(), other.mean(), other.covariance())
    # scipy finds no root of a singular product; a small share of the identity moves the distance by as little.
    slight = 1e-10 * np.eye(6)
    first, second = (np.cov(nd.double().numpy(), rowvar=False) + slight for nd in (one_nd, other_nd))
    root = scipy.linalg.sqrtm(first @ second).real
    shift = one_nd.double().mean(0).numpy() - other_nd.double().mean(0).numpy()
    wanted = shift @ shift + np.trace(first) + np.trace(second) - 2 * np.trace(root)
    assert distance == pytest.approx(wanted, rel=1e-4 if counts[0] < 6 else 1e-8)


def test_frechet_distance_of_known_gaussians():
    """Between axis-parallel Gaussians it is |m - n|^2 + sum (s - t)^2 with standard deviations s and t."""
    mean_d, other_mean_d = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 3.0])
    std_d, other_std_d = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([4.0, 2.5, 1.0])
    distance = frechet_distance(mean_d, std_d.square().diag(), other_mean_d, other_std_d.square().diag())
    assert distance == pytest.approx(4 + 9 + 0.25 + 1, rel=1e-12)


def test_frechet_distance_of_a_set_to_itself_is_zero_even_where_it_is_singular():
    moments = moments_of(features(20, dimensions=64))
    same = moments.mean(), moments.covariance()
    assert frechet_distance(*same, *same) < 1e-9 * float(moments.covariance().trace())


def test_frechet_distance_of_damaged_statistics_is_refused():
    mean_d, covariance_dd = torch.zeros(2), torch.eye(2)
    for mean, covariance, said in (
        (mean_d, covariance_dd * math.nan, "the covariance is not finite"),
        (mean_d * math.inf, covariance_dd, "the mean is not finite"),
        (mean_d, -covariance_dd, r"the negative eigenvalue -1 \(the largest is -1\)"),
        (mean_d, torch.tensor([[1.0, 2.0], [2.0, 1.0]]), r"the negative eigenvalue -1 \(the largest is 3\)"),
        (mean_d, torch.tensor([[1.0, 0.5], [-0.5, 1.0]]), "not symmetric: mirrored values differ by up to 1"),
        (mean_d, torch.eye(3), r"a mean of 2 values and a covariance of shape \(3, 3\)"),
        (torch.zeros(3), torch.eye(3), "features of [23] and of [23] dimensions cannot be compared"),
        (mean_d.double() + 1e200, covariance_dd, "came out as inf"),
    ):
        for order in (1, -1):
            one, other = ((mean_d, covariance_dd), (mean.double(), covariance))[::order]
            with pytest.raises(TrainerError, match=said):
                frechet_distance(*one, *other)


def test_frechet_distance_that_is_not_finite_is_no_zero(monkeypatch):
    """Python's max(0.0, nan) is 0.0, the best possible result."""
    mean_d, covariance_dd = torch.zeros(2), torch.eye(2)
    for roots, said in ((math.nan, "nan"), (5.0, "-6")):
        monkeypatch.setattr("torch.linalg.svdvals", lambda matrix, roots=roots: matrix.new_tensor([roots]))
        with pytest.raises(TrainerError, match=f"with {said} for the covariances, which it cannot be"):
            frechet_distance(mean_d, covariance_dd, mean_d, covariance_dd)


def test_negative_eigenvalues_of_rounding_are_no_fault():
    """A covariance of fewer images than dimensions, rounded to float32, has some."""
    moments = moments_of(features(20, dimensions=64))
    rounded_dd = moments.covariance().float()
    assert float(torch.linalg.eigvalsh(rounded_dd.double())[0]) < 0
    assert fault_of_moments(moments.mean(), rounded_dd) is None
    distance = frechet_distance(moments.mean(), rounded_dd, moments.mean(), moments.covariance())
    assert 0 <= distance < 1e-5 * float(moments.covariance().trace())


def logits(count: int, classes: int = 12) -> torch.Tensor:
    return 3 * torch.randn(count, classes, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("count", [100, 57])
def test_inception_score_by_a_loop(count):
    logits_nk = logits(count)
    scores = []
    for split in range(10):
        own_nk = logits_nk[split * count // 10 : (split + 1) * count // 10]
        rows = [[math.exp(v) for v in row] for row in own_nk.tolist()]
        p_nk = [[v / sum(row) for v in row] for row in rows]
        mean_k = [sum(column) / len(p_nk) for column in zip(*p_nk, strict=True)]
        divergences = [sum(p * math.log(p / q) for p, q in zip(row, mean_k, strict=True)) for row in p_nk]
        scores.append(math.exp(sum(divergences) / len(divergences)))
    score = inception_score(logits_nk)
    assert score.mean == pytest.approx(np.mean(scores), rel=1e-12)
    assert score.std == pytest.approx(np.std(scores), rel=1e-9)


def test_inception_score_is_the_number_of_classes_that_are_told_apart_and_ruined_by_their_order():
    """Certain of 5 classes that are equally frequent: 5. Logits so far apart that probabilities are 0."""
    certain_nk = 1e4 * torch.eye(5)[torch.arange(100) % 5]
    assert inception_score(certain_nk) == pytest.approx((5, 0), abs=1e-9)
    sorted_nk = certain_nk[torch.arange(100).reshape(20, 5).T.flatten()]
    assert inception_score(sorted_nk).mean == pytest.approx(1)


def test_inception_score_of_fewer_pictures_than_splits_is_refused():
    assert "at least 10 images, not 9" in refusal(TrainerError, inception_score, logits(9))


def precision_recall_by_a_loop(reference_nd, samples_nd, k):
    def radius(point, points):  # the point itself is one of them
        return sorted(math.dist(point, other) for other in points)[k]

    def share(points, centers):
        balls = [(center, radius(center, centers)) for center in centers]
        return sum(any(math.dist(p, c) <= r for c, r in balls) for p in points) / len(points)

    reference, samples = reference_nd.double().tolist(), samples_nd.double().tolist()
    return share(samples, reference), share(reference, samples)


@pytest.mark.parametrize("block", [1, 4, 16, 1000])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_by_a_loop_whatever_the_block(k, block):
    reference_nd, samples_nd = features(40, 3), 0.6 * features(33, 3, seed=1) + 0.8
    heard = []
    found = precision_recall(reference_nd, samples_nd, k, block, lambda *progress: heard.append(progress))
    wanted = precision_recall_by_a_loop(reference_nd, samples_nd, k)
    assert found == pytest.approx(wanted, abs=1e-12)
    assert 0 < found.recall < found.precision < 1
    assert [done for done, _ in heard] == list(range(1, heard[-1][1] + 1))


def test_which_is_precision_and_which_is_recall():
    """Samples of one of two modes are all real: precision 1. They miss the other one: recall a half."""
    reference_nd = torch.cat([features(30), features(30, seed=1) + 1000])
    assert precision_recall(reference_nd, features(30)) == (1, 0.5)
    assert precision_recall(features(30), reference_nd) == (0.5, 1)


def test_copies_lie_within_one_another():
    """Balls of copies have radius 0; rounding must not put a copy outside."""
    copies_nd = features(1, 2048, mean=30).expand(9, -1)
    assert precision_recall(copies_nd, copies_nd) == (1, 1)


@pytest.mark.parametrize("counts", [(3, 10), (10, 3)])
def test_precision_and_recall_of_too_few_are_refused(counts):
    with pytest.raises(TrainerError, match="more than 3 images, not 3"):
        precision_recall(features(counts[0]), features(counts[1]))


def test_all_are_torch_fidelitys_on_the_same_features():
    reference_nd, samples_nd, logits_nk = features(200, 16), 1.1 * features(150, 16, seed=1) + 0.1, logits(150)
    reference, samples = moments_of(reference_nd), moments_of(samples_nd)
    statistics = (fid_features_to_statistics(nd.double()) for nd in (reference_nd, samples_nd))
    theirs = fid_statistics_to_metric(*statistics, False)
    distance = frechet_distance(reference.mean(), reference.covariance(), samples.mean(), samples.covariance())
    assert distance == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)
    theirs = isc_features_to_metric(logits_nk, splits=10, shuffle=False)
    wanted = theirs["inception_score_mean"], theirs["inception_score_std"]
    assert inception_score(logits_nk) == pytest.approx(wanted, rel=1e-9)
    options = dict(prc_neighborhood=3, prc_batch_size=64, save_cpu_ram=True, verbose=False)
    theirs = prc_features_to_metric(samples_nd.double(), reference_nd.double(), **options)
    assert precision_recall(reference_nd, samples_nd) == pytest.approx((theirs["precision"], theirs["recall"]))
