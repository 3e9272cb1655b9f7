"""Quantizers whose codes are a function of a table train, validate, resume and are loaded like the others."""

import json
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from comparing import assert_refused, copy_until, loss_lines, read_metrics
from ranks import Ended, settings

import data
from model_zoo.io.load import load_tokenizer
from trainer.metrics.image import psnr
from trainer.recipes import load_run_config

STEPS = 4
TOLERANCE = 1e-5  # of losses, relative
ENGINES = {
    "ddp": {},
    "zero1": {"engine.kind": "deepspeed", "engine.config": "zero1"},
    "zero3": {"engine.kind": "deepspeed", "engine.config": "zero3", "trainer.micro_batch_size": 2},  # accumulates
    "fsdp2": {"engine.kind": "fsdp2"},
}
RIVALS = {
    "simvq": {},
    # A larger rate: the last layer starts at 0, so that all codes do.
    "vqbridge": {"model.bridge_group": 16, "model.bridge_width": 32, "optimizer.lr": 1e-3},
    "vqgan_lc": {"model.table_dim": 12, "model.code_dim": 8},
}
DEFAULT = [("simvq", "ddp"), ("simvq", "zero3"), ("vqbridge", "zero1"), ("vqbridge", "fsdp2"), ("vqgan_lc", "ddp")]
CELLS = [
    pytest.param(rival, engine, marks=[pytest.mark.full] * ((rival, engine) not in DEFAULT))
    for rival in RIVALS
    for engine in ENGINES
]


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("table") / "codes.npy"
    # As long as the features, so that several codes are chosen.
    np.save(path, np.random.default_rng(0).normal(size=(256, 12), scale=0.15).astype(np.float32))
    return path


@pytest.fixture(scope="module")
def train(ranks, table, tmp_path_factory):
    """`train(rival, processes, engine)`: the folder of a run of `debug`."""
    folder = tmp_path_factory.mktemp("rivals")

    @cache
    def train(rival: str, processes: int = 1, engine: str = "ddp") -> Path:
        run = folder / f"{rival}_{processes}_{engine}"
        changes = {
            **{f"trainer.{key}": STEPS for key in ("max_steps", "validate_every_steps")},
            **{"trainer.checkpoint_every_steps": 2, "model.quantizer": rival, "seed": 5},
            **({"model.codes": table} if rival == "vqgan_lc" else {}),
            **RIVALS[rival],
            **ENGINES[engine],
        }
        ranks.train(processes, "debug", run, changes).succeeded()
        return run

    return train


@pytest.mark.parametrize(("rival", "engine"), CELLS)
def test_two_ranks_equal_one(train, rival, engine):
    expected, actual = train(rival), train(rival, 2, engine)
    lines, truly = loss_lines(actual), loss_lines(expected)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["codebook/perplexity"] > 3
    for line, true_line in zip(lines, truly, strict=True):
        assert line == pytest.approx(true_line, rel=TOLERANCE, abs=1e-6)
    validated, truly = ([line for line in read_metrics(run) if "val/psnr" in line] for run in (actual, expected))
    assert validated[-1] == pytest.approx(truly[-1], rel=TOLERANCE)


