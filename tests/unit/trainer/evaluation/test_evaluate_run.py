import json
import shutil
from pathlib import Path

import pytest
import skimage.data
import torch
from comparing import refusal
from field.long_names import write_long_names
from model_checks import tokenizer_of, write_run
from omegaconf import OmegaConf
from PIL import Image
from samples import picture

from data import DataError
from data.locks import WriterLock, file_lock
from model_zoo import ModelError
from trainer import TrainerError
from trainer.evaluation.evaluate_run import evaluate_run, write_reconstructions


@pytest.fixture(scope="module", autouse=True)
def no_weights(tmp_path_factory):
    """No weights files, whatever this machine has; and what the commands set is taken back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("IBQ_WEIGHTS", str(tmp_path_factory.mktemp("weights")))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with an untrained tokenizer of 8x8 patches (EMA weights differ) and three photographs to evaluate."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    photos = folder.parent / "photos"
    photos.mkdir()
    for name in ("astronaut", "coffee", "chelsea"):
        Image.fromarray(getattr(skimage.data, name)()).resize((75, 53)).save(photos / f"{name}.png")
    (photos / "broken.png").write_bytes(b"no picture")
    tokenizer, average = (tokenizer_of(seed, channel_multipliers=[1, 1]) for seed in range(2))
    data = {"val": str(photos), "image_size": 32, "resize": "pil_antialias"}
    return write_run(folder, {"model": tokenizer.config, "data": data}, tokenizer=tokenizer, tokenizer_ema=average)


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
    assert manifest["step"] == 3 and len(manifest["fingerprint"]) == 16 and manifest["processes"] == 1
    assert manifest["environment"]["torch"] in torch.__version__ and manifest["weights_files"] == {}
    assert set(written["not_measured"]) == {"rfid", "lpips_vgg", "lpips_alex"}
    assert manifest["pictures"] == {"first": "report.png", "worst": "report_worst.png", "best": "report_best.png"}
    for name in manifest["pictures"].values():
        with Image.open(run / name) as grid:
            assert grid.width > 600
    markdown = (run / "report.md").read_text()
    assert f"| PSNR (dB) | {written['psnr']:.2f} |" in markdown and "IBQ, 16,384 codes" in markdown
    assert "number of images: 3, published: 50,000" in markdown and "size: 32, published: 256" in markdown
    assert not [path for path in run.iterdir() if "unfinished" in path.name]
    raw = evaluate_run(run, weights="raw", report_path=tmp_path / "raw.json", device="cpu")
    assert raw.report.psnr != evaluated.report.psnr
    assert raw.provenance["fingerprint"] != manifest["fingerprint"] and "weights: raw" in raw.differences[-1]
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
        ({"report_path": "report.txt"}, "--report report.txt: name a file that ends in .json"),
        ({"image_size": "5"}, "--size 5: give at least 7 pixels"),
        ({"resize": "bicubic"}, "--resize bicubic is unknown: choose one of pil_antialias, cv2_bilinear"),
        ({"measures": "all"}, "for rFID, gFID, Inception score, precision and recall, must be put there"),
        ({"measures": "psnr,fid"}, "'fid' is unknown"),
        ({"recipe": "eval_imagnet"}, "unknown recipe 'eval_imagnet'; did you mean eval_imagenet"),
        ({"recipe": "ibq_16384"}, "ibq_16384 is a recipe for training; here it is one of eval_coco_zero_shot"),
        ({"images": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"device": "tpu"}, "--device tpu is unknown"),
        ({"device": "cuda:99"}, "--device cuda:99 is unknown"),
        ({"batch_size": 0}, "batch size must be at least 1"),
        ({"report_path": "/dev/null/report.json"}, "cannot write /dev/null/report.json"),
        ({"image_size": "99999"}, "(4 skipped, the first: "),
    ],
)
def test_mistakes_are_named_in_one_line(run, options, message):
    errors = TrainerError, ModelError, DataError
    assert message in refusal(errors, evaluate_run, run, **{"device": "cpu", **options})


def test_a_report_that_cannot_be_written_is_found_before_any_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.evaluation.evaluate_run.read_weights", lambda *_: pytest.fail("the work began"))
    with pytest.raises(TrainerError, match=r"cannot write /proc/report\.json: .*--report"):
        evaluate_run(run, report_path="/proc/report.json", device="cpu")  # no new files there
    (tmp_path / "folder.json").mkdir()
    said = refusal(TrainerError, evaluate_run, run, report_path=tmp_path / "folder.json", device="cpu")
    assert "name a file that ends in" in said


@pytest.mark.parametrize("name", ["r.json", "r.md", "r_worst.png"])
def test_a_report_replaces_no_file_of_others(run, tmp_path, monkeypatch, name):
    monkeypatch.setattr("trainer.evaluation.evaluate_run.read_weights", lambda *_: pytest.fail("the work began"))
    (tmp_path / name).write_text('{"psnr": "mine"}')
    said = refusal(TrainerError, evaluate_run, run, report_path=tmp_path / "r.json", device="cpu")
    assert f"{tmp_path / name} already exists and is of no earlier report: choose another --report" in said
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, '{"psnr": "mine"}')]


def test_a_report_is_made_again(run, tmp_path):
    options = {"report_path": tmp_path / "r.json", "device": "cpu"}
    evaluate_run(run, **options)
    raw = evaluate_run(run, weights="raw", **options)
    assert json.loads((tmp_path / "r.json").read_text())["psnr"] == raw.report.psnr
    (tmp_path / "r.json").unlink()
    evaluate_run(run, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "r.md", "r.png", "r_best.png", "r_worst.png"]


def test_a_report_has_one_writer(run, tmp_path):
    with WriterLock(file_lock(tmp_path / "r.json"), "r.json") as other:
        other.take()
        said = refusal(TrainerError, evaluate_run, run, report_path=tmp_path / "r.json", device="cpu")
    assert said.startswith(f"{tmp_path / 'r.json'} is being written by process ")
    assert not list(tmp_path.iterdir())


def test_a_run_without_validation_data_asks_for_images(run, tmp_path):
    config = OmegaConf.load(run / "config.yaml")
    config.data.val = None
    (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
    OmegaConf.save(config, tmp_path / "config.yaml")
    assert "--images PATH" in refusal(TrainerError, evaluate_run, tmp_path, device="cpu")


def test_the_command_prints_the_table_and_the_files(ibq, run, tmp_path):
    report = tmp_path / "report.json"
    ended = ibq("evaluate", "reconstruction", run, "--report", report, "--device", "cpu").succeeded()
    written = json.loads(report.read_text())
    for value in (written["psnr"], written["baseline_palette_psnr"], written["baseline_mean_color_psnr"]):
        assert f"{value:.2f}" in ended.out
    assert f"numbers: {report}" in ended.out and "1 image skipped" in ended.out + ended.err


def test_reconstruct_writes_each_picture_and_an_overview(run, tmp_path):
    photos = OmegaConf.load(run / "config.yaml").data.val
    heard = []
    options = {"image_size": "original", "device": "cpu", "on_progress": lambda *numbers: heard.append(numbers)}
    written = write_reconstructions(run, images=photos, out=tmp_path / "out", **options)
    assert heard == [(1, 4), (2, 4), (3, 4)]  # one of them is broken
    assert written.image_count == 3 and len(written.skipped) == 1
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["00000_astronaut.png", "00001_chelsea.png", "00002_coffee.png", "overview.png", "reconstruct.json"]
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "file.png")
    with pytest.raises(TrainerError, match="cannot write"):
        write_reconstructions(run, images=photos, out=tmp_path / "file.png", device="cpu")
    with pytest.raises(TrainerError, match=r"no readable image in .* \(1 skipped, the first: .*broken\.png: no JPEG"):
        write_reconstructions(run, images=f"{photos}/broken.png", out=tmp_path / "none", device="cpu")
    assert not (tmp_path / "none").exists()


def test_a_folder_of_reconstructions_has_one_writer(run, tmp_path):
    """A second call, which begins while the first one writes, is refused and disturbs nothing."""
    photos, out, refusals = OmegaConf.load(run / "config.yaml").data.val, tmp_path / "out", []

    def write_again(done, total):
        if done == 1:
            refusals.append(refusal(DataError, write_reconstructions, run, images=photos, out=out, device="cpu"))

    options = {"image_size": "original", "device": "cpu", "on_progress": write_again}
    assert write_reconstructions(run, images=photos, out=out, **options).image_count == 3
    assert len(refusals) == 1 and refusals[0].startswith(f"{out} is being written by process ")
    assert len(list(out.iterdir())) == 5


def test_reconstruct_replaces_its_own_pictures_and_no_others(run, tmp_path):
    photos, out = OmegaConf.load(run / "config.yaml").data.val, tmp_path / "out"
    out.mkdir()
    write_reconstructions(run, images=photos, out=out, device="cpu")
    (out / "notes.txt").write_text("mine")
    write_reconstructions(run, images=f"{photos}/coffee.png", out=out, device="cpu")
    names = ["00000_coffee.png", "notes.txt", "overview.png", "reconstruct.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    (out / "reconstruct.json").unlink()
    before = {path: path.read_bytes() for path in out.iterdir()}
    said = refusal(TrainerError, write_reconstructions, run, images=photos, out=out, device="cpu")
    assert f"{out} holds other files" in said and "--out" in said
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_recipe_gives_the_conditions_and_options_win(run, tmp_path):
    options = {"recipe": "eval_coco_zero_shot", "measures": "psnr", "device": "cpu"}
    evaluated = evaluate_run(run, image_size=32, report_path=tmp_path / "coco.json", **options)
    assert evaluated.provenance["image_size"] == 32 and evaluated.provenance["resize"] == "pil_antialias"
    assert evaluated.warnings == ["not the published set: 3 of 5,000 images"]
    assert evaluated.differences == ["number of images: 3, published: 5,000", "size: 32, published: 256"]
    assert [row[0] for row in evaluated.comparison[1:]] == [
        "measured here", "IBQ pretrained, 16,384 codes", "IBQ pretrained, 262,144 codes"
    ]  # fmt: skip
    assert evaluated.comparison[0] == ["model", "rFID", "PSNR (dB)", "SSIM"] and evaluated.comparison[1][1] == "-"
    options["recipe"] = "eval_original_resolution"
    original = evaluate_run(run, report_path=tmp_path / "o.json", **options)
    assert original.provenance["image_size"] == "original" and original.report.token_count == 3 * 7 * 10


def test_one_checkpoint_and_a_published_one_have_reports_of_their_own(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluated = evaluate_run(run / "checkpoints" / "step_00000003", device="cpu")
    assert evaluated.json_path.name == "tiny_step_00000003_reconstruction.json" and evaluated.json_path.is_file()
    published = tmp_path / "published.ckpt"
    torch.save({"state_dict": tokenizer_of(channel_multipliers=[1, 1, 1, 1], patch_size=1).state_dict()}, published)
    with pytest.raises(TrainerError, match=r"is not a run with a data\.val: name the images with --images PATH"):
        evaluate_run(published, device="cpu")
    photos = OmegaConf.load(run / "config.yaml").data.val
    evaluated = evaluate_run(published, images=f"{photos}/coffee.png", device="cpu")
    assert evaluated.json_path.name == "published_reconstruction.json" and evaluated.report.image_count == 1
    assert (evaluated.provenance["image_size"], evaluated.provenance["resize"]) == (256, "cv2_bilinear")
    assert evaluated.provenance["step"] is None and evaluated.provenance["held_out"] is False
    # It has no EMA, so the report names the raw weights that were used.
    assert evaluated.provenance["weights"] == "raw" and evaluated.differences[-1] == "weights: raw, published: ema"
    assert ", raw weights, " in evaluated.markdown_path.read_text()


def test_grey_and_transparent_pictures_follow_the_rules_of_decoding(run, tmp_path):
    grey = torch.arange(64 * 64, dtype=torch.uint8).reshape(64, 64).numpy()
    Image.fromarray(grey).save(tmp_path / "a_grey.png")
    Image.fromarray(grey).convert("RGB").save(tmp_path / "b_same_in_rgb.png")
    Image.new("RGBA", (64, 64), (200, 0, 0, 0)).save(tmp_path / "c_transparent.png")
    Image.new("RGB", (64, 64), "white").save(tmp_path / "d_white.png")
    (tmp_path / "out").mkdir()
    report = evaluate_run(run, images=str(tmp_path), report_path=tmp_path / "out/r.json", device="cpu").report
    scores = [score[1:] for score in report.images]
    assert scores[0] == scores[1] and scores[2] == scores[3] and scores[0] != scores[2]


def test_images_that_were_trained_on_are_not_called_held_out(run, tmp_path):
    config = OmegaConf.load(run / "config.yaml")
    val = Path(config.data.val)
    link = tmp_path / "link"
    link.symlink_to(val)
    for train, held_out in ((tmp_path / "elsewhere", True), (val, False), (link, False), (val.parent, False)):
        config.data.train = str(train)
        trained = shutil.copytree(run, tmp_path / f"run_{len(list(tmp_path.iterdir()))}")
        OmegaConf.save(config, trained / "config.yaml")
        assert evaluate_run(trained, device="cpu").provenance["held_out"] is held_out
    config.data.train, config.data.root, config.data.sources = None, str(tmp_path / "not here"), [{"name": "cc3m"}]
    OmegaConf.save(config, trained / "config.yaml")
    assert evaluate_run(trained, device="cpu").provenance["held_out"] is True


def test_names_that_are_no_utf8_are_written(run, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(2):
        picture(number).save(folder / f"\udcfc{number}.png")
    evaluated = evaluate_run(run, images=str(folder), report_path=tmp_path / "report.json", device="cpu")
    keys = [image["key"] for image in json.loads(evaluated.json_path.read_text())["images"]]
    assert keys == ["\udcfc0.png", "\udcfc1.png"] and evaluated.markdown_path.read_text(encoding="utf-8")


def test_names_of_255_bytes_are_written_and_read(run, tmp_path):
    """A name with a prefix or another suffix is cut, and names that differ at their ends stay apart."""
    names = write_long_names(tmp_path / "photos")
    report = tmp_path / f"{'r' * 250}.json"
    written = write_reconstructions(run, images=str(tmp_path / "photos"), out=tmp_path / "out", device="cpu")
    assert written.image_count == 3 and not written.skipped
    files = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert len(files) == 4 and [name[:8] for name in files[:2]] == ["00000_xx", "00001_xx"]
    evaluate_run(run, images=str(tmp_path / "photos"), report_path=report, device="cpu")
    assert [score["key"] for score in json.loads(report.read_text())["images"]] == names


def test_a_diverged_tokenizer_writes_no_pictures(tmp_path, run):
    diverged = tokenizer_of(0, channel_multipliers=[1, 1])
    diverged.decoder.conv_out.weight.data[0] = torch.finfo(torch.float32).max  # weights that are not finite are refused
    photos = OmegaConf.load(run / "config.yaml").data.val
    folder = write_run(tmp_path / "run", {"model": diverged.config, "data": {"val": photos}}, tokenizer=diverged)
    options = {"images": photos, "out": tmp_path / "out", "image_size": 32, "weights": "raw", "device": "cpu"}
    assert "is not finite" in refusal(TrainerError, write_reconstructions, folder, **options)
    assert not (tmp_path / "out").exists()
