import json
import math
from types import SimpleNamespace
from unittest.mock import patch

import lpips
import numpy as np
import pytest
import torch
from comparing import refusal
from support import frechet_distance_by_hand, photograph, psnr_and_ssim_by_hand
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from data import EvaluationImage
from model_zoo import ModelError, TokenizerConfig
from model_zoo.eval_nets.weights import WEIGHTS_FILES, weights_path
from model_zoo.quantizers.base import Quantizer
from model_zoo.quantizers.lfq import LookupFreeQuantizer
from trainer import TrainerError
from trainer.evaluation import reconstruction
from trainer.evaluation.provenance import StageTimer
from trainer.evaluation.reconstruction import (
    Networks,
    evaluate_reconstruction,
    load_networks,
    reconstruct_images,
)
from trainer.evaluation.reconstruction_report import figure_rows


class GreyTokenizer:
    """Encodes each patch's mean grey as one of 16 codes; records batch shapes and checks that inputs are fp32."""

    downsampling_factor = 4
    config = TokenizerConfig(codebook_size=16)
    quantize = Quantizer(config)

    def __init__(self):
        self.shapes = []

    def tokenize(self, images_bchw):
        assert images_bchw.dtype == torch.float32 and images_bchw.abs().max() <= 1
        assert not torch.is_grad_enabled()
        self.shapes.append(tuple(images_bchw.shape))
        grey_bhw = torch.nn.functional.avg_pool2d(images_bchw, 4).mean(dim=1)
        return ((grey_bhw + 1) / 2 * 16).long().clamp(0, 15)

    def detokenize(self, index_bhw):
        grey_bhw = (index_bhw.float() + 0.5) / 8 - 1
        return grey_bhw[:, None].expand(-1, 3, -1, -1).repeat_interleave(4, 2).repeat_interleave(4, 3)


class ExactTokenizer(GreyTokenizer):
    """Returns its input unchanged."""

    def tokenize(self, images_bchw):
        self.images_bchw = images_bchw
        return super().tokenize(images_bchw)

    def detokenize(self, index_bhw):
        return self.images_bchw


def photographs(*sizes):
    """Real photographs cut to (height, width)."""
    return [EvaluationImage(f"{i}.png", photograph(i, *size), i) for i, size in enumerate(sizes)]


@pytest.fixture
def evaluate(world):
    """`evaluate(tokenizer, images)`: the report of one process."""

    def report(tokenizer, images, **options):
        return evaluate_reconstruction(tokenizer, images, world=world, **{"batch_size": 2, **options})

    return report


def test_means_are_over_images_whatever_the_batches(evaluate):
    images = photographs(*[(32, 32)] * 5)
    tokenizer = GreyTokenizer()
    report = evaluate(tokenizer, images)
    assert tokenizer.shapes == [(2, 3, 32, 32), (2, 3, 32, 32), (1, 3, 32, 32)]
    alone = [evaluate(GreyTokenizer(), [image]) for image in images]
    for measure in ("psnr", "ssim", "l1"):
        assert getattr(report, measure) == pytest.approx(np.mean([getattr(one, measure) for one in alone]), rel=1e-6)
    assert [score.psnr for score in report.images] == pytest.approx([one.psnr for one in alone])
    assert report.image_count == 5 and report.token_count == 5 * 64
    assert report.codebook_size == 16 and report.protocol == "paper"
    assert 0 < report.usage <= 1 and 1 < report.perplexity <= 16
    # 16 fitted colours, one for each patch, must beat 16 fixed greys and one colour for each picture.
    assert report.baseline_palette_psnr > max(report.psnr, report.baseline_mean_color_psnr) + 0.5


def test_mixed_sizes_are_padded_with_mid_grey_and_cut_back(evaluate):
    images = photographs((33, 47), (32, 32), (32, 32), (33, 47))
    tokenizer = GreyTokenizer()
    reconstructions = list(reconstruct_images(tokenizer, images, batch_size=8, device="cpu"))
    assert tokenizer.shapes == [(1, 3, 36, 48), (2, 3, 32, 32), (1, 3, 36, 48)]
    assert [r.reconstruction_bchw.shape[-2:] for r in reconstructions] == [(33, 47), (32, 32), (33, 47)]
    assert [key for r in reconstructions for key in r.keys] == ["0.png", "1.png", "2.png", "3.png"]
    # 33 rows: 1 padded above, 2 below; 47 columns: none at the left, 1 at the right.
    tokenizer = ExactTokenizer()
    (only,) = reconstruct_images(tokenizer, images[:1], batch_size=8, device="cpu")
    assert torch.equal(only.reconstruction_bchw, only.images_bchw)
    padded = tokenizer.images_bchw[0]
    assert (padded[:, [0, 34, 35]] == 0).all() and (padded[:, :, 47] == 0).all()
    assert torch.equal(padded[:, 1:34, :47], only.images_bchw[0])
    # Padded tokens count.
    assert evaluate(GreyTokenizer(), images[:1]).token_count == 9 * 12


