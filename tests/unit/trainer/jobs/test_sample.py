import copy
import hashlib
import json
import re
import shutil
import signal
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch
from comparing import refusal, unchanged
from model_checks import tokenizer_of, write_run
from PIL import Image
from ranks import wait_for
from support import generator_of, generator_run, write_generator_run, write_tokenizer_run

import trainer.jobs.sample
import trainer.jobs.sample_output
from data.locks import WriterLock, file_lock
from model_zoo import ModelError, Sampler, Sampling
from model_zoo.conditions import trained_from
from model_zoo.io.load import find_checkpoint
from tools import cli
from trainer import TrainerError
from trainer.jobs.export import export
from trainer.jobs.sample import sample
from trainer.jobs.sample_output import seed_of


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    """A generator's run, without an average, that names its tokenizer's."""
    folder = tmp_path_factory.mktemp("own")
    tokenizer = write_tokenizer_run(folder / "tokenizer", tokenizer_of())
    return write_generator_run(folder / "run", generator_of(), tokenizer)


@pytest.fixture(scope="module")
def models(own_run):
    return trainer.jobs.sample._load_models(find_checkpoint(own_run), None, None)


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A run whose generator knows images of 8 x 12, 12 x 8 and 4 x 20 pixels."""
    folder = tmp_path_factory.mktemp("several")
    tokenizer = write_tokenizer_run(folder / "tokenizer", tokenizer_of())
    return write_generator_run(folder / "run", generator_of(grids=["2x3", "3x2", "1x5"]), tokenizer)


@pytest.fixture
def run(own_run, models, monkeypatch):
    """The run, whose models are not read again for each job in this process."""
    load = trainer.jobs.sample._load_models

    def load_models(checkpoint, weights, tokenizer):
        if (checkpoint, weights, tokenizer) == (models.checkpoint, None, None):
            return copy.deepcopy(models)
        return load(checkpoint, weights, tokenizer)

    monkeypatch.setattr(trainer.jobs.sample, "_load_models", load_models)
    yield own_run
    shutil.rmtree(own_run / "sampled", ignore_errors=True)


def load(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


# -------------------------------------------------------------------------------------------------------------- outputs


def test_npz(run, tmp_path):
    out, heard = tmp_path / "new" / "x.npz", []
    sampled = sample(run, classes="1,4", count=7, out=out, batch_size=3, on_progress=lambda *a: heard.append(a))
    arrays = load(out)
    assert list(arrays) == ["arr_0", "classes"]
    assert arrays["arr_0"].shape == (7, 8, 12, 3) and arrays["arr_0"].dtype == np.uint8
    assert len(np.unique(arrays["arr_0"].reshape(7, -1), axis=0)) == 7
    assert arrays["classes"].tolist() == [1, 4, 1, 4, 1, 4, 1] and arrays["classes"].dtype == np.int64
    assert [done for done, _, _ in heard] == [3, 6, 7] and {count for _, count, _ in heard} == {7}
    assert sampled.images == sampled.made == 7 and sampled.images_per_second > 0
    report = json.loads(sampled.report.read_text())
    assert sampled.report == tmp_path / "new" / "x.npz.json"
    assert report["settings"]["seed"] == 0 and report["settings"]["weights"] == "raw"
    assert report["checkpoint"] == "step_00000003" and report["images_per_class"] == {"1": 4, "4": 3}
    content = out.read_bytes()
    assert report["finished"]["bytes"] == len(content)
    assert report["finished"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert report["finished"]["images_made"] == 7 and report["finished"]["images_per_second"] > 0
    assert sorted(path.name for path in out.parent.iterdir()) == ["x.npz", "x.npz.json"]


def test_folder(run, tmp_path):
    sample(run, classes="1,4", count=3, batch_size=2)
    names = ["000000_class_0001.png", "000001_class_0004.png", "000002_class_0001.png"]
    assert sorted(path.name for path in (run / "sampled").iterdir()) == [*names, "sample.json"]
    sample(run, classes="1,4", count=3, batch_size=2, out=tmp_path / "x.npz")
    finished = json.loads((run / "sampled" / "sample.json").read_text())["finished"]
    assert finished["bytes"] == sum((run / "sampled" / name).stat().st_size for name in names)
    pictures = np.stack([np.array(Image.open(run / "sampled" / name)) for name in names])
    assert np.array_equal(pictures, load(tmp_path / "x.npz")["arr_0"])


def test_grid_has_a_row_for_each_class(run, tmp_path):
    for count, size in ((5, (3 * 12, 2 * 8)), (2, (2 * 12, 8))):
        sample(run, classes="1,4", count=count, batch_size=2, out=tmp_path / f"{count}.png")
        sample(run, classes="1,4", count=count, batch_size=2, out=tmp_path / f"{count}.npz")
        grid = Image.open(tmp_path / f"{count}.png")
        assert grid.size == size
    grid, images = np.array(Image.open(tmp_path / "5.png")), load(tmp_path / "5.npz")["arr_0"]
    assert np.array_equal(grid[:8, 12:24], images[2]) and np.array_equal(grid[8:, 12:24], images[3])
    assert (grid[8:, 24:] == 255).all()  # the sixth is not


def test_images_are_the_tokenizers_rounded(run, tmp_path):
    sample(run, classes="2", count=2, out=tmp_path / "x.npz", sampling={"guidance": 2.0, "top_k": 9})
    generator, decoder = generator_of().eval(), tokenizer_of().eval()
    sampler = Sampler(generator, 32)
    settings = Sampling(guidance=2.0, top_k=9)
    index_bhw = sampler.sample(torch.tensor([2, 2]), [seed_of(0, 2, 0), seed_of(0, 2, 1)], settings)
    images_bhwc = decoder.detokenize(index_bhw).permute(0, 2, 3, 1)
    expected = ((images_bhwc.clamp(-1, 1) + 1) / 2 * 255).round().numpy().astype(np.uint8)
    assert np.array_equal(load(tmp_path / "x.npz")["arr_0"], expected)


def test_an_image_of_a_class_is_the_same_in_every_job(run, tmp_path):
    sample(run, out=tmp_path / "all.npz", count=12, batch_size=4)
    sample(run, out=tmp_path / "one.npz", count=2, batch_size=4, classes="3")
    every, one = load(tmp_path / "all.npz"), load(tmp_path / "one.npz")
    assert every["classes"].tolist() == [0, 1, 2, 3, 4, 5] * 2
    assert np.array_equal(every["arr_0"][every["classes"] == 3], one["arr_0"])
    sample(run, out=tmp_path / "other.npz", count=2, batch_size=4, classes="3", seed=1)
    assert not np.array_equal(load(tmp_path / "other.npz")["arr_0"], one["arr_0"])


def test_published_checkpoint_with_its_tokenizer(tmp_path):
    generator = generator_of(grid=[16, 16], heads=1, head_dim=64)
    state = {f"transformer.{name}": tensor for name, tensor in generator.state_dict().items()}
    plain = tokenizer_of(patch_size=1, channel_multipliers=[1, 2])
    state.update({f"first_stage_model.{name}": tensor for name, tensor in plain.state_dict().items()})
    torch.save({"state_dict": state}, tmp_path / "ar.ckpt")
    sampled = sample(tmp_path / "ar.ckpt", count=2)
    assert sampled.out == tmp_path / "ar_sampled" and len(list(sampled.out.glob("*.png"))) == 2
    assert Image.open(next(sampled.out.glob("*.png"))).size == (32, 32)


def test_ema_where_the_run_keeps_one_and_no_class(tmp_path):
    tokenizer = write_tokenizer_run(tmp_path / "tokenizer", tokenizer_of())
    config = generator_run()
    config.ema.decay, config.loss.label_dropout, config.tokenizer.source = 0.9, 1.0, str(tokenizer)
    write_run(tmp_path / "run", config, generator=generator_of(1), generator_ema=generator_of(2))
    first = sample(tmp_path / "run", count=2, precision="bf16")
    assert json.loads(first.report.read_text())["settings"]["weights"] == "ema"
    assert (first.out / "000001_class_none.png").exists()


def test_what_was_never_trained_is_refused_before_anything_is_written(tmp_path, ibq, refused_by_ibq):
    tokenizer = write_tokenizer_run(tmp_path / "tokenizer", tokenizer_of())
    generator = generator_of()
    generator.trained_c = trained_from("1,3-4", 6)
    run = write_generator_run(tmp_path / "run", generator, tokenizer)
    common = "sample", run, "--device", "cpu", "--count", 3
    assert "this one was not: use guidance 1 (--guidance 1" in refused_by_ibq(*common, "--guidance", 3)
    assert "never trained with class 2: choose --classes among 1,3-4" in refused_by_ibq(*common, "--classes", "1-2")
    assert "never trained without a class" in refused_by_ibq(*common, "--classes", "none")
    assert not (run / "sampled").exists()
    assert ibq(*common, "--guidance", 1).status == 0  # the fix that is named, and only classes that were trained
    assert json.loads((run / "sampled/sample.json").read_text())["settings"]["classes"] == [1, 3, 4]


def test_grids_that_were_never_trained_are_refused_before_anything_is_written(tmp_path, ibq, refused_by_ibq):
    tokenizer = write_tokenizer_run(tmp_path / "tokenizer", tokenizer_of())
    generator = generator_of(grids=["2x3", "3x2", "1x5"])
    generator.trained_g = torch.tensor([False, True, True])
    run = write_generator_run(tmp_path / "run", generator, tokenizer)
    common = "sample", run, "--device", "cpu", "--count", 3
    said = refused_by_ibq(*common)
    assert "never trained on images of its default size 8x12: choose with --size: 12x8 or 4x20" in said
    said = refused_by_ibq(*common, "--size", "8x12")
    assert "--size 8x12: the generator was never trained on such images: choose 12x8 or 4x20" in said
    assert not (run / "sampled").exists()
    assert ibq(*common, "--size", "12x8").status == 0
    sampler = Sampler(generator.eval(), 1)
    said = refusal(ModelError, sampler.sample, torch.tensor([1]), [0], Sampling())
    assert said == "the generator was never trained on the grid 2x3: choose among 3x2,1x5"


def test_a_run_of_an_earlier_version_is_judged_by_its_recipe(tmp_path):
    tokenizer = write_tokenizer_run(tmp_path / "tokenizer", tokenizer_of())
    config = generator_run()
    config.loss.label_dropout, config.tokenizer.source = 0.0, str(tokenizer)
    run = write_run(tmp_path / "run", config, generator=generator_of())
    message = refusal(ModelError, sample, run, count=1, device="cpu", sampling={"guidance": 3.0})
    assert "guidance 3 needs a generator that was also trained without a class" in message


def settings_of(sampled):
    return json.loads(sampled.report.read_text())["settings"]


def test_images_of_another_size(several, tmp_path):
    found = sample(several, size="4x20", count=3, classes="2", out=tmp_path / "x.npz")
    assert settings_of(found)["size"] == "4x20"
    sampler = Sampler(generator_of(grids=["2x3", "3x2", "1x5"]), 32)
    seeds = [seed_of(0, 2, nth) for nth in range(3)]
    index_bhw = sampler.sample(torch.tensor([2, 2, 2]), seeds, Sampling(), grid=(1, 5))
    images_bhwc = tokenizer_of().eval().detokenize(index_bhw).permute(0, 2, 3, 1)
    expected = ((images_bhwc.clamp(-1, 1) + 1) / 2 * 255).round().numpy().astype(np.uint8)
    assert expected.shape == (3, 4, 20, 3) and np.array_equal(load(tmp_path / "x.npz")["arr_0"], expected)
    sample(several, size="4x20", count=3, classes="2", out=tmp_path / "x.png")
    grid = np.array(Image.open(tmp_path / "x.png"))
    assert grid.shape == (8, 40, 3) and np.array_equal(grid[4:, :20], expected[2])
    sample(several, size="4x20", count=3, classes="2", out=tmp_path / "folder")
    assert np.array_equal(np.array(Image.open(tmp_path / "folder" / "000002_class_0002.png")), expected[2])


def test_the_size_is_a_setting_of_the_job(several, tmp_path, ibq, refused_by_ibq):
    command = "sample", several, "--count", 2, "--out", tmp_path / "x", "--device", "cpu"
    ibq(*command).succeeded()
    said = refused_by_ibq(*command, "--size", "12x8")
    assert 'other settings (size "8x12", now "12x8"): give --size 8x12 again to continue' in said
    assert "all images existed already" in ibq(*command, "--size", "8x12").succeeded().out
    record = json.loads((tmp_path / "x" / "sample.json").read_text())
    del record["settings"]["size"]  # as earlier versions wrote it
    (tmp_path / "x" / "sample.json").write_text(json.dumps(record))
    assert "all images existed already" in ibq(*command).succeeded().out


@pytest.mark.parametrize("size", ["12x12", "8x13", "9", "8x12x3", "", "large"])
def test_a_size_of_no_grid_is_refused(several, refused_by_ibq, size):
    said = refused_by_ibq("sample", several, "--size", size, "--device", "cpu")
    named = f"{size}x{size}" if size.isdecimal() else size
    assert f"--size {named}: the generator makes no such images" in said and "choose 8x12 or 12x8 or 4x20" in said
    assert not (several / "sampled").exists()


# --------------------------------------------------------------------------------------------------------------- resume


def test_a_job_that_is_done_says_so_and_other_settings_are_refused(run, tmp_path):
    for out in ("x.npz", "x.png", "folder"):
        options = {"count": 4, "batch_size": 2, "out": tmp_path / out}
        assert sample(run, **options).made == 4
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        assert sample(run, **options).made == 0
        said = refusal(TrainerError, sample, run, **options, sampling={"temperature": 0.5})
        assert "other settings (temperature 1.0, now 0.5): give --temperature 1.0 again to continue" in said
        assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


@pytest.mark.parametrize("out", ["x.npz", "x.png", "folder"])
@pytest.mark.parametrize("change", ["cut", "flipped"])
def test_a_damaged_output_is_not_taken_for_complete(run, tmp_path, out, change):
    options = {"count": 4, "batch_size": 2, "out": tmp_path / out}
    sample(run, **options)
    file = tmp_path / out if out != "folder" else next((tmp_path / out).glob("000002*.png"))
    whole = file.read_bytes()
    if change == "cut":
        file.write_bytes(whole[:-10])
    elif out == "x.npz":  # the record has a hash of this kind only
        file.write_bytes(whole[:300] + bytes([whole[300] ^ 1]) + whole[301:])
    else:
        file.write_bytes(b"")
        if out == "folder":
            assert sample(run, **options).made == 2 and file.read_bytes() == whole
            return
    said = refusal(TrainerError, sample, run, **options)
    assert f"{tmp_path / out} is not what" in said and "remove it to sample it again" in said
    shutil.rmtree(tmp_path / out) if out == "folder" else file.unlink()
    assert sample(run, **options).made == 4
    assert file.read_bytes() == whole


def test_a_folder_that_lost_one_image_and_has_another_changed_is_not_vouched_for(run, tmp_path):
    """Also where the job that makes the lost one again is stopped and repeated."""
    out = tmp_path / "folder"
    options = {"count": 6, "batch_size": 2, "out": out}
    sample(run, **options)
    record = json.loads((out / "sample.json").read_text())
    lost, other = sorted(out.glob("*.png"))[:4:3]
    whole = lost.read_bytes(), other.read_bytes()
    lost.unlink()
    assert sample(run, **options).made == 2 and lost.read_bytes() == whole[0]  # nothing else was changed
    assert json.loads((out / "sample.json").read_text())["finished"]["bytes"] == record["finished"]["bytes"]
    lost.unlink()
    Image.new("RGB", (12, 8), "red").save(other)
    for _ in range(2):
        said = refusal(TrainerError, sample, run, **options)
        assert "was damaged or changed; remove it to sample it again" in said
        assert json.loads((out / "sample.json").read_text())["finished"] is None
    other.write_bytes(whole[1])
    assert sample(run, **options).made == 0


def test_the_record_names_the_weights_that_were_there(run, tmp_path):
    """An export holds one set, which either name reads."""
    export(run, tmp_path / "export", weights="raw")
    sampled = sample(tmp_path / "export", count=1, out=tmp_path / "samples")
    assert json.loads(sampled.report.read_text())["settings"]["weights"] == "raw"


@pytest.mark.parametrize("out", ["x.npz", "x.png", "folder"])
def test_an_output_has_one_writer(run, tmp_path, out):
    with WriterLock(file_lock(tmp_path / out), out) as other:
        other.take()
        said = refusal(TrainerError, sample, run, count=2, out=tmp_path / out)
        assert said.startswith(f"{tmp_path / out} is being written by process ")
    sample(run, count=2, out=tmp_path / out)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".lock")]


def test_the_current_folder_can_be_the_output(run, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert sample(run, count=2, out=".").made == 2
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "000000_class_0000.png",
        "000001_class_0001.png",
        "here",
        "sample.json",
    ]


def sample_four(run, out, **options) -> None:
    """Starts a job and interrupts it after four images."""

    def stop(done, count, per_second):
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(run, **options, out=out, on_progress=stop)


@pytest.mark.parametrize("out", ["x.npz", "x.png", "folder"])
def test_a_job_continues_where_it_ended(run, tmp_path, out):
    options = {"count": 7, "batch_size": 2}
    sample(run, **options, out=tmp_path / "whole" / out)
    sample_four(run, tmp_path / out, **options)
    assert "seed 0, now 3" in refusal(TrainerError, sample, run, **options, out=tmp_path / out, seed=3)
    went_on = sample(run, **options, out=tmp_path / out)
    assert went_on.made == 3
    files = [path for path in (tmp_path / "whole").rglob("*") if path.suffix in (".npz", ".png")]
    assert files
    for path in files:
        assert path.read_bytes() == (tmp_path / path.relative_to(tmp_path / "whole")).read_bytes()
    assert not list(tmp_path.glob("*.parts"))


@pytest.mark.parametrize("out", ["x.npz", "x.png", "folder"])
@pytest.mark.parametrize("left", [0, 5, 150])
def test_a_chunk_that_a_crash_cut_off_is_made_again(run, tmp_path, out, left):
    options = {"count": 6, "batch_size": 2}
    sample(run, **options, out=tmp_path / "whole" / out)
    sample_four(run, tmp_path / out, **options)
    parts = tmp_path / out if out == "folder" else tmp_path / f"{out}.parts"
    cut = sorted(path for path in parts.iterdir() if path.suffix in (".png", ".npy"))[1]
    assert cut.stat().st_size > left
    cut.write_bytes(cut.read_bytes()[:left])
    assert sample(run, **options, out=tmp_path / out).made == 4
    for path in (tmp_path / "whole").rglob("*"):
        if path.suffix in (".npz", ".png") and path.is_file():
            assert path.read_bytes() == (tmp_path / path.relative_to(tmp_path / "whole")).read_bytes()


def test_kill_between_merging_and_the_report_loses_nothing(run, tmp_path, monkeypatch):
    write_json = trainer.jobs.sample_output.write_json

    def killed(path, content):
        if path.suffix == ".json" and path.parent == tmp_path:
            raise KeyboardInterrupt
        write_json(path, content)

    monkeypatch.setattr(trainer.jobs.sample_output, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        sample(run, count=3, out=tmp_path / "x.npz")
    monkeypatch.undo()
    assert sample(run, count=3, out=tmp_path / "x.npz").made == 0
    assert load(tmp_path / "x.npz")["arr_0"].shape[0] == 3
    assert not (tmp_path / "x.npz.parts").exists()


def test_any_number_of_processes_makes_the_same_images_and_continues_after_a_kill(run, tmp_path, ranks):
    common = ["sample", str(run), "--device", "cpu", "--count"]
    sample(run, count=9, batch_size=2, device="cpu", out=tmp_path / "one.npz")
    two = ranks.command(2, cli.main, [*common, "9", "--batch-size", "2", "--out", str(tmp_path / "two.npz")])
    assert two.status == 0, two.err
    assert two.out.count("9 images sampled") == 1 and str(tmp_path / "two.npz") in two.out
    assert json.loads((tmp_path / "two.npz.json").read_text())["finished"]["processes"] == 2
    assert load(tmp_path / "one.npz")["arr_0"].tobytes() == load(tmp_path / "two.npz")["arr_0"].tobytes()

    many = [*common, "300", "--batch-size", "1", "--out", str(tmp_path / "killed.npz")]
    job, parts = ranks.start_command(2, cli.main, many), tmp_path / "killed.npz.parts"
    wait_for(lambda: len(list(parts.glob("chunk_*.npy"))) >= 5, "chunks", 120)
    for rank in range(2):
        job.signal(rank, signal.SIGKILL)
    assert job.wait().statuses == [-signal.SIGKILL] * 2
    left = len(list(parts.glob("chunk_*.npy")))
    assert 5 <= left < 300
    assert ranks.ibq(*many).status == 0
    record = json.loads((tmp_path / "killed.npz.json").read_text())
    assert record["finished"]["images_made"] == 300 - left
    assert load(tmp_path / "killed.npz")["arr_0"].shape == (300, 8, 12, 3)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "6"], "--classes 6: '6' is not a class from 0 to 5"),
        (["--classes", "1,dog"], "--classes 1,dog: 'dog' is not a class"),
        (["--classes", "4-2"], "'4-2' is not a class"),
        (["--classes", "0-99999999999"], "is not a class"),
        (["--classes", ""], "is not a class"),
        (["--count", "0"], "--count 0 must be at least 1"),
        (["--count", "99999999999999"], "--count 99999999999999 is too large: at most 10,000,000"),
        (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["--guidance", "-1"], "guidance -1.0 must be at least 0"),
        (["--top-p", "0"], "top_p 0.0 must be above 0"),
        (["--top-p", "1.5"], "top_p 1.5"),
        (["--temperature", "0"], "temperature 0.0 must be above 0"),
        (["--top-k", "-2"], "top_k -2 must be at least 0"),
        (["--guidance-schedule", "square"], "choose one of constant, linear, cosine"),
        (["--seed", "-1"], "--seed -1 must lie between"),
        (["--precision", "fp16"], "--precision fp16 is unknown: choose fp32 or bf16"),
        (["--device", "tpu"], "--device tpu is unknown"),
        (["--weights", "best"], "'ema' or 'raw', not 'best'"),
        (["--weights", "ema"], "holds no ema weights of a generator; ask for the raw weights (--weights raw,"),
        (["--tokenizer", "nowhere"], "nowhere is not a run folder"),
        (["--out", "/proc/nothing/x.npz"], "cannot write /proc/nothing/x.npz"),
        (["--out", "/dev/null/x"], "cannot write /dev/null/x"),
        (["--out", "/dev/null"], "cannot write /dev/null: Not a directory"),
        (["--out", "x.png", "--count", "2000"], "a grid holds up to 1024 images"),
        (["--out", "x.jpg"], "x.jpg cannot be written: name a folder, FILE.npz or FILE.png"),
        (["--out", "x.TAR"], "x.TAR cannot be written"),
        (["--count", "many"], "--count"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, monkeypatch, refused_by_ibq, options, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused_by_ibq("sample", run, *options)
    assert not (run / "sampled").exists() and not list(tmp_path.glob("x*"))


def test_runs_that_do_not_fit_are_refused(run, tmp_path):
    tokenizer = run.parent / "tokenizer"
    assert "is a tokenizer run: `ibq sample` needs a generator run" in refusal(TrainerError, sample, tokenizer)
    assert "is not a run folder" in refusal(TrainerError, sample, tmp_path / "nowhere")
    assert "nowhere.ckpt does not exist" in refusal(TrainerError, sample, tmp_path / "nowhere.ckpt")
    said = refusal(TrainerError, sample, run, tokenizer=run)
    assert re.search("no tokenizer: .* is from a generator run: .*; name another with --tokenizer", said)
    lonely = write_generator_run(tmp_path / "lonely", generator_of())
    assert "names no tokenizer: give its run or checkpoint with --tokenizer" in refusal(TrainerError, sample, lonely)
    small = write_tokenizer_run(tmp_path / "small", tokenizer_of(codebook_size=16))
    assert "the tokenizer has 16 codes, the generator 32" in refusal(TrainerError, sample, lonely, tokenizer=small)
    other = write_tokenizer_run(tmp_path / "other", tokenizer_of(1))
    config = generator_run()
    config.tokenizer.fingerprint = tokenizer_of(0).fingerprint()
    strict = write_run(tmp_path / "strict", config, generator=generator_of())
    exported = export(strict, tmp_path / "exported").out
    for source in (strict, exported, export(exported, tmp_path / "twice").out):
        said = refusal(TrainerError, sample, source, tokenizer=other)
        assert "is not the one that the generator was trained with" in said
    own = sample(strict, tokenizer=tokenizer, count=1, out=tmp_path / "own").out
    models = {"tokenizer": tokenizer_of(0), "tokenizer_ema": tokenizer_of(1)}  # of tokens of the raw weights
    averaged = write_run(tmp_path / "averaged", {"task": "tokenizer", "model": tokenizer_of().config}, **models)
    made = sample(strict, tokenizer=averaged, count=1, out=tmp_path / "made").out
    (picture,) = own.glob("*.png")
    assert (made / picture.name).read_bytes() == picture.read_bytes()


def test_what_lies_in_the_way_stays(run, tmp_path):
    (tmp_path / "x.npz").write_text("mine")
    (tmp_path / "y.npz.json").write_text('{"mine": 1}')
    (tmp_path / "file").write_text("mine")
    (tmp_path / "z.npz.parts").mkdir()
    (tmp_path / "z.npz.parts" / "chunk_000000.npy").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "000000_class_0000.png").write_text("mine")
    for name, message in (
        ("x.npz", "already exists and was not written by `ibq sample`: choose another --out"),
        ("y.npz", "y.npz.json already exists"),
        ("z.npz", "z.npz.parts already exists"),
        ("file", "is a file: name a folder"),
        ("folder.png", "is a folder: name a file, or a folder without .png"),
        ("folder", "already exists"),
    ):
        with unchanged(tmp_path):
            assert message in refusal(TrainerError, sample, run, count=1, out=tmp_path / name)


@pytest.mark.parametrize("out", ["x.npz", "folder"])
def test_only_its_own_parts_are_removed(run, tmp_path, out):
    options = {"count": 3, "batch_size": 2, "out": tmp_path / out}
    theirs = tmp_path / f"{out}.parts" / "mine.txt"
    chunk = theirs.with_name("chunk_000009.npy")

    def put(*_):
        theirs.parent.mkdir(exist_ok=True)
        theirs.write_text("mine")

    sample(run, **options, on_progress=put)
    assert [path.name for path in theirs.parent.iterdir()] == ["mine.txt"]
    chunk.write_text("mine")  # without a record next to it
    assert sample(run, **options).made == 0
    assert sorted(path.name for path in theirs.parent.iterdir()) == ["chunk_000009.npy", "mine.txt"]


def test_outputs_of_one_name_have_reports_of_their_own(run, tmp_path):
    (tmp_path / "x.json").write_text("mine")
    for name in ("x.npz", "x.png", "X.PNG"):
        sampled = sample(run, count=2, seed=len(name), out=tmp_path / name)
        assert sampled.out.is_file() and sampled.report == tmp_path / f"{name}.json"
    assert (tmp_path / "x.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 3}, "batch_size 2, now 3): give --batch-size 2 again to continue, or name another path"),
        ({"classes": "1"}, "give the same --classes again"),
        ({"weights": "raw", "tokenizer": "other"}, "give the same --tokenizer again"),
    ],
)
def test_the_setting_to_go_on_with_is_named(run, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    write_tokenizer_run(tmp_path / "other", tokenizer_of(1))
    options = {"count": 3, "batch_size": 2}
    sample(run, **options)
    assert message in refusal(TrainerError, sample, run, **{**options, **changes})


def test_a_full_disk_is_told_and_what_was_made_stays(run, tmp_path, monkeypatch):
    full = OSError(28, "No space left on device")
    save = Mock(wraps=np.save, side_effect=[DEFAULT, DEFAULT, full])
    monkeypatch.setattr(trainer.jobs.sample_output.np, "save", save)
    with pytest.raises(TrainerError, match=r"cannot write .*x\.npz: No space left on device"):
        sample(run, count=8, batch_size=2, out=tmp_path / "x.npz")
    monkeypatch.undo()
    assert sample(run, count=8, batch_size=2, out=tmp_path / "x.npz").made == 4


def test_logits_that_are_not_finite_are_told(tmp_path):
    tokenizer = write_tokenizer_run(tmp_path / "tokenizer", tokenizer_of())
    generator = generator_of()
    generator.head.weight.data[0] = torch.finfo(torch.float32).max  # weights that are not finite are refused
    run = write_generator_run(tmp_path / "run", generator, tokenizer)
    assert "logits are not finite" in refusal((TrainerError, ModelError), sample, run, count=1)


def test_pictures_that_are_not_finite_are_told(tmp_path):
    diverged = tokenizer_of()
    diverged.decoder.conv_out.weight.data[0] = torch.finfo(torch.float32).max
    tokenizer = write_tokenizer_run(tmp_path / "tokenizer", diverged)
    run = write_generator_run(tmp_path / "run", generator_of(), tokenizer)
    assert "images are not finite" in refusal(TrainerError, sample, run, count=1)
    assert not list(tmp_path.rglob("*.png"))
