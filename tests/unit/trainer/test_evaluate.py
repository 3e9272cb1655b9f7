import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import skimage.data
import torch
from omegaconf import OmegaConf
from PIL import Image
from typer.testing import CliRunner

import model_zoo
from data import EvaluationImage
from model_zoo.pieces import save_pieces, whole
from tools.evaluate import app
from trainer import TrainerError
from trainer.evaluate import (
    Example,
    evaluate_reconstruction,
    evaluate_run,
    pair,
    reconstruct_images,
    side_by_side,
    write_reconstructions,
)


class GreyTokenizer:
    """Each patch's mean grey as one of 16 codes; notes the shape of each batch and checks that fp32 comes in."""

    downsampling_factor = 4
    config = SimpleNamespace(codebook_size=16)

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
    """Gives the pictures back as they came."""

    def tokenize(self, images_bchw):
        self.images_bchw = images_bchw
        return super().tokenize(images_bchw)

    def detokenize(self, index_bhw):
        return self.images_bchw


def photographs(*sizes):
    """Real photographs cut to (height, width)."""
    whole = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea(), skimage.data.rocket()]
    return [
        EvaluationImage(
            f"{i}.png", torch.from_numpy(whole[i % 4][40 : 40 + h, 150 : 150 + w].copy()).permute(2, 0, 1), i
        )
        for i, (h, w) in enumerate(sizes)
    ]


def evaluate(tokenizer, images, **options):
    return evaluate_reconstruction(tokenizer, images, **{"batch_size": 2, "device": "cpu", **options})


def test_means_are_over_images_whatever_the_batches():
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


def test_mixed_sizes_are_padded_with_mid_grey_and_cut_back():
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


def test_exact_pictures_are_counted_apart_and_json_has_no_infinity():
    report = evaluate(ExactTokenizer(), photographs((32, 32), (32, 32)))
    assert report.psnr == math.inf and report.infinite_psnr_count == 2
    assert report.ssim == pytest.approx(1) and report.l1 == 0
    as_json = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert as_json["psnr"] is None and as_json["images"][0]["psnr"] is None
    assert as_json["baseline_palette_psnr"] == report.baseline_palette_psnr


def test_training_precision_does_not_leak_in():
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


def test_no_picture_is_one_clear_line_and_tiny_ones_are_skipped():
    with pytest.raises(TrainerError, match="no picture to evaluate"):
        evaluate(GreyTokenizer(), [])
    heard = []
    images = photographs((6, 32), (32, 32))
    report = evaluate(GreyTokenizer(), images, on_progress=lambda *numbers: heard.append(numbers))
    assert heard == [(1, 2)]
    assert "0.png: smaller" in report.skipped[0] and report.image_count == 1


def test_examples_are_the_first_pictures_and_the_sheet_shows_them():
    report = evaluate(GreyTokenizer(), photographs(*[(32, 32)] * 10), batch_size=4)
    assert [example.key for example in report.examples] == [f"{i}.png" for i in range(8)]
    assert torch.equal(
        report.examples[5].palette_chw[:, :4, :4], report.examples[5].palette_chw[:, :1, :1].expand(3, 4, 4)
    )
    sheet = side_by_side(report.examples, columns=4, cell=64)
    assert sheet.size == (12 + 4 * 76, 12 + 2 * (3 * (36 + 64) + 36 + 12))
    assert side_by_side(report.examples[:5], columns=4, cell=64).width == 12 + 3 * 76  # bands of 3 and 2, not 4 and 1
    pixels = np.asarray(sheet)
    original = report.examples[1].original_chw.permute(1, 2, 0).numpy()
    # Second column, first row, each pixel a square of 2x2.
    assert np.array_equal(pixels[48:112:2, 88:152:2], original) and np.array_equal(pixels[49:112:2, 89:152:2], original)


