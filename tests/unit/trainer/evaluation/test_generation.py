import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from comparing import refusal
from PIL import Image
from random_networks import accept, hashes_of, main_with_small_inception, one_thread
from support import frechet_distance_by_hand
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from data.errors import DataError
from data.locks import WriterLock, file_lock
from data.npz import Npz
from model_zoo.eval_nets.inception import Inception
from model_zoo.eval_nets.weights import WEIGHTS_FILES
from trainer import TrainerError
from trainer.evaluation.features import FeatureExtractor, FolderImages, NpzImages, _gathered
from trainer.evaluation.generation import evaluate_generation, open_reference, open_samples, sampling_record

pytestmark = pytest.mark.usefixtures("cache", "small_inception")


def pictures(count: int, seed: int = 0, side: int = 16) -> np.ndarray:
    """uint8 (count, side, side, 3) of a few large patches each."""
    patches = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), np.uint8)
    return patches.repeat(side // 4, axis=1).repeat(side // 4, axis=2)


def write_npz(path: Path, images: np.ndarray, **more) -> Path:
    np.savez(path, arr_0=images, **more)
    return path


def write_folder(path: Path, images: np.ndarray) -> Path:
    for number, image in enumerate(images):
        (path / f"part_{number % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path / f"part_{number % 2}" / f"{number:03d}.png")
    return path


@pytest.fixture
def samples(tmp_path) -> Path:
    return write_npz(tmp_path / "samples.npz", pictures(12))


@pytest.fixture
def reference(tmp_path) -> Path:
    return write_npz(tmp_path / "reference.npz", pictures(10, seed=1))


def evaluate(samples, reference, **options):
    return evaluate_generation(samples, reference, **{"device": "cpu", "batch_size": 4, **options}).report


def features_by_torch_fidelity(weights: Path, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    path, outputs = str(weights / WEIGHTS_FILES["inception"].file), ["2048", "logits_unbiased"]
    extractor = FeatureExtractorInceptionV3("inception-v3-compat", outputs, feature_extractor_weights_path=path)
    with torch.no_grad():
        return extractor(torch.from_numpy(images).permute(0, 3, 1, 2))


def test_all_figures_are_those_of_torch_fidelitys_features(weights, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.evaluation.features.Inception", Inception)  # the real one
    own, others = pictures(8), pictures(5, seed=1)  # few: the network is slow
    monkeypatch.setattr("trainer.evaluation.generation.SPLITS", 4)  # 10 would need more
    samples, reference = write_npz(tmp_path / "samples.npz", own), write_npz(tmp_path / "reference.npz", others)
    heard = []
    evaluated = evaluate_generation(
        samples, reference, device="cpu", batch_size=3, seed=3, on_progress=lambda *progress: heard.append(progress)
    )
    report = evaluated.report
    both_nd, logits_nk = features_by_torch_fidelity(weights, np.concatenate([own, others]))
    pool_nd, reference_nd = both_nd[:8], both_nd[8:]
    assert report.gfid == pytest.approx(frechet_distance_by_hand(pool_nd, reference_nd), rel=1e-6)
    theirs = isc_features_to_metric(logits_nk[:8][np.random.default_rng(3).permutation(8)], splits=4, shuffle=False)
    assert report.inception_score == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert report.inception_score_std == pytest.approx(theirs["inception_score_std"], rel=1e-3)
    options = dict(prc_neighborhood=3, prc_batch_size=4, save_cpu_ram=False, verbose=False)
    theirs = prc_features_to_metric(pool_nd, reference_nd, **options)
    assert (report.precision, report.recall) == pytest.approx((theirs["precision"], theirs["recall"]))
    assert report.precision != report.recall

    assert evaluated.json_path == tmp_path / "samples_generation.json"
    told = json.loads(evaluated.json_path.read_text())
    assert told["gfid"] == report.gfid and told["protocol"] == "adm" and told["not_measured"] == {}
    assert (told["sample_count"], told["reference_count"]) == (8, 5)
    assert told["reference_statistics"] == "computed from the 5 images of reference.npz"
    assert len(told["warnings"]) == 2 and all("only" in warning for warning in told["warnings"])
    assert "provenance" not in told
    manifest = told["manifest"]
    assert manifest["seed"] == 3 and "permutation" in manifest["order"]
    assert manifest["samples"]["path"] == str(samples) and manifest["reference"]["count"] == 5
    assert manifest["weights_files"]["inception"]["sha256"] == WEIGHTS_FILES["inception"].sha256
    assert manifest["environment"]["torch"] == torch.__version__
    text = evaluated.markdown_path.read_text()
    assert f"| **measured here** | {report.gfid:.2f} |" in text and "Warning" in text
    assert "| IBQ-AR-XXL | 2.05 | 286.73 | 0.83 | 0.57 |" in text
    assert {what for _, _, what in heard} == {"samples", "reference images", "blocks of precision and recall"}
    assert heard[2] == (8, 8, "samples")


def test_fid_takes_the_statistics_that_the_reference_stores_and_not_its_pictures(samples, tmp_path, monkeypatch):
    mean_d, root_dd = np.linspace(0, 1, 2048), np.diag(np.linspace(0.5, 1, 2048))
    stored = {"mu": mean_d, "sigma": root_dd, "mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    reference = write_npz(tmp_path / "reference.npz", pictures(10, seed=1), **stored)
    given = []
    monkeypatch.setattr("trainer.evaluation.generation.frechet_distance", lambda *moments: given.append(moments) or 1.5)
    report = evaluate(samples, reference)
    assert report.gfid == 1.5 and 0 <= report.precision <= 1 and report.reference_count == 10
    assert report.reference_statistics == "mu and sigma stored in reference.npz"
    [(_, _, other_mean_d, other_covariance_dd)] = given
    np.testing.assert_array_equal(other_mean_d, mean_d)
    np.testing.assert_array_equal(other_covariance_dd, root_dd)

    np.savez(tmp_path / "alone.npz", **stored)
    report = evaluate(samples, tmp_path / "alone.npz")
    assert report.gfid == 1.5 and report.precision is None and report.reference_count == 0
    assert set(report.not_measured) == {"precision", "recall"}
    assert "statistics only" in report.not_measured["recall"]
    with pytest.raises(TrainerError, match=r"--metrics pr: .*alone\.npz holds statistics only"):
        evaluate(samples, tmp_path / "alone.npz", metrics="fid,pr")


def test_a_folder_and_an_npz_of_the_same_pictures_have_the_same_figures(samples, reference, tmp_path):
    in_order = pictures(12)
    folder = write_folder(tmp_path / "folder", in_order)
    by_name = np.concatenate([in_order[::2], in_order[1::2]])  # part_0 comes before part_1
    of_npz = evaluate(write_npz(tmp_path / "sorted.npz", by_name), reference, metrics="is,pr")
    of_folder = evaluate(folder, reference, metrics="is,pr")
    for name in ("inception_score", "inception_score_std", "precision", "recall"):
        assert getattr(of_folder, name) == getattr(of_npz, name)
    assert of_folder.gfid is None and of_folder.not_measured == {"gfid": "not among --metrics"}


def test_the_shuffle_mends_an_order_by_class_and_its_seed_is_told(reference, tmp_path):
    mixed = write_npz(tmp_path / "mixed.npz", pictures(12), classes=np.arange(12) % 4)
    scores = {seed: evaluate(mixed, reference, metrics="is", seed=seed).inception_score for seed in (0, 1)}
    assert scores[0] != scores[1]
    assert evaluate(mixed, reference, metrics="is", seed=1).inception_score == scores[1]


@pytest.fixture
def few(tmp_path) -> Path:
    return write_npz(tmp_path / "few.npz", pictures(4))


def extract(pictures, cache, world) -> tuple[np.ndarray, bool]:
    found = FeatureExtractor(world, 4, cache).extract(pictures, lambda *progress: None)
    return found.features.pool_nd.numpy(), found.from_cache


def test_features_are_kept_for_the_same_content_and_weights_alone(few, tmp_path, world, weights):
    cache = tmp_path / "kept"
    own = NpzImages(Npz(few))
    first_nd, from_cache = extract(own, cache, world)
    assert not from_cache
    again_nd, from_cache = extract(own, cache, world)
    assert from_cache and np.array_equal(first_nd, again_nd)
    assert not extract(own, None, world)[1]

    # Other content under the same name, other pictures, a pixel that changed.
    changed = pictures(4)
    changed[2, 0, 0, 0] ^= 1
    write_npz(few, changed)
    other_nd, from_cache = extract(NpzImages(Npz(few)), cache, world)
    assert not from_cache and not np.array_equal(first_nd[2], other_nd[2]) and np.array_equal(first_nd[3], other_nd[3])

    # Other weights.
    write_npz(few, pictures(4))
    assert extract(NpzImages(Npz(few)), cache, world)[1]
    (tmp_path / "other").mkdir()
    os.environ["IBQ_WEIGHTS"] = str(tmp_path / "other")  # the fixture takes it back
    (tmp_path / "other" / WEIGHTS_FILES["inception"].file).write_bytes(b"other weights")
    accept(hashes_of(tmp_path / "other"))
    other_nd, from_cache = extract(NpzImages(Npz(few)), cache, world)
    assert not from_cache and not np.allclose(first_nd, other_nd)


def test_a_folder_is_known_by_its_files_content(tmp_path, world):
    folder = write_folder(tmp_path / "folder", pictures(6))
    extract(FolderImages(folder), tmp_path / "kept", world)
    assert extract(FolderImages(folder), tmp_path / "kept", world)[1]
    Image.fromarray(pictures(1, seed=9)[0]).save(folder / "part_1" / "003.png")
    assert not extract(FolderImages(folder), tmp_path / "kept", world)[1]


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def of_another(path: Path) -> None:
    """As if two hashes were the same but for the first 32 digits."""
    with np.load(path) as arrays:
        kept = dict(arrays)
    np.savez(path, **{**kept, "pictures": "0" * 64})


@pytest.mark.parametrize("damage", [cut_off, flip_a_bit, of_another])
def test_a_damaged_cache_is_made_anew(few, tmp_path, world, damage):
    own, cache = NpzImages(Npz(few)), tmp_path / "kept"
    first_nd, _ = extract(own, cache, world)
    [file] = cache.iterdir()
    damage(file)
    again_nd, from_cache = extract(own, cache, world)
    assert not from_cache and np.array_equal(first_nd, again_nd)
    assert [path.name for path in cache.iterdir()] == [file.name]
    assert extract(own, cache, world)[1]


def test_features_that_killed_processes_left_are_removed(few, tmp_path, world):
    folder = tmp_path / "features"
    folder.mkdir()
    for name in (".features_adm_0.npz.node-7.unfinished", "mine.txt"):
        (folder / name).write_text("half")
    extract(NpzImages(Npz(few)), folder, world)
    (features,) = folder.glob("features_*.npz")
    assert sorted(path.name for path in folder.iterdir()) == [features.name, "mine.txt"]


def test_a_cache_that_cannot_be_written_is_a_warning(samples, reference, tmp_path):
    (tmp_path / "file").touch()
    report = evaluate(samples, reference, metrics="is", cache=tmp_path / "file" / "kept")
    assert report.inception_score > 0
    assert any("features were not cached" in warning for warning in report.warnings)


def test_a_place_that_is_there_twice_is_found(world):
    with pytest.raises(AssertionError, match="exactly once"):
        _gathered(world, [0, 1, 1], torch.zeros(3, 3056))


def test_three_processes_have_the_results_of_one(samples, tmp_path, weights, ranks, monkeypatch):
    """Each process has one batch of the samples; the last one has none of the two batches of the folder."""
    folder = write_folder(tmp_path / "folder", pictures(7, seed=1))
    with one_thread():  # as each of the three; the standard deviation of similar scores is sensitive to rounding
        alone = evaluate(samples, folder, metrics="is,pr", cache="none")
    arguments = "evaluate", "generation", "--samples", samples, "--reference", folder, "--metrics", "is,pr"
    options = "--batch-size", 4, "--device", "cpu", "--report", tmp_path / "many.json"
    environment = {"IBQ_WEIGHTS": str(weights), "IBQ_CACHE": str(tmp_path / "cache")}
    command = [*map(str, (*arguments, *options))]
    finished = ranks.command(3, main_with_small_inception, command, environment=environment)
    assert finished.status == 0, finished.err
    assert finished.out.count("12 samples (protocol: adm)") == 1
    together = json.loads((tmp_path / "many.json").read_text())
    for name in ("inception_score", "inception_score_std", "precision", "recall"):
        assert together[name] == pytest.approx(getattr(alone, name), rel=1e-6)
    assert together["manifest"]["processes"] == 3
    # Their cached features are complete and in order: one process uses them.
    monkeypatch.setattr(FeatureExtractor, "_own_features", lambda *_: pytest.fail("the features were there"))
    assert evaluate(samples, folder, metrics="is,pr").inception_score == together["inception_score"]


def test_a_missing_weights_file_is_one_line_on_every_process(samples, reference, tmp_path, monkeypatch, refused_by_ibq):
    monkeypatch.setenv("IBQ_WEIGHTS", str(tmp_path))
    said = refused_by_ibq("evaluate", "generation", "--samples", samples, "--reference", reference)
    assert "weights-inception-2015-12-05-6726825d.pth" in said and "IBQ_WEIGHTS" in said


def test_mistakes_of_the_user_are_one_line(samples, reference, tmp_path, refused_by_ibq):
    one = write_npz(tmp_path / "one.npz", pictures(1))
    floats = write_npz(tmp_path / "floats.npz", pictures(3) / 255)
    np.savez(tmp_path / "none.npz", other=np.zeros(3))
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(5), sigma=np.eye(5))
    (tmp_path / "empty").mkdir()
    sizes = write_folder(tmp_path / "sizes", pictures(3))
    Image.fromarray(pictures(1, side=32)[0]).save(sizes / "part_1" / "002.png")
    unreadable = write_folder(tmp_path / "unreadable", pictures(3))
    (unreadable / "part_1" / "001.png").write_bytes(b"no picture")
    nine = write_npz(tmp_path / "nine.npz", pictures(9))
    for (first, second, *more), said in {
        (tmp_path / "x.npz", reference): "no such file or folder",
        (one, reference): "holds 1 image: at least 2 samples",
        (samples, one): "holds 1 image: a reference needs at least 2",
        (floats, reference): "arr_0 is float64 of shape (3, 16, 16, 3), but images are uint8",
        (tmp_path / "none.npz", reference): "holds no arr_0",
        (samples, tmp_path / "none.npz"): "neither arr_0",
        (samples, tmp_path / "statistics.npz"): "mu is float64 of shape (5,), but must be (2048,) floats",
        (tmp_path / "empty", reference): "no image in the folder",
        (sizes, reference): "part_1/002.png is 32x32, part_0/000.png is 16x16: all images must have one size",
        (unreadable, reference): "001.png",
        (nine, reference, "--metrics", "is"): "--metrics is: 10 splits need at least 10 samples, not 9",
        (samples, reference, "--metrics", "rfid"): "--metrics rfid is unknown",
        (samples, reference, "--batch-size", 0): "--batch-size 0",
        (samples, reference, "--seed", -1): "--seed -1",
        (samples, reference, "--report", tmp_path / "x.txt"): "ends in .json",
        (samples, reference, "--report", samples / "x.json"): "cannot write",
        (samples, reference, "--report", "/proc/x.json"): "cannot write /proc/x.json",
        (samples, reference, "--device", "tpu"): "--device tpu is unknown",
        (samples, reference, "--sweep", "guidance=1"): "need --generator",
    }.items():
        assert said in refused_by_ibq("evaluate", "generation", "--samples", first, "--reference", second, *more)
    assert not list(tmp_path.glob("*_generation.*"))


def test_a_report_replaces_only_reports_of_its_kind_and_has_one_writer(samples, reference, tmp_path):
    report = tmp_path / "r.json"
    for name, content in {"r.json": '{"psnr": 1, "manifest": {}}', "r.md": "# Reconstruction of 3 images"}.items():
        (tmp_path / name).write_text(content)
        said = refusal(TrainerError, evaluate, samples, reference, metrics="is", report_path=report)
        assert f"{tmp_path / name} already exists and is of no earlier report" in said
        assert (tmp_path / name).read_text() == content
        (tmp_path / name).unlink()
    with WriterLock(file_lock(report), "r.json") as other:
        other.take()
        said = refusal(TrainerError, evaluate, samples, reference, metrics="is", report_path=report)
        assert said.startswith(f"{report} is being written by process ")
    for _ in range(2):
        evaluate(samples, reference, metrics="is", report_path=report)


def damaged_statistics() -> dict[str, dict[str, np.ndarray]]:
    """What is wrong -> arrays of an .npz."""
    mean_d, covariance_dd = np.zeros(2048), np.eye(2048)
    spoilt = {name: covariance_dd.copy() for name in ("nan", "skewed", "one")}
    spoilt["nan"][3, 4] = np.nan
    spoilt["skewed"][3, 4] = 0.5
    spoilt["one"][7, 7] = -1e-3
    return {
        "the negative eigenvalue -1 (": {"mu": mean_d, "sigma": -covariance_dd},
        "the negative eigenvalue -0.001 (the largest is 1)": {"mu": mean_d, "sigma": spoilt["one"]},
        "not symmetric": {"mu": mean_d, "sigma": spoilt["skewed"]},
        "the covariance is not finite": {"mu": mean_d, "sigma": spoilt["nan"]},
        "the mean is not finite": {"mu": mean_d + np.inf, "sigma": covariance_dd},
        "sigma is float64 of shape (2048,), but must be": {"mu": mean_d, "sigma": np.ones(2048)},
        "mu is float64 of shape (2047,), but must be": {"mu": mean_d[1:], "sigma": covariance_dd},
        "mu is float16 of shape": {"mu": mean_d.astype(np.float16), "sigma": covariance_dd},
        "mu is int64": {"mu": mean_d.astype(int), "sigma": covariance_dd},
        "holds mu without sigma": {"mu": mean_d},
        "holds sigma without mu": {"sigma": covariance_dd},
    }


@pytest.mark.parametrize("said", damaged_statistics())
def test_damaged_statistics_of_a_reference_are_refused(tmp_path, said):
    """A covariance of negative eigenvalues had gFID 0, the best possible one."""
    path = write_npz(tmp_path / "reference.npz", pictures(10), **damaged_statistics()[said])
    message = refusal(DataError, open_reference, path)
    assert said in message and str(path) in message and ("again" in message or "must be" in message)


def test_statistics_of_any_byte_order_and_rounding_are_read(tmp_path):
    root_nd = np.random.default_rng(0).normal(size=(100, 2048))
    covariance_dd = np.cov(root_nd, rowvar=False).astype(">f4")  # 1,949 eigenvalues are 0, but for rounding
    np.savez(tmp_path / "statistics.npz", mu=root_nd.mean(0).astype(">f4"), sigma=covariance_dd)
    statistics = open_reference(tmp_path / "statistics.npz").statistics
    np.testing.assert_array_equal(statistics.covariance_dd, covariance_dd)


def test_features_that_are_not_finite_are_refused(samples, tmp_path, world, monkeypatch):
    extractor = FeatureExtractor(world, 8, tmp_path / "features")
    assert extractor.extract(open_samples(samples), lambda *_: None).features is not None
    monkeypatch.setattr(extractor._inception, "adm", lambda batch: (torch.full((len(batch), 2048), torch.nan),))
    for path in (tmp_path / "features").iterdir():
        path.unlink()
    said = refusal(TrainerError, extractor.extract, open_samples(samples), lambda *_: None)
    assert f"Inception's features of the 8 images from number 0 on in {samples} are not finite" in said


def test_a_report_of_sampling_is_believed_of_the_very_samples_only(samples, tmp_path):
    def told(path, content="", **finished):
        manifest = tmp_path / "samples.npz.json" if path == samples else path / "sample.json"
        account = {"settings": {"seed": 3, "classes": [1]}, "source": "run", "checkpoint": "step_1"}
        manifest.write_text(json.dumps({**account, "finished": finished}))
        return sampling_record(path, content)

    size, sha256 = samples.stat().st_size, hashlib.sha256(samples.read_bytes()).hexdigest()
    believed = told(samples, sha256, bytes=size, sha256=sha256)
    assert believed.pop("classes").startswith("1 (")
    assert believed == {"source": "run", "checkpoint": "step_1", "seed": 3}
    changed = (
        f"{samples} is not what {samples}.json says it wrote: it was damaged or changed; sample it again, or remove"
    )
    assert changed in refusal(DataError, told, samples, "0" * 64, bytes=size, sha256=sha256)  # overwritten since
    assert changed in refusal(DataError, told, samples, sha256, bytes=size + 1, sha256=sha256)
    assert changed in refusal(DataError, open_samples, samples)  # before hours of features
    assert told(samples, sha256, images_made=12) is None  # of an older version
    assert told(samples, sha256, bytes=size) is None
    folder = write_folder(tmp_path / "folder", pictures(3))
    size = sum(path.stat().st_size for path in folder.rglob("*.png"))
    assert told(folder, bytes=size).items() > believed.items()
    assert "damaged or changed" in refusal(DataError, told, folder, bytes=size - 1)


def test_samples_that_are_still_being_made_are_refused(tmp_path):
    folder = write_folder(tmp_path / "folder", pictures(3))
    record = {"settings": {"count": 8}, "source": "run", "checkpoint": "step_1", "finished": None}
    (folder / "sample.json").write_text(json.dumps(record))
    for opened in (open_samples, open_reference):
        assert f"{folder} is not finished: wait for" in refusal(DataError, opened, folder)
    size = sum(path.stat().st_size for path in folder.rglob("*.png"))
    (folder / "sample.json").write_text(json.dumps({**record, "finished": {"bytes": size}}))
    assert open_samples(folder).count == open_reference(folder).images.count == 3
    for change in ((folder / "part_0" / "000.png").unlink, lambda: write_folder(folder, pictures(4))):
        change()
        for opened in (open_samples, open_reference):
            assert "it was damaged or changed; sample it again, or remove" in refusal(DataError, opened, folder)
    (folder / "sample.json").write_text("{")
    assert "sample.json is damaged" in refusal(DataError, open_samples, folder)


def test_a_folder_that_changes_while_it_is_evaluated_is_refused(tmp_path):
    folder = write_folder(tmp_path / "folder", pictures(3))
    images = FolderImages(folder)
    assert sum(len(batch.levels_bchw) for batch in images.batches(2, (0, 1))) == 3
    write_folder(folder, pictures(4))
    assert "got or lost images" in refusal(DataError, lambda: list(images.batches(2, (0, 1))))


def test_features_of_images_that_changed_after_they_were_hashed_are_not_cached(reference, tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "folder", pictures(4))
    real = FolderImages.sha256

    def changed(images):
        found = real(images)
        if images.path == folder:
            write_folder(folder, pictures(4, seed=9))
        return found

    monkeypatch.setattr(FolderImages, "sha256", changed)
    said = refusal((TrainerError, DataError), evaluate, folder, reference)
    assert f"{folder} was changed while it was evaluated: start again when nothing writes there" in said


def test_what_few_pictures_do_not_allow_is_left_out_with_the_reason(reference, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.evaluation.generation.frechet_distance", lambda *moments: 1.5)
    report = evaluate(write_npz(tmp_path / "three.npz", pictures(3, side=32)), reference)
    assert report.gfid == 1.5
    assert report.inception_score is None and report.precision is None
    assert "at least 10 samples, not 3" in report.not_measured["inception_score"]
    assert "more than 3 images, not 3 samples" in report.not_measured["recall"]
    assert "the samples have 32x32 pixels, the reference images 16x16" in report.warnings