def test_exact_pictures_are_counted_apart_and_json_has_no_infinity(evaluate):
    report = evaluate(ExactTokenizer(), photographs((32, 32), (32, 32)))
    assert report.psnr == math.inf and report.infinite_psnr_count == 2
    assert report.ssim == pytest.approx(1) and report.l1 == 0
    as_json = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert as_json["psnr"] is None and as_json["images"][0]["psnr"] is None
    assert as_json["baseline_palette_psnr"] == report.baseline_palette_psnr


def test_training_precision_does_not_leak_in(evaluate):
    class Convolution(GreyTokenizer):
        def detokenize(self, index_bhw):
            image = super().detokenize(index_bhw)
            self.dtype = torch.nn.functional.conv2d(image, torch.eye(3)[:, :, None, None]).dtype
            return image

    tokenizer = Convolution()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            evaluate(tokenizer, photographs((32, 32)))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert tokenizer.dtype == torch.float32


def test_no_image_is_an_error_and_tiny_images_are_skipped(evaluate):
    assert "no image to evaluate: give" in refusal(TrainerError, evaluate, GreyTokenizer(), [])
    with pytest.raises(TrainerError, match=r"no image to evaluate \(1 skipped, the first: 0\.png: smaller than"):
        evaluate(GreyTokenizer(), photographs((6, 32)))
    heard = []
    images = photographs((6, 32), (32, 32))
    report = evaluate(GreyTokenizer(), images, on_progress=lambda *numbers: heard.append(numbers))
    assert heard == [(0, 2), (1, 2)]
    assert "0.png: smaller" in report.skipped[0] and report.image_count == 1


