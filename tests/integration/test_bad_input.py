"""Mistakes of the user: one line that names the mistake and the fix, exit status 2, nothing created or changed."""

import tarfile
from types import SimpleNamespace

import pytest
import torch
import yaml
from comparing import assert_refused, fingerprint, unchanged
from ranks import TORCHRUN, settings

FILES = {
    "texts/notes.txt": "no picture",
    "zero.tar": "",
    "cut.tar": "a tar it is not" * 100,
    "a_file": "a file",
    "list.yaml": "- a list\n",
    "two_names.yaml": "trainer:\n  keep_checkpoints: 3\n  keep_last: 3\n",
    "broken.json": '{"train_batch_size": ',
    "list.json": "[1]",
    "true.json": '{"zero_optimization": true}',
    "offload.json": '{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}',
    "odd_key.json": '{"zero_optimization": {"stage": 1, "odd": 1}}',
    "clipping.json": '{"gradient_clipping": 1.0, "zero_optimization": {"stage": 1}}',
    "round_robin.json": '{"zero_optimization": {"stage": 2, "round_robin_gradients": true}}',
    "other_precision.json": '{"bfloat16": {"enabled": true}}',
    "word.json": '{"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}',
    "stage4.json": '{"zero_optimization": {"stage": 4}}',
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder that holds what mistakes are made of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    with tarfile.open(tmp_path / "texts.tar", "w") as tar:
        tar.add(tmp_path / "texts/notes.txt", "notes.txt")
    return tmp_path


TRAIN_MISTAKES = {
    # recipes and keys; tests/unit/trainer/test_recipes.py has more
    "unknown recipe": (["debgu"], ["unknown recipe 'debgu'", "did you mean debug", "ibq recipes"]),
    "recipe file that is a list": (["list.yaml"], ["list.yaml is not a recipe"]),
    "word for a number": (["debug", "optimizer.lr=fast"], ["'optimizer.lr=fast'", "Value 'fast'"]),
    "fraction of a step": (["debug", "trainer.max_steps=1.5"], ["trainer.max_steps=1.5", "nteger"]),
    "another engine's setting": (["debug", "engine.offload=true"], ["engine.kind=fsdp2"]),
    "another engine's file": (["debug", "engine.config=zero3"], ["engine.kind=deepspeed"]),
    "recipe file with two names of a key": (["two_names.yaml"], ["is called trainer.keep_last now", "both are given"]),
    "an empty folder name": (["debug", "run="], ["name a folder"]),
    # data
    "no data": (["debug", "data.train=null"], ["data.train must be given"]),
    "missing folder": (["debug", "data.train=nowhere"], ["no such tar or folder: nowhere"]),
    "empty folder": (
        ["debug", "data.train=empty"],
        ["neither jpg, jpeg, png, webp, jfif, jpe nor tars under empty", "holds images"],
    ),
    "zero-byte tar": (["debug", "data.train=zero.tar"], ["zero.tar is empty (0 bytes)"]),
    "zero-byte tar to validate on": (["debug", "data.val=zero.tar"], ["zero.tar is empty (0 bytes)"]),
    "empty folder to validate on": (["debug", "data.val=empty"], ["empty", "holds images"]),
    "file that is no tar": (["debug", "data.train=cut.tar"], ["cut.tar is no whole, uncompressed tar"]),
    "tar without images": (["debug", "data.train=texts.tar"], ["texts.tar holds no image"]),
    "number for a folder": (["debug", "data.train=123"], ["no such tar or folder: 123"]),
    "truth for a folder": (["debug", "data.val=true"], ["no such tar or folder: true"]),
    # sizes
    "crops that do not divide": (["debug", "data.image_size=30"], ["data.image_size=30 must be a multiple of 4"]),
    "validation crops that do not": (
        ["debug", "data.val_image_size=30"],
        ["data.val_image_size=30 must be a multiple"],
    ),
    "crops too small to judge": (
        ["debug", "discriminator.layers=4"],
        ["data.image_size=32 must be at least 48", "discriminator.layers"],
    ),
    "seed beyond 64 bits": (["debug", "seed=99999999999999999999"], ["seed="]),
    # batches, places, weights
    "micro-batch that does not divide": (
        ["debug", "trainer.micro_batch_size=3"],
        ["trainer.micro_batch_size=3 must divide the 8 images"],
    ),
    "implementation of another quantizer": (
        ["debug", "model.quantizer=vq", "trainer.quantizer_impl=chunked"],
        ["trainer.quantizer_impl=chunked is only for model.quantizer=ibq"],
    ),
    "codebook over more processes than there are": (
        ["debug", "codebook_parallel=2"],
        ["codebook_parallel=2 must divide the number of processes, 1"],
    ),
    "lanes that do not divide": (["debug", "data.lanes=12"], ["data.lanes=12 must be a multiple", "use 16"]),
    "run folder below a file": (["debug", "run=a_file/run"], ["cannot write the run folder a_file/run", "run=FOLDER"]),
    "LPIPS without its weights": (
        ["debug", "loss.perceptual.weight=1"],
        ["vgg16-397923af.pth", "torch/hub/checkpoints/vgg16-397923af.pth", "loss.perceptual.weight=0"],
    ),
}


@pytest.mark.parametrize("mistake", TRAIN_MISTAKES)
def test_train(ibq_here, place, mistake):
    (recipe, *changes), said = TRAIN_MISTAKES[mistake]
    with unchanged(place):
        assert_refused(ibq_here("train", recipe, "trainer.device=cpu", *changes), *said)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("zero9", "choose one of zero0, zero1, zero2"),
        ("nowhere.json", "nowhere.json is unknown"),
        ("broken.json", "broken.json is not valid JSON"),
        ("stage4.json", "use 0, 1, 2 or 3"),
        ("list.json", "is not a DeepSpeed configuration"),
        ("true.json", "is not a DeepSpeed configuration"),
        ("offload.json", "offload_optimizer"),
        ("odd_key.json", '"odd" is not supported; remove it'),
        ("round_robin.json", '"round_robin_gradients" is not supported; remove it'),
        ("other_precision.json", 'remove "bfloat16"; set it in the recipe'),
        ("word.json", '"offload_optimizer" must be an object'),
        ("clipping.json", 'write "auto" for "gradient_clipping" and use trainer.gradient_clip_norm'),
    ],
)
def test_deepspeed_config(ibq_here, place, config, said):
    with unchanged(place):
        finished = ibq_here("train", "debug", "trainer.device=cpu", "engine.kind=deepspeed", f"engine.config={config}")
        assert finished.status == 2, finished.err
        (line,) = finished.error_lines  # DeepSpeed prints other lines
        assert said in line
        assert "Traceback" not in finished.err


