"""The norms of the loss terms' gradients, and the warning about losses that drown the image."""

import copy
from types import SimpleNamespace

import pytest
import torch
from comparing import refusal
from support import as_float, equal, images, tokenizer_run, tokenizer_task

from model_zoo.losses import entropy_penalty, quantizer_loss
from trainer import TrainerError
from trainer.parallel import start_world
from trainer.tasks.gradient_balance import PLACES, unmeasurable

SETTINGS = dict(loss__generator__weight=0.0, trainer__log_gradient_balance=True, trainer__log_every_steps=1)


def balance(scalars: dict) -> dict[str, float]:
    """The norms among a step's scalars."""
    return {name.removeprefix("gradient/"): norm for name, norm in scalars.items() if name.startswith("gradient/")}


def by_hand(task, images_bchw) -> dict[str, float]:
    """Each term's gradient by a forward pass of a copy and a backward pass of this term alone."""
    config, norms = task.config.loss, {}
    for term in ("reconstruction", "quantizer", "entropy"):
        tokenizer = copy.deepcopy(task.tokenizer)
        z_bdhw = tokenizer.encode(images_bchw)
        z_bdhw.retain_grad()
        quantized = tokenizer.quantize(z_bdhw, config.entropy.temperature)
        average_k = quantized.average_probability_k.detach()
        if term == "reconstruction":
            reconstruction_bchw = tokenizer.decode(quantized.quantized_bdhw)
            loss = config.reconstruction.weight * (reconstruction_bchw - images_bchw).abs().mean()
        elif term == "quantizer":
            loss = config.quantizer.weight * quantizer_loss(quantized, config.quantizer)
        else:
            loss = config.entropy.weight * entropy_penalty(quantized, average_k, config.entropy).loss
        loss.backward()
        encoder = torch.cat([p.grad.flatten() for p in tokenizer.encoder.parameters() if p.grad is not None])
        gradients = z_bdhw.grad, tokenizer.quantize.embedding.weight.grad, encoder
        norms |= {f"{place}/{term}": float(g.norm()) for place, g in zip(PLACES, gradients, strict=True)}
    return norms


@pytest.mark.parametrize("model", [{}, {"model__normalize": True, "model__learn_logit_scale": True}])
def test_norms_equal_separate_backward_passes(world, model):
    """A learned scale of the logits is no part of the codes."""
    task = tokenizer_task(world, **SETTINGS, **model, loss__reconstruction__weight=3.0)
    images_bchw = images()
    expected = by_hand(task, as_float(images_bchw))
    found = balance(task.step([images_bchw], 0).scalars)
    assert found == pytest.approx(expected, rel=1e-4)
    assert len(found) == 9 and min(found.values()) > 0


def test_logging_changes_no_step(world):
    tasks = [tokenizer_task(world, **{**SETTINGS, "trainer__log_gradient_balance": on}) for on in (False, True)]
    for step in range(2):
        first, second = (task.step([images(step)], step).scalars for task in tasks)
        assert second.items() >= first.items()
    assert equal(*(task.tokenizer.state_dict() for task in tasks))


def test_norms_are_logged_with_the_other_scalars(world):
    task = tokenizer_task(world, **{**SETTINGS, "trainer__log_every_steps": 2})
    assert [bool(balance(task.step([images(step)], step).scalars)) for step in range(4)] == [False, True, False, True]


@pytest.mark.parametrize(("weight", "drowned"), [(1e-4, True), (8.0, False)])
def test_a_drowned_image_is_a_warning_of_the_first_step(world, weight, drowned):
    changes = dict(loss__generator__weight=0.0, loss__reconstruction__weight=weight)
    for steps in (100, 99):  # a shorter run only tests that everything works
        task = tokenizer_task(world, **changes, trainer__max_steps=steps)
        warning = task.step([images()], 0).warning
        assert bool(warning and "loss.reconstruction.weight" in warning) == (drowned and steps == 100)
        assert task.step([images()], 1).warning is None and task.alarm is None


def test_the_image_shares_count_all_terms_of_the_image(world):
    task = tokenizer_task(world, loss__reconstruction__weight=3.0)
    out = task._forward(as_float(images()))
    z_bdhw = task.balance.features_bdhw
    factors = {"reconstruction": 2, "generator": 1, "quantizer": 3, "entropy": 1, "semantic": 9}
    terms = {name: factor * z_bdhw.sum() for name, factor in factors.items()}
    assert out.quantized.index_bhw.numel()
    assert task.balance.image_shares(terms, 1.0) == pytest.approx({"quantizer": 3 / 7, "semantic": 3 / 12})
    for name in ("quantizer", "entropy", "semantic"):
        del terms[name]
    assert task.balance.image_shares(terms, 1.0) == {"quantizer": 1, "semantic": 1}
    assert task.balance.image_shares({}, 1.0) == {"quantizer": 1, "semantic": 1}


@pytest.mark.parametrize(
    ("changes", "said", "others"),
    [
        ({"trainer__compile": True}, "set trainer.compile=false", ("engine.kind", "init_from")),
        ({"init_from__freeze": "encoder"}, "do not freeze the encoder", ("engine.kind", "trainer.compile")),
        ({"engine__kind": "fsdp2"}, "use engine.kind=ddp", ("init_from", "trainer.compile")),
    ],
)
def test_where_it_cannot_be_measured_it_is_refused_with_the_cause_that_applies(world, changes, said, others):
    task = tokenizer_task(world, **SETTINGS, **changes)
    line = refusal(TrainerError, task.check_settings)
    assert line.startswith("trainer.log_gradient_balance=true ") and said in line
    assert not any(other in line for other in others)


def test_the_engine_that_shards_is_named():
    config = tokenizer_run(engine__kind="deepspeed", engine__config="zero3")
    assert "engine.config=zero3 shards them" in unmeasurable(config, SimpleNamespace(forwards_together=True))
    assert unmeasurable(config, SimpleNamespace(forwards_together=False)) is None


def norms_of_rank(codebook_parallel: int) -> dict[str, float]:
    """Norms of the first step, of this rank's half of the batch."""
    world = start_world("cpu", timeout_seconds=60)
    task = tokenizer_task(world, **SETTINGS, codebook_parallel=codebook_parallel)
    half = images().chunk(world.size)[world.rank]
    return balance(task.step([half], 0).scalars)


@pytest.mark.parametrize("codebook_parallel", [1, 2])
def test_ranks_agree(ranks, codebook_parallel):
    first, second = ranks.call(2, norms_of_rank, codebook_parallel, join=False)
    assert first == second and len(first) == 9
    if codebook_parallel == 2:  # the codes' gradient is that of the group's whole batch
        (alone,) = ranks.call(1, norms_of_rank, 1, join=False)
        for term in ("reconstruction", "quantizer", "entropy"):
            assert first[f"codes/{term}"] == pytest.approx(alone[f"codes/{term}"], rel=1e-4)