def test_batches_do_not_depend_on_the_number_of_processes():
    """Also if an image is missing."""
    images = [image for image in photographs(*[(32, 32)] * 11) if image.index != 4]

    def batches(own):
        return [r.positions for r in reconstruct_images(GreyTokenizer(), own, batch_size=3, device="cpu")]

    whole = batches(images)
    assert whole == [[0, 1, 2], [3, 5], [6, 7, 8], [9, 10]]
    shares = [batches([image for image in images if image.index // 3 % 2 == rank]) for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == whole


@torch.no_grad()
def test_usage_windows_are_those_of_the_tokens_in_order(evaluate, monkeypatch):
    monkeypatch.setattr(reconstruction, "window_usage", lambda index_n, size, window: (index_n.tolist(), size))
    images = photographs((32, 32), (16, 32), (32, 32))
    report = evaluate(GreyTokenizer(), images)
    want = []
    for image in images:
        want += GreyTokenizer().tokenize((image.image_chw[None].double() / 127.5 - 1).float()).flatten().tolist()
    assert report.usage_65536 == (want, 16)


class HugeTokenizer(GreyTokenizer):
    """16 of 2^32 codes, which are counted as two groups of 16 bits."""

    config = TokenizerConfig(quantizer="lfq", codebook_size=2**32, code_dim=32, groups=4)
    quantize = LookupFreeQuantizer(config)

    def tokenize(self, images_bchw):
        return super().tokenize(images_bchw) << 14

    def detokenize(self, index_bhw):
        return super().detokenize(index_bhw >> 14)


@torch.no_grad()
def test_usage_of_groups_is_named_as_such_and_the_palette_has_all_colours(evaluate, monkeypatch):
    monkeypatch.setattr(reconstruction, "USAGE_WINDOW_TOKENS", 64)
    images = photographs((32, 32), (32, 32), (32, 32))
    report, plain = evaluate(HugeTokenizer(), images), evaluate(GreyTokenizer(), images)
    assert (report.codebook_size, report.counted_codes) == (2**32, 2**17)
    assert report.usage is report.usage_65536 is report.perplexity is None
    index = torch.cat(
        [HugeTokenizer().tokenize((image.image_chw[None].double() / 127.5 - 1).float()).flatten() for image in images]
    )
    groups_gn = torch.stack([index % 2**16, index >> 16])
    assert report.group_usage == sum(len(of_group.unique()) for of_group in groups_gn) / 2**17
    of_windows = [sum(len(part.unique()) for part in groups_gn[:, i : i + 64]) / 2**17 for i in range(0, 192, 64)]
    assert report.group_usage_65536 == pytest.approx(np.mean(of_windows))  # windows of 64 tokens, not of 32
    assert report.group_perplexity > 1
    assert plain.group_usage is plain.group_usage_65536 is plain.group_perplexity is None
    titles = [row[0] for row in figure_rows(report)]
    assert "usage of groups" in titles and "perplexity of groups" in titles and "codebook usage" not in titles
    # Each patch in its own mean colour.
    first = report.examples["first"][0]
    mean_chw = torch.nn.functional.avg_pool2d(first.original_chw.double(), 4).round()
    assert torch.equal(first.palette_chw.double(), mean_chw.repeat_interleave(4, 1).repeat_interleave(4, 2))
    assert report.baseline_palette_psnr > plain.baseline_palette_psnr


def test_examples_are_the_first_the_worst_and_the_best(evaluate):
    report = evaluate(GreyTokenizer(), photographs(*[(32, 32)] * 10), batch_size=4)
    assert [example.key for example in report.examples["first"]] == [f"{i}.png" for i in range(8)]
    ranked = sorted(report.images, key=lambda score: score.psnr)
    assert [example.psnr for example in report.examples["worst"]] == [score.psnr for score in ranked[:8]]
    assert [example.psnr for example in report.examples["best"]] == [score.psnr for score in ranked[:1:-1]]
    palette_chw = report.examples["first"][5].palette_chw
    assert torch.equal(palette_chw[:, :4, :4], palette_chw[:, :1, :1].expand(3, 4, 4))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_diverged_model_is_an_error(evaluate, value):
    class Diverged(GreyTokenizer):
        def detokenize(self, index_bhw):
            return torch.full_like(super().detokenize(index_bhw), value)

    with pytest.raises(TrainerError, match="or of an image in its batch, is not finite"):
        evaluate(Diverged(), photographs((32, 32)))


# ------------------------------------------------------------------------------------------------------- with networks


def independent_lpips(net, key, x_bchw, y_bchw):
    """By the lpips package alone, in float64; a number for each picture."""
    # Random weights take long, and are replaced at once.
    names = "kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_"
    with patch.multiple(torch.nn.init, **{name: lambda tensor, *_, **__: tensor for name in names}):
        model = lpips.LPIPS(net=net, version="0.1", pretrained=True, pnet_rand=True, verbose=False).double().eval()
    trunk = torch.load(weights_path(key), weights_only=True)
    state = {name: trunk["features." + name.split(".", 1)[1]] for name in model.net.state_dict()}
    model.net.load_state_dict(state)
    with torch.no_grad():
        return model(x_bchw.double(), y_bchw.double()).flatten().tolist()


def independent_features(pictures_bchw):
    """torch-fidelity's network with its first resize cut off, in float64."""
    path = str(weights_path("inception"))
    network = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=path)
    *trunk, _ = network.double().children()
    unit = (pictures_bchw.double().clamp(-1, 1) + 1) / 2
    resized = torch.nn.functional.interpolate(unit, size=(299, 299), mode="bilinear", align_corners=False)
    with torch.no_grad():
        return torch.nn.Sequential(*trunk)(2 * resized - 1).flatten(1)


def as_tensors(images):
    """The pictures and their reconstructions by GreyTokenizer."""
    x_bchw = torch.stack([(image.image_chw.double() / 127.5 - 1).float() for image in images])
    return x_bchw, GreyTokenizer().detokenize(GreyTokenizer().tokenize(x_bchw)).clamp(-1, 1)


@torch.no_grad()
def test_all_measures_equal_independent_ones(evaluate, weights, monkeypatch):
    images = photographs(*[(48, 40)] * 3)
    networks = load_networks("all", None, len(images))
    given = []  # the moments of which rFID is the distance; test_distribution.py has the distance itself
    monkeypatch.setattr(reconstruction, "frechet_distance", lambda *moments: given.append(moments) or 1.5)
    report = evaluate(GreyTokenizer(), images, networks=networks)
    x_bchw, y_bchw = as_tensors(images)
    for net, key in (("vgg", "vgg16"), ("alex", "alexnet")):
        want = independent_lpips(net, key, x_bchw, y_bchw)
        assert [getattr(score, f"lpips_{net}") for score in report.images] == pytest.approx(want, rel=1e-4)
        assert getattr(report, f"lpips_{net}") == pytest.approx(np.mean(want), rel=1e-4)
    assert report.rfid == 1.5
    [moments] = given
    features = independent_features(torch.cat([x_bchw, y_bchw])).split(3)
    for features_nd, (mean_d, covariance_dd) in zip(features, (moments[:2], moments[2:]), strict=True):
        covariance = np.cov(features_nd, rowvar=False)
        np.testing.assert_allclose(mean_d, features_nd.mean(dim=0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(covariance_dd, covariance, rtol=0, atol=1e-4 * covariance.max())
    for score, x, y in zip(report.images, x_bchw, y_bchw, strict=True):
        assert (score.psnr, score.ssim) == pytest.approx(psnr_and_ssim_by_hand(x, y), abs=1e-6)
        assert score.l1 == pytest.approx(float((x.double() - y.double()).abs().mean()), rel=1e-5)
    # The worst are the first by LPIPS.
    worst = max(report.images, key=lambda score: score.lpips_vgg)
    assert report.examples["worst"][0].key == worst.key and report.examples["worst"][0].lpips == worst.lpips_vgg


@pytest.mark.full  # test_all_measures_equal_independent_ones has the moments, test_distribution.py their distance
@torch.no_grad()
def test_rfid_equals_an_independent_one_and_is_0_for_unchanged_pictures(evaluate, weights):
    images = photographs(*[(48, 40)] * 3)
    networks = load_networks("all", None, len(images))
    rfid = evaluate(GreyTokenizer(), images, networks=networks).rfid
    features_nd = independent_features(torch.cat(as_tensors(images)))
    assert rfid == pytest.approx(frechet_distance_by_hand(*features_nd.split(3)), rel=1e-4)
    exact = evaluate(ExactTokenizer(), images, networks=networks)
    assert exact.infinite_psnr_count == 3 and exact.lpips_vgg == exact.lpips_alex == 0
    assert abs(exact.rfid) < 1e-6 * rfid


def test_a_picture_too_small_for_one_measure_is_left_out_of_all(evaluate, weights):
    networks = load_networks("lpips_alex", None, 2)
    report = evaluate(GreyTokenizer(), photographs((28, 64), (32, 32)), networks=networks)
    assert report.image_count == 1 and "0.png: smaller than 31 x 31 pixels" in report.skipped[0]
    assert report.not_measured == {"rfid": "not among --metrics", "lpips_vgg": "not among --metrics"}


def test_one_readable_picture_has_no_rfid(evaluate, monkeypatch):
    class Features:
        def paper(self, unit_bchw):
            return SimpleNamespace(pool_nd=unit_bchw.flatten(1)[:, :3])

    monkeypatch.setattr(reconstruction, "FEATURES", 3)
    images = photographs((6, 32), (32, 32))
    report = evaluate(GreyTokenizer(), images, networks=Networks(Features()))
    assert report.rfid is None and report.not_measured["rfid"] == "it needs at least 2 images"
    with pytest.raises(TrainerError, match="rFID needs at least 2 readable images"):
        evaluate(GreyTokenizer(), images, networks=Networks(Features(), required=frozenset({"rfid"})))


def test_auto_measures_what_is_there_and_says_what_is_not(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("IBQ_WEIGHTS", str(tmp_path))
    (tmp_path / WEIGHTS_FILES["alexnet"].file).symlink_to(weights / WEIGHTS_FILES["alexnet"].file)
    networks = load_networks("auto", 256, 10)
    assert networks.inception is None and list(networks.lpips) == ["alex"] and networks.smallest_side == 31
    for measure, key in (("rfid", "inception"), ("lpips_vgg", "vgg16")):
        assert WEIGHTS_FILES[key].file in networks.not_measured[measure]
        assert str(tmp_path) in networks.not_measured[measure]
    small = load_networks("auto", 24, 10)
    assert not small.lpips and "needs at least 31" in small.not_measured["lpips_alex"]


@pytest.mark.parametrize(
    "asked, size, count, message",
    [
        ("all", 256, 10, "vgg16-397923af.pth, for "),
        ("rfid", 256, 1, "rFID cannot be measured: it needs at least 2 images"),
        ("psnr,lpips_vgg", 8, 10, "LPIPS (VGG) cannot be measured: images of 8 pixels are too small, it needs"),
        ("psnr,fid", 256, 10, "'fid' is unknown: choose auto, all, or a list of rfid, lpips_vgg"),
        ("auto,psnr", 256, 10, "auto and all cannot be combined"),
        ("lpips_alex", 256, 10, "is not the published alexnet"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(weights, tmp_path, monkeypatch, asked, size, count, message):
    monkeypatch.setenv("IBQ_WEIGHTS", str(tmp_path))
    (tmp_path / WEIGHTS_FILES["inception"].file).symlink_to(weights / WEIGHTS_FILES["inception"].file)
    (tmp_path / WEIGHTS_FILES["alexnet"].file).write_bytes(b"other weights")
    assert message in refusal((TrainerError, ModelError), load_networks, asked, size, count)


def test_the_timer_accounts_for_all_seconds():
    timer = StageTimer("cpu")
    assert list(timer.iterate("decode", range(3))) == [0, 1, 2]
    with timer.stage("model"):
        pass
    seconds = timer.seconds()
    assert list(seconds) == ["decode", "model", "rest", "total"]
    assert sum(value for name, value in seconds.items() if name != "total") == pytest.approx(seconds["total"], abs=2e-3)