def test_a_run_folder_that_holds_a_run(ibq_here, runs):
    run = runs("one")
    with unchanged(run):
        finished = ibq_here("train", "debug", f"run={run}", *settings())
        assert_refused(finished, "already holds a run", f"ibq resume {run}")


@pytest.mark.parametrize(
    "command",
    [
        ["resume", "empty"],
        ["resume", "nowhere"],
        ["resume", "a_file"],
        ["evaluate", "reconstruction", "empty"],
        ["evaluate", "reconstruction", "nowhere"],
        ["reconstruct", "empty", "--images", "texts", "--out", "pictures"],
    ],
    ids=" ".join,
)
def test_a_folder_that_is_no_run(ibq_here, place, command):
    with unchanged(place):
        assert_refused(ibq_here(*command), "is not a run folder", "ibq train")


def test_a_run_without_a_checkpoint(ibq_here, runs, place):
    (place / "run").mkdir()
    (place / "run/config.yaml").write_bytes((runs("one") / "config.yaml").read_bytes())
    with unchanged(place):
        assert_refused(ibq_here("evaluate", "reconstruction", "run"), "no finished checkpoint")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--images", "nowhere"], "nowhere"),
        (["--images", "empty"], "empty"),
        (["--images", "texts"], "texts"),
        (["--size", "huge"], "--size huge"),
        (["--weights", "best"], "'best'"),
        (["--device", "abacus"], "--device abacus"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_evaluate_options(ibq_here, runs, place, options, said):
    with unchanged(place, runs("one")):
        assert_refused(ibq_here("evaluate", "reconstruction", runs("one"), *options), said)


def test_a_number_without_a_point_is_a_number(ibq_here, place):
    """YAML 1.1 takes 1e-5 for a word."""
    changes = {"trainer.max_steps": 1, "optimizer.lr": "1e-5", "data.val": "null", "trainer.global_batch_size": 2}
    ibq_here("train", "debug", "run=run", *settings(changes)).succeeded()
    assert yaml.safe_load((place / "run/config.yaml").read_text())["optimizer"]["lr"] == 0.00001


def test_a_compiled_zero_3_is_refused(ranks, place):
    changes = "trainer.compile=true", "engine.kind=deepspeed", "engine.config=zero3"
    finished = ranks.ibq("train", "debug", "run=run", "trainer.device=cpu", *changes, cwd=place)
    assert finished.status == 2, finished.err
    assert "does not work with ZeRO 3" in finished.error_lines[0]
    assert not (place / "run").exists()


def test_a_loss_that_is_not_finite_ends_the_run_without_a_checkpoint(ibq_here, place):
    changes = {"trainer.checkpoint_every_steps": 1, "trainer.validate_every_steps": 1, "optimizer.lr": "1e30"}
    finished = ibq_here("train", "debug", "run=run", *settings(changes))
    assert finished.status == 2, finished.err
    (line,) = finished.error_lines
    assert finished.err.endswith(line + "\n")
    assert "is not finite at step 5, number 5 in a row" in line
    assert "optimizer.lr" in line
    assert "Traceback" not in finished.err
    assert not list(place.rglob("*.safetensors"))
    assert not (place / "run/checkpoints/latest").exists()


# ------------------------------------------------------------------ in fresh processes and on several ranks


def test_real_process_unknown_key(launch, tmp_path):
    finished = launch.python("-m", "tools.cli", "train", "debug", f"run={tmp_path / 'run'}", "optimizer.lrr=1e-3")
    assert_refused(finished, "did you mean optimizer.lr")
    assert fingerprint(tmp_path) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's kernels take CUDA tensors")
def test_triton_without_a_gpu(ranks, tmp_path):
    arguments = f"run={tmp_path / 'run'}", "trainer.device=cpu", "trainer.quantizer_impl=triton"
    assert_refused(ranks.ibq("train", "debug", *arguments), "trainer.quantizer_impl=triton: impl='triton' takes CUDA")
    assert fingerprint(tmp_path) == {}


@pytest.mark.full
def test_two_real_processes_batch_that_does_not_divide(launch, tmp_path):
    arguments = f"run={tmp_path / 'run'}", "trainer.device=cpu", "trainer.global_batch_size=7"
    finished = launch.python(*TORCHRUN, 2, "-m", "trainer", "debug", *arguments)
    assert finished.status != 0
    assert set(finished.error_lines) == {
        "ibq: error: trainer.global_batch_size=7 must be a multiple of the 2 processes"
    }
    assert "exitcode  : 2" in finished.err  # of our processes; torchrun itself exits with 1 and adds a report
    assert finished.err.count("Traceback") <= 1  # torchrun's
    assert fingerprint(tmp_path) == {}


def test_an_error_is_one_write(monkeypatch):
    """So that the lines of many processes do not run into each other, whether or not Python buffers."""
    from trainer.__main__ import main

    written = []
    monkeypatch.setattr("sys.stderr", SimpleNamespace(write=written.append))
    assert main(["no-such-recipe"]) == 2
    (line,) = written
    assert line.startswith("ibq: error: unknown recipe") and line.count("\n") == 1 and line.endswith("\n")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["trainer.global_batch_size=7"], "trainer.global_batch_size=7 must be a multiple of the 2 processes"),
        (["codebook_parallel=3"], "codebook_parallel=3 must divide the number of processes, 2"),
        (["codebook_parallel=2", "model.codebook_size=1"], "model.codebook_size=1 must be at least 2"),
        (["codebook_parallel=2", "trainer.quantizer_impl=dense"], "trainer.quantizer_impl=dense: impl='dense' takes"),
    ],
)
def test_two_ranks(ranks, tmp_path, changes, said):
    finished = ranks.start(2, "debug", f"run={tmp_path / 'run'}", "trainer.device=cpu", *changes).wait()
    assert finished.statuses == [2, 2]
    (line,) = set(finished.error_lines)
    assert said in line
    assert fingerprint(tmp_path) == {}


def test_two_ranks_run_folder_not_writable(ranks, tmp_path):
    """Rank 0 alone notices, and the other must not wait for it for ever."""
    (tmp_path / "file").touch()
    finished = ranks.start(2, "debug", f"run={tmp_path / 'file/run'}", "trainer.device=cpu").wait()
    assert finished.statuses == [2, 2]
    (line,) = set(finished.error_lines)
    assert "cannot write the run folder" in line
    assert list(fingerprint(tmp_path)) == ["file"]
