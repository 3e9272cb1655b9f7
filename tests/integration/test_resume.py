"""A run that was stopped or killed and resumed is the run that never was."""

import shutil
import signal
import time
from pathlib import Path

import pytest

from model_zoo.tokenizer import codebook_rows

WEIGHTS = [
    *(f"{name}.safetensors" for name in ("tokenizer", "tokenizer_ema", "discriminator", "lecam", "codebook_health")),
    *(
        f"{name}.codebook_000000000_000000256.safetensors"
        for name in ("tokenizer", "tokenizer_ema", "codebook/optimizer")
    ),
]


@pytest.fixture(scope="module", autouse=True)
def all_started(runs):
    runs.start("one", "stopped", "zero1", "one, accumulating", "shards")


@pytest.fixture
def copy_of(runs, tmp_path):
    """`copy_of(name, step)`: a copy of a run; with a step, as if it had been killed after that checkpoint."""

    def copy(name: str, step: int | None = None) -> Path:
        run = shutil.copytree(runs[name], tmp_path / "run")
        if step is not None:
            checkpoints = run / "checkpoints"
            for later in checkpoints.glob("step_*"):
                if later.name > f"step_{step:08d}":
                    shutil.rmtree(later)
            (checkpoints / "latest").write_text(f"step_{step:08d}")
        return run

    return copy


def training_lines(lines: list[dict], first: int, last: int) -> list[dict]:
    return [line for line in lines if "loss/total" in line and first <= line["step"] <= last]


def test_resumed_equals_unbroken_bit_for_bit(runs, launch, read_metrics, copy_of):
    run = copy_of("stopped")
    finished = launch.ibq("resume", run, "trainer.max_steps=20")
    assert finished.status == 0, finished.err
    expected, actual = ([line for line in read_metrics(r) if line["step"] > 10] for r in (runs["one"], run))
    assert len(training_lines(actual, 11, 20)) == 10
    assert any("val/psnr" in line for line in actual)
    assert actual == expected
    for file in WEIGHTS:
        paths = [r / "checkpoints/step_00000020" / file for r in (runs["one"], run)]
        assert paths[0].read_bytes() == paths[1].read_bytes(), file


def test_a_killed_run_goes_on_from_its_newest_checkpoint(runs, launch, read_metrics, debug_settings, tmp_path):
    run = tmp_path / "run"
    arguments = debug_settings({"trainer.max_steps": 1000, "trainer.checkpoint_every_steps": 7})
    process = launch.start("tools.cli", "train", "debug", f"run={run}", *arguments)
    latest, metrics = run / "checkpoints/latest", run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if latest.exists() and '"step": 9,' in metrics.read_text():
            break
        time.sleep(0.005)
    process.kill()
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL and latest.exists(), err

    step = int(latest.read_text().removeprefix("step_"))
    # What a kill in the middle of writing leaves, in case that this one came at another moment.
    with metrics.open("a") as file:
        file.write('{"step": 9, "loss/to')
    (run / "checkpoints/step_00000099.unfinished").mkdir()

    last = max(20, step + 3)
    finished = launch.ibq("resume", run, f"trainer.max_steps={last}")
    assert finished.status == 0, finished.err
    assert f"steps {step + 1} to {last}" in finished.err
    lines = read_metrics(run)
    assert [line["step"] for line in lines if "loss/total" in line] == list(range(1, last + 1))
    assert training_lines(lines, 1, 20) == training_lines(read_metrics(runs["one"]), 1, 20)
    assert not list(run.rglob("*.unfinished"))


def test_deepspeed_resumed_equals_unbroken(runs, launch, differences, read_metrics, copy_of):
    run = copy_of("zero1", step=5)
    finished = launch.torchrun("--resume", run)
    assert finished.status == 0, finished.err
    assert "steps 6 to 8" in finished.err
    for file, difference in differences(*(r / "checkpoints/step_00000008" for r in (runs["zero1"], run))).items():
        assert difference.whole < 1e-6, file
    expected, actual = (training_lines(read_metrics(r), 1, 8) for r in (runs["zero1"], run))
    assert [line["step"] for line in actual] == list(range(1, 9))
    for line, true_line in zip(actual, expected, strict=True):
        assert line == pytest.approx(true_line, rel=1e-6, abs=1e-9)


def test_replicated_goes_on_with_another_number_of_processes(runs, launch, differences, copy_of):
    run = copy_of("stopped")
    finished = launch.torchrun("--resume", run, "trainer.max_steps=15")
    assert finished.status == 0, finished.err
    assert "2 x cpu" in finished.err
    for file, difference in differences(*(r / "checkpoints/step_00000015" for r in (runs["one"], run))).items():
        assert difference.whole < 1e-5, file


def test_a_file_that_one_process_cannot_read_ends_both_in_one_line(runs, launch, fingerprint, tmp_path):
    run = shutil.copytree(runs["shards"], tmp_path / "run")
    file = run / "checkpoints/step_00000005/tokenizer.codebook_000000128_000000256.safetensors"
    file.write_bytes(file.read_bytes()[:300])
    before = fingerprint(run)
    finished = launch.torchrun("--resume", run, "trainer.max_steps=6")
    assert finished.status != 0
    assert len(finished.error_lines) == 2 and len(set(finished.error_lines)) == 1
    assert "cannot go on from" in finished.error_lines[0]
    assert finished.err.count("Traceback") <= 1  # torchrun's
    assert fingerprint(run) == before