@pytest.mark.parametrize("rival", RIVALS)
def test_resumed_equals_unbroken_bit_for_bit(train, ranks, table, tmp_path, rival):
    """And needs no table of codes."""
    unbroken = train(rival)
    run = copy_until(unbroken, 2, tmp_path / "run")
    if rival == "vqgan_lc":
        table = table.rename(table.with_suffix(".moved"))
    try:
        ranks.resume(1, run).succeeded()
    finally:
        if rival == "vqgan_lc":
            table.rename(table.with_suffix(".npy"))
    files = [folder / "checkpoints/step_00000004/rank_00000.safetensors" for folder in (unbroken, run)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert loss_lines(run)[-2:] == loss_lines(unbroken)[-2:]


@pytest.mark.parametrize("rival", RIVALS)
def test_the_loaded_average_is_what_validation_saw(train, rival):
    """Table and projector change places with their averages together."""
    run = train(rival)
    config = load_run_config(run, [])
    tokenizers = {weights: load_tokenizer(run, weights) for weights in ("ema", "raw")}
    found = {}
    for weights, tokenizer in tokenizers.items():
        images = data.evaluation_images(
            config.data.val,
            image_size=config.data.image_size,
            resize=config.data.resize,
            shard=(0, 1),
            access=data.access_of(config.data),
        )
        values = []
        for image in islice(images, config.trainer.validation_images):
            original_bchw = image.image_chw[None].float() / 127.5 - 1
            index_bhw = tokenizer.tokenize(original_bchw)
            values.append(psnr(tokenizer.detokenize(index_bhw).clamp(-1, 1), original_bchw)[0].item())
        found[weights] = sum(values) / len(values)
    validated = [line["val/psnr"] for line in read_metrics(run) if "val/psnr" in line][-1]
    assert found["ema"] == pytest.approx(validated, rel=1e-6)
    assert found["raw"] != pytest.approx(validated, rel=1e-6)


@pytest.mark.parametrize("rival", RIVALS)
def test_the_fingerprint_covers_table_and_projector(train, rival):
    tokenizer = load_tokenizer(train(rival))
    before = tokenizer.fingerprint()
    names = [name for name, _ in tokenizer.quantize.named_parameters()]
    assert "embedding.weight" in names and any(name.startswith("projector.") for name in names)
    for name, weight in tokenizer.quantize.named_parameters():
        kept = weight.detach().clone()
        weight.data.view(-1)[0] += 1
        assert tokenizer.fingerprint() != before, name
        weight.data.copy_(kept)
    assert tokenizer.fingerprint() == before


@pytest.mark.parametrize("rival", RIVALS)
def test_an_export_makes_the_same_codes(train, ibq_here, tmp_path, rival):
    run = train(rival)
    ibq_here("checkpoint", "export", run, "--out", tmp_path / "model").succeeded()
    trained, exported = load_tokenizer(run), load_tokenizer(tmp_path / "model")
    assert exported.fingerprint() == trained.fingerprint()
    images_bchw = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    index_bhw = trained.tokenize(images_bchw)
    assert torch.equal(exported.tokenize(images_bchw), index_bhw)
    assert torch.equal(exported.detokenize(index_bhw), trained.detokenize(index_bhw))


def test_frozen_tables_are_not_trained_and_bridged_ones_are(train):
    for rival in RIVALS:
        tables = [
            load_tokenizer(train(rival) / f"checkpoints/step_{step:08d}", "raw").quantize.embedding.weight
            for step in (2, 4)
        ]
        assert torch.equal(*tables) == (rival != "vqbridge"), rival


def test_a_run_continues_from_the_weights_of_another_without_its_file(train, ibq_here, tmp_path):
    source = train("vqgan_lc")
    changes = {"trainer.max_steps": 1, "optimizer.lr": 0, "model.quantizer": "vqgan_lc", **RIVALS["vqgan_lc"]}
    for freeze in ("null", "encoder", "decoder"):
        run = tmp_path / freeze
        arguments = settings({**changes, "trainer.checkpoint_every_steps": 1, "init_from.freeze": freeze})
        ibq_here("train", "debug", f"run={run}", f"init_from.source={source}", *arguments).succeeded()
        assert load_tokenizer(run).fingerprint() == load_tokenizer(source).fingerprint()
        assert json.loads((run / "init_from.json").read_text())["fingerprint"] == load_tokenizer(source).fingerprint()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.quantizer": "vqgan_lc"}, "give a .npy or .safetensors file of 256 rows of 768 values"),
        ({"model.quantizer": "vqgan_lc", "model.codes": "nowhere.npy"}, "nowhere.npy does not exist"),
        ({"model.codes": "codes.npy"}, "model.codes is for model.quantizer=vqgan_lc"),
        ({"model.quantizer": "vqbridge", "model.bridge_group": 48}, "give model.bridge_group=32"),
        ({"model.quantizer": "simvq", "model.normalize": "true"}, "model.normalize=false"),
    ],
)
def test_mistakes_end_in_one_line(ibq_here, tmp_path, changes, said):
    ended: Ended = ibq_here("train", "debug", f"run={tmp_path / 'run'}", *settings(changes))
    assert_refused(ended, said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rival", RIVALS)
def test_codes_cannot_be_sharded(ranks, tmp_path, rival):
    ended = ranks.train(2, "debug", tmp_path / "run", {"model.quantizer": rival, "codebook_parallel": 2})
    assert set(ended.statuses) == {2}
    assert "set codebook_parallel=1" in ended.err