def test_pair_has_the_pictures_own_size():
    picture = torch.randint(0, 256, (3, 300, 400), dtype=torch.uint8)
    sheet = pair(Example("x.png", math.inf, picture, 255 - picture))
    assert sheet.size == (2 * 400 + 36, 300 + 54)
    assert np.array_equal(np.asarray(sheet)[36:336, 424:824], 255 - picture.permute(1, 2, 0).numpy())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with an untrained tokenizer of 8x8 patches (EMA weights differ) and three photographs to evaluate."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    photos = folder.parent / "photos"
    photos.mkdir()
    for name in ("astronaut", "coffee", "chelsea"):
        Image.fromarray(getattr(skimage.data, name)()).resize((75, 53)).save(photos / f"{name}.png")
    (photos / "broken.png").write_bytes(b"no picture")
    model = dict(
        codebook_size=32, code_dim=8, channels=32, channel_multipliers=[1, 1], num_res_blocks=1, attention_factors=[],
        latent_channels=8, patch_size=4,
    )  # fmt: skip
    checkpoint = folder / "checkpoints" / "step_00000003"
    checkpoint.mkdir(parents=True)
    for seed, name in enumerate(("tokenizer", "tokenizer_ema")):
        torch.manual_seed(seed)
        tokenizer = model_zoo.Tokenizer(model_zoo.TokenizerConfig(**model))
        pieces = [whole(f"{name}/{key}", value) for key, value in tokenizer.state_dict().items()]
        save_pieces(checkpoint / f"rank_{seed:05d}.safetensors", pieces)
    (folder / "checkpoints" / "latest").write_text("step_00000003")
    data = {"val": str(photos), "image_size": 32, "resize": "pil_antialias"}
    OmegaConf.save({"model": model, "data": data}, folder / "config.yaml")
    return folder


def test_a_run_is_evaluated_on_its_own_validation_data(run, tmp_path):
    evaluated = evaluate_run(run, device="cpu")
    assert evaluated.json_path == run / "report.json"
    written = json.loads(evaluated.json_path.read_text())
    assert written["psnr"] == evaluated.report.psnr
    assert written["image_count"] == 3 and written["token_count"] == 3 * 16
    assert len(written["skipped"]) == 1 and "broken" in written["skipped"][0]
    manifest = written["manifest"]
    assert manifest["weights"] == "ema" and manifest["image_size"] == 32 and manifest["checkpoint"] == "step_00000003"
    assert manifest["resize"] == "pil_antialias"
    with Image.open(evaluated.picture_path) as sheet:
        assert sheet.width > 600
    raw = evaluate_run(run, weights="raw", report_path=tmp_path / "raw.json", device="cpu")
    assert raw.report.psnr != evaluated.report.psnr
    assert (tmp_path / "raw.json").is_file() and (tmp_path / "raw.png").is_file()


def test_original_size_goes_one_picture_at_a_time(run, tmp_path):
    evaluated = evaluate_run(run, image_size="original", report_path=tmp_path / "original.json", device="cpu")
    assert evaluated.report.token_count == 3 * 7 * 10
    assert json.loads(evaluated.json_path.read_text())["manifest"]["image_size"] == "original"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_size": "big"}, "--size big"),
        ({"image_size": "0"}, "--size 0"),
        ({"report_path": "report.txt"}, "must end in .json"),
        ({"device": "tpu"}, "--device tpu is unknown"),
        ({"device": "cuda:99"}, "--device cuda:99: this machine has"),
        ({"batch_size": 0}, "batch size must be at least 1"),
        ({"report_path": "/dev/null/report.json"}, "cannot write /dev/null/report.json"),
    ],
)
def test_mistakes_are_named_in_one_line(run, options, message):
    with pytest.raises(TrainerError) as error:
        evaluate_run(run, **{"device": "cpu", **options})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_run_without_validation_data_asks_for_images(run, tmp_path):
    config = OmegaConf.load(run / "config.yaml")
    config.data.val = None
    (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
    OmegaConf.save(config, tmp_path / "config.yaml")
    with pytest.raises(TrainerError, match="--images PATH"):
        evaluate_run(tmp_path, device="cpu")


def test_the_command_prints_the_table_and_the_files(run, tmp_path):
    report = tmp_path / "report.json"
    result = CliRunner().invoke(app, ["reconstruction", str(run), "--report", str(report), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    written = json.loads(report.read_text())
    for value in (written["psnr"], written["baseline_palette_psnr"], written["baseline_mean_color_psnr"]):
        assert f"{value:.2f}" in result.output
    assert f"numbers: {report}" in result.output and "1 pictures skipped" in result.output


def test_reconstruct_writes_each_picture_and_an_overview(run, tmp_path):
    photos = OmegaConf.load(run / "config.yaml").data.val
    written = write_reconstructions(run, images=photos, out=tmp_path / "out", image_size="original", device="cpu")
    assert written.image_count == 3 and len(written.skipped) == 1
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["00000_astronaut.png", "00001_chelsea.png", "00002_coffee.png", "overview.png"]
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "file.png")
    with pytest.raises(TrainerError, match="cannot write"):
        write_reconstructions(run, images=photos, out=tmp_path / "file.png", device="cpu")