def test_a_sharded_codebook_goes_on_over_any_number_of_processes(launch, differences, debug_settings, tmp_path):
    """1 -> 2 -> 4 -> 3 -> 1, a step each, with uneven shards, is one process's five steps: weights, EMA and moments."""
    changes = {"trainer.global_batch_size": 12, "trainer.checkpoint_every_steps": 1, "model.codebook_size": 250}
    # With this seed no logit of the discriminator lies on the hinge's kink, where rounding becomes a gradient.
    changes["seed"] = 1
    unbroken, chain = tmp_path / "unbroken", tmp_path / "chain"
    finished = [
        launch.ibq("train", "debug", f"run={unbroken}", *debug_settings(changes)),
        launch.ibq("train", "debug", f"run={chain}", *debug_settings({**changes, "trainer.max_steps": 1})),
    ]
    for step, ranks in ((2, 2), (3, 4), (4, 3)):
        arguments = "--resume", chain, f"codebook_parallel={ranks}", f"trainer.max_steps={step}"
        finished.append(launch.torchrun(*arguments, processes=ranks))
    finished.append(launch.ibq("resume", chain, "codebook_parallel=1", "trainer.max_steps=5"))
    for one in finished:
        assert one.status == 0, one.err
    checkpoints = [run / "checkpoints/step_00000005" for run in (unbroken, chain)]
    for name, difference in differences(*checkpoints).items():
        assert difference.whole < 1e-5, name
    for moment in ("exp_avg", "exp_avg_sq"):
        first, second = (codebook_rows(c / "codebook", "optimizer", moment, 0, 250, 250) for c in checkpoints)
        assert (first - second).norm() < 1e-4 * first.norm()
    written = sorted((chain / "checkpoints/step_00000004").glob("tokenizer_ema.codebook_*"))
    assert [path.name.split("_", 2)[2] for path in written] == [
        *("000000000_000000084.safetensors", "000000084_000000167.safetensors", "000000167_000000250.safetensors"),
    ]


def test_deepspeed_refuses_another_number_of_processes(launch, fingerprint, copy_of):
    run = copy_of("zero1", step=5)
    before = fingerprint(run)
    finished = launch.ibq("resume", run)
    assert finished.status == 2, finished.err
    assert len(finished.error_lines) == 1
    assert "resume with 2 processes, not 1" in finished.error_lines[0]
    assert "Traceback" not in finished.err
    assert fingerprint(run) == before


def test_another_engine_is_refused(ibq_here, assert_refused, fingerprint, copy_of):
    run = copy_of("zero1", step=5)
    before = fingerprint(run)
    assert_refused(ibq_here("resume", run, "engine.kind=replicated"), "engine.kind=deepspeed")
    assert fingerprint(run) == before


@pytest.mark.parametrize("change", ["model.channels=32", "model.codebook_size=128", "discriminator.channels=8"])
def test_another_model_is_refused_and_the_run_stays_as_it_was(ibq_here, assert_refused, fingerprint, copy_of, change):
    run = copy_of("stopped")
    before = fingerprint(run)
    finished = ibq_here("resume", run, "trainer.max_steps=20", change)
    assert_refused(finished, "cannot go on from", "was written with other settings")
    assert fingerprint(run) == before


def test_a_run_that_is_done_says_how_to_go_on(ibq_here, assert_refused, runs, fingerprint):
    before = fingerprint(runs["stopped"])
    assert_refused(ibq_here("resume", runs["stopped"]), "is at step 10 already", "trainer.max_steps=20")
    assert fingerprint(runs["stopped"]) == before


def test_other_data_is_refused(ibq_here, assert_refused, fingerprint, copy_of):
    run = copy_of("stopped")
    before = fingerprint(run)
    finished = ibq_here("resume", run, "trainer.max_steps=20", "data.train=bundled:val")
    assert_refused(finished, "cannot resume")
    assert fingerprint(run) == before


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("generator/optimizer.pt", b""),
        ("generator/optimizer.pt", b"no pickle at all"),
        ("discriminator.safetensors", b"cut"),
        ("tokenizer.codebook_000000000_000000256.safetensors", b"cut"),
        ("tokenizer_ema.codebook_000000010_000000256.safetensors", b"another one that begins in the middle"),
        ("codebook/optimizer.codebook_000000256_000000300.safetensors", b"more codes than there are"),
        ("state.json", b""),
        ("state.json", b"[]"),
        ("state.json", b"{}"),
        ("state.json", b'{"step": 5, "data": {}, "engine": {"kind": "replicated"}, "world_size": 1}'),
        ("../latest", b"\xff\xfe"),
        ("../../metrics.jsonl", b'{"step": 1}\n[1]\n{"step": 2}\n'),
    ],
)
def test_a_damaged_run_ends_in_one_line(ibq_here, assert_refused, fingerprint, copy_of, file, content):
    run = copy_of("one, accumulating")
    (run / "checkpoints/step_00000005" / file).write_bytes(content)
    before = fingerprint(run)
    assert_refused(ibq_here("resume", run, "trainer.max_steps=6"))
    assert fingerprint(run) == before
