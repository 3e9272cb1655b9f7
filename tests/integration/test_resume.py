"""A run that was stopped or killed and then resumed equals an uninterrupted run."""

import shutil
import signal

import pytest
from comparing import assert_refused, copy_until, differences, loss_lines, read_metrics, unchanged
from field.disks import read_only
from ranks import settings, wait_for


@pytest.fixture
def copy_of(runs, tmp_path):
    """`copy_of(name)`: a copy of one of `runs`."""
    return lambda name: shutil.copytree(runs(name), tmp_path / "run")


def test_resumed_equals_unbroken_bit_for_bit(runs, ranks, copy_of):
    run = copy_of("stopped")
    ranks.resume(1, run, "trainer.max_steps=20").succeeded()
    expected, actual = ([line for line in read_metrics(r) if line["step"] > 10] for r in (runs("one"), run))
    assert sum("loss/total" in line for line in actual) == 10
    assert any("val/psnr" in line for line in actual)
    assert actual == expected
    # Weights, averages, moments, LeCAM's means, the codebook's health, the random numbers' state.
    paths = [r / "checkpoints/step_00000020/rank_00000.safetensors" for r in (runs("one"), run)]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_codes_are_placed_among_the_features_once_alone(ibq_here, tmp_path):
    """A resumed run does not place them again."""
    changes = {"trainer.checkpoint_every_steps": 1, "model.codebook_init": "features"}
    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    for folder, steps in ((unbroken, 2), (run, 1)):
        arguments = settings({**changes, "trainer.max_steps": steps})
        ibq_here("train", "debug", f"run={folder}", *arguments).succeeded()
    ibq_here("resume", run, "trainer.max_steps=2").succeeded()
    files = [r / "checkpoints/step_00000002/rank_00000.safetensors" for r in (unbroken, run)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_killed_run_goes_on_from_its_newest_checkpoint(runs, ranks, tmp_path):
    run = tmp_path / "run"
    arguments = settings({"trainer.max_steps": 1000, "trainer.checkpoint_every_steps": 7})
    job = ranks.start(1, "debug", f"run={run}", *arguments)
    latest, metrics = run / "checkpoints/latest", run / "metrics.jsonl"
    wait_for(lambda: latest.exists() and '"step": 9,' in metrics.read_text(), "checkpoint and ninth step", 120)
    job.signal(0, signal.SIGKILL)
    assert job.wait().statuses == [-signal.SIGKILL]

    step = int(latest.read_text().removeprefix("step_"))
    # What a kill in the middle of writing leaves, in case that this one came at another moment.
    with metrics.open("a") as file:
        file.write('{"step": 9, "loss/to')
    (run / "checkpoints/step_00000099.unfinished").mkdir()

    last = max(20, step + 3)
    finished = ranks.resume(1, run, f"trainer.max_steps={last}").succeeded()
    assert f"steps {step + 1} to {last}" in finished.err
    lines = loss_lines(run)
    assert [line["step"] for line in lines] == list(range(1, last + 1))
    assert lines[:20] == loss_lines(runs("one"))
    assert not list(run.rglob("*.unfinished"))


def test_deepspeed_resumed_equals_unbroken(runs, ranks, tmp_path):
    run = copy_until(runs("zero1"), 5, tmp_path / "run")
    finished = ranks.resume(2, run).succeeded()
    assert "steps 6 to 8" in finished.err
    for file, difference in differences(*(r / "checkpoints/step_00000008" for r in (runs("zero1"), run))).items():
        assert difference.whole < 1e-6, file
    lines = loss_lines(run)
    assert [line["step"] for line in lines] == list(range(1, 9))
    for line, true_line in zip(lines, loss_lines(runs("zero1")), strict=True):
        assert line == pytest.approx(true_line, rel=1e-6, abs=1e-9)


# (processes, engine, over how many of them the codebook is spread), a step each. 250 codes and 3 or 4 processes:
# uneven shards; the discriminator and other small tensors are cut unevenly everywhere.
CHAIN = [
    (1, "deepspeed zero0", 1),
    (2, "deepspeed zero1", 2),
    (4, "deepspeed zero2", 4),
    (3, "ddp", 3),
    (2, "deepspeed zero3", 1),
    (2, "fsdp2", 2),
    (1, "deepspeed zero1", 1),
]


def test_a_chain_of_engines_and_numbers_of_processes_is_an_unbroken_run(ranks, tmp_path):
    """1 -> 2 -> 4 -> 3 -> 2 -> 1 processes, ZeRO 0 -> 1 -> 2 -> 3 -> 1, to FSDP2 and back: losses, weights, averages
    and the optimizers' moments."""
    last = len(CHAIN)
    changes = {"trainer.global_batch_size": 12, "model.codebook_size": 250, "trainer.checkpoint_every_steps": 1}
    changes |= {"trainer.keep_last": last, "seed": 9}
    unbroken, chain = tmp_path / "unbroken", tmp_path / "chain"
    ranks.train(1, "debug", unbroken, {**changes, "trainer.max_steps": last}).succeeded()
    for step, (processes, engine, shards) in enumerate(CHAIN, start=1):
        kind, _, config = engine.partition(" ")
        given = {"engine.kind": kind, "codebook_parallel": shards, "trainer.max_steps": step}
        if config:
            given["engine.config"] = config
        if step == 1:
            finished = ranks.train(processes, "debug", chain, {**changes, **given}).succeeded()
        else:
            overrides = (f"{key}={value}" for key, value in given.items())
            finished = ranks.resume(processes, chain, *overrides).succeeded()
        assert f"{processes} x cpu ({engine}, fp32" in finished.err
        assert f"steps {step} to {step}" in finished.err
    for model, difference in differences(*(r / f"checkpoints/step_{last:08d}" for r in (unbroken, chain))).items():
        assert difference.whole < (1e-4 if ".exp_avg" in model else 1e-5), model
    lines = loss_lines(chain)
    assert [line["step"] for line in lines] == list(range(1, last + 1))
    for line, true_line in zip(lines, loss_lines(unbroken), strict=True):
        assert line == pytest.approx(true_line, rel=1e-4, abs=1e-6)
    parts = sorted(path.name for path in (chain / "checkpoints/step_00000003").glob("*.safetensors"))
    assert parts == [f"rank_{rank:05d}.safetensors" for rank in range(4)]


def test_a_named_checkpoint_is_the_one_to_go_on_from(ranks, copy_of, runs):
    run = copy_of("one")
    finished = ranks.resume(1, run / "checkpoints/step_00000010", "trainer.max_steps=12").succeeded()
    assert "steps 11 to 12" in finished.err
    assert loss_lines(run) == loss_lines(runs("one"))[:12]
    assert (run / "checkpoints/latest").read_text() == "step_00000012"


def test_checkpoints_written_in_the_background_are_those_written_at_once(ranks, runs, tmp_path):
    run = tmp_path / "run"
    ranks.train(1, "debug", run, {"trainer.max_steps": 10, "trainer.async_checkpoints": "false"}).succeeded()
    for step in (5, 10):
        file = f"checkpoints/step_{step:08d}/rank_00000.safetensors"
        assert (run / file).read_bytes() == (runs("one") / file).read_bytes()


@pytest.mark.parametrize("change", ["model.channels=32", "model.quantizer=vq", "discriminator.channels=8"])
def test_another_model_is_refused_and_the_run_stays_as_it_was(ibq_here, copy_of, change):
    run = copy_of("stopped")
    with unchanged(run):
        finished = ibq_here("resume", run, "trainer.max_steps=20", change)
        assert_refused(finished, "cannot resume", "was written with other settings")


def test_a_read_only_run_is_refused_and_the_advice_works(ibq_here, copy_of, tmp_path):
    run = copy_of("stopped")
    with unchanged(run), read_only(run):
        finished = ibq_here("resume", run, "trainer.max_steps=11")
        assert_refused(finished, f"cannot write the run folder {run}: Read-only file system", "copy the folder (cp -r)")
        assert "run=" not in finished.err
    shutil.copytree(run, tmp_path / "copy")
    ibq_here("resume", tmp_path / "copy", "trainer.max_steps=11").succeeded()


def test_a_run_that_is_done_says_how_to_go_on(ibq_here, runs):
    with unchanged(runs("stopped")):
        assert_refused(ibq_here("resume", runs("stopped")), "is at step 10 already", "trainer.max_steps=20")


def test_other_data_is_refused(ibq_here, copy_of):
    run = copy_of("stopped")
    with unchanged(run):
        finished = ibq_here("resume", run, "trainer.max_steps=20", "data.train=bundled:val")
        assert_refused(finished, "cannot resume")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("rank_00000.safetensors", b""),
        ("rank_00000.safetensors", b"no safetensors at all"),
        ("state.json", b""),
        ("state.json", b'{"step": 5, "data": {}, "task": {}, "world_size": 1}'),
        ("manifest.json", b""),
        ("manifest.json", b"[]"),
        ("manifest.json", b'{"files": {"rank_00001.safetensors": {"bytes": 1, "sha256": "0"}}}'),
        ("../latest", b"\xff\xfe"),
    ],
)
def test_a_damaged_run_ends_in_one_line(ibq_here, copy_of, file, content):
    run = copy_of("one, accumulating")
    (run / "checkpoints/step_00000005" / file).write_bytes(content)
    if file == "../latest":  # there is a whole checkpoint all the same
        ibq_here("resume", run, "trainer.max_steps=6").succeeded()
        return
    with unchanged(run):
        assert_refused(ibq_here("resume", run, "trainer.max_steps=6"))
