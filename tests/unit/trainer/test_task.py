"""One step of tokenizer training: which network is updated when, by which gradient; a tiny model on one process."""

import copy
import json
import math
from contextlib import nullcontext
from functools import partial
from operator import attrgetter
from unittest.mock import Mock

import pytest
import support
import torch
import torch.distributed as dist
from comparing import refusal
from model_checks import quantizer_of
from PIL import Image
from support import as_float, equal, gradients, images, tokenizer_task, watch, weights
from torch.nn import functional as F

from model_zoo import ModelError
from model_zoo.config import EntropyLoss, GeneratorLoss, QuantizerLoss
from model_zoo.io.sharded_tensors import ShardedTensors, save_shards
from model_zoo.losses import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES
from model_zoo.ops.types import average_entropy
from trainer import TrainerError
from trainer.config import ScheduleConfig
from trainer.parallel import World
from trainer.tasks import perceptual as perceptual_module
from trainer.tasks.adversarial import frozen
from trainer.tasks.tokenizer import TokenizerTask


@pytest.fixture
def build(world):
    return partial(tokenizer_task, world)


def averages(task):
    """The EMA's, by the names of the tokenizer's state dict."""
    of_codes = {f"quantize.{name}": value for name, value in support.averages(task.state.ema, task.codebook).items()}
    return support.averages(task.state.ema, task.main_engine) | of_codes


def save(task, folder):
    """Writes a checkpoint's tensors; returns what to give to `load`."""
    save_shards(folder / "rank_00000.safetensors", task.state.tensors())
    return folder, json.dumps(task.state.numbers())


def load(task, folder, state):
    task.state.load(ShardedTensors(folder), json.loads(state))


def numbers(scalars):
    return {name: float(value) for name, value in scalars.items()}


def assert_scalars(scalars, expected, **tolerance):
    found = numbers({name: scalars[name] for name in expected})
    assert found == pytest.approx({name: value.item() for name, value in expected.items()}, **tolerance)


def assert_total(scalars, term_weights, rel=1e-5):
    """The total is the sum of the terms that are there, each by its weight."""
    total = sum(weight * float(scalars[name]) for name, weight in term_weights.items() if name in scalars)
    assert float(scalars["loss/total"]) == pytest.approx(total, rel=rel)


def test_generators_backward_leaves_the_discriminator_untouched(build):
    task = build()
    network = task.adversary.engine.module
    seen = watch(task.main_engine, lambda: (gradients(network), weights(network)))
    before = weights(network)
    task.step([images()], 0)
    at_generators_update, updated = seen[0]
    assert not equal(before, updated)  # it did learn, and before the generator
    assert all(gradient is None for gradient in at_generators_update.values())
    assert equal(weights(network), updated)
    assert all(p.requires_grad for p in network.parameters())


def test_discriminators_backward_leaves_the_generator_untouched(build):
    task = build()
    before = weights(task.tokenizer)
    seen = watch(task.adversary.engine, lambda: (gradients(task.tokenizer), weights(task.tokenizer)))
    task.step([images()], 0)
    assert all(gradient is None for gradient in seen[0][0].values())
    assert equal(seen[0][1], before)


def test_frozen_gives_requires_grad_back_after_an_exception():
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="inside"), frozen(layer):
        assert not any(p.requires_grad for p in layer.parameters())
        raise RuntimeError("inside")
    assert all(p.requires_grad for p in layer.parameters())


def generator_loss_by_hand(tokenizer, discriminator, images_bchw):
    """The published loss (reference form) written out for IBQ, without the project's loss functions."""
    z_bdhw = tokenizer.encode(images_bchw)
    z_nd = z_bdhw.permute(0, 2, 3, 1).flatten(0, 2)
    codebook_kd = tokenizer.quantize.embedding.weight
    logits_nk = z_nd @ codebook_kd.T
    soft_nk = logits_nk.softmax(dim=1)
    hard_nk = F.one_hot(logits_nk.argmax(dim=1), len(codebook_kd)).float()
    chosen_nd = codebook_kd[logits_nk.argmax(dim=1)]
    quantized_nd = (hard_nk + soft_nk - soft_nk.detach()) @ codebook_kd
    quantized_bdhw = quantized_nd.view(*z_bdhw.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
    reconstruction_bchw = tokenizer.decode(quantized_bdhw)
    soft_nk = (logits_nk / 0.5).softmax(dim=1)
    return {
        "loss/reconstruction": (reconstruction_bchw - images_bchw).abs().mean(),
        "loss/double_quantization": (quantized_nd - z_nd).square().mean(),
        "loss/commitment": (z_nd - chosen_nd.detach()).square().mean(),
        "loss/codebook": (z_nd.detach() - chosen_nd).square().mean(),
        "loss/sample_entropy": torch.special.entr(soft_nk).sum(dim=1).mean(),
        "loss/average_entropy": average_entropy(soft_nk.mean(dim=0)),
        "loss/generator": F.softplus(-discriminator(reconstruction_bchw).mean(dim=(1, 2, 3))).mean(),
    }


DEFAULT_WEIGHTS = {
    "loss/reconstruction": 1.0,
    "loss/double_quantization": 1.0,
    "loss/commitment": 1.0,
    "loss/codebook": 0.25,
    "loss/sample_entropy": 0.05,
    "loss/average_entropy": -0.05,
    "loss/generator": 0.1,
}


def test_generator_learns_from_the_whole_loss_against_the_updated_discriminator(build):
    task = build()
    original = copy.deepcopy(task.tokenizer)
    old_discriminator = copy.deepcopy(task.adversary.engine.module)
    seen = watch(task.main_engine, lambda: gradients(task.tokenizer))
    scalars = task.step([images()], 0).scalars

    updated_discriminator = copy.deepcopy(task.adversary.engine.module)
    terms = generator_loss_by_hand(original, updated_discriminator, as_float(images()))
    terms["loss/total"] = sum(DEFAULT_WEIGHTS[name] * term for name, term in terms.items())
    terms["loss/total"].backward()
    assert_scalars(scalars, terms, rel=1e-4)
    stale = generator_loss_by_hand(original, old_discriminator, as_float(images()))["loss/generator"]
    assert float(scalars["loss/generator"]) != pytest.approx(stale.item(), rel=1e-4)
    torch.testing.assert_close(seen[0], gradients(original), rtol=1e-3, atol=1e-6)


def test_discriminator_learns_hinge_and_lecam_from_real_and_reconstructed_images(build):
    task = build()
    task.adversary.lecam.mean_real.fill_(0.3)
    task.adversary.lecam.mean_fake.fill_(-0.2)
    network = copy.deepcopy(task.adversary.engine.module)
    with torch.no_grad():
        fake_bchw = task.tokenizer(as_float(images())).reconstruction_bchw
    seen = watch(task.adversary.engine, lambda: gradients(task.adversary.engine.module))
    scalars = task.step([images()], 0).scalars

    real, fake = network(as_float(images())), network(fake_bchw)
    hinge = 0.5 * ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean())
    lecam = (real + 0.2).clamp(min=0).square().mean() + (0.3 - fake).clamp(min=0).square().mean()
    (hinge + 0.05 * lecam).backward()
    by_hand = {"loss/discriminator": hinge, "loss/lecam": lecam}
    by_hand |= {"discriminator/logits_real": real.mean(), "discriminator/logits_fake": fake.mean()}
    assert_scalars(scalars, by_hand, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(seen[0], gradients(network), rtol=1e-3, atol=1e-6)
    assert task.adversary.lecam.mean_real.item() == pytest.approx(0.999 * 0.3 + 0.001 * real.mean().item(), rel=1e-5)
    assert task.adversary.lecam.mean_fake.item() == pytest.approx(-0.999 * 0.2 + 0.001 * fake.mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # (step, does the discriminator learn, weight of the generator's term)
        ({}, [(0, True, 0.1), (19, True, 0.1)]),
        ({"discriminator__start_step": 3}, [(2, False, None), (3, True, 0.1), (4, True, 0.1)]),
        (
            {"discriminator__start_step": 3, "generator__ramp_steps": 4},
            [(2, False, None), (3, True, 0.025), (4, True, 0.05), (6, True, 0.1), (9, True, 0.1)],
        ),
        (
            {"discriminator__start_step": 3, "generator__start_step": 5, "generator__ramp_steps": 2},
            [(2, False, None), (3, True, None), (4, True, None), (5, True, 0.05), (6, True, 0.1), (7, True, 0.1)],
        ),
        ({"generator__weight": 0.5, "generator__start_step": 1}, [(0, True, None), (1, True, 0.5)]),
    ],
)
def test_adversarial_terms_start_and_grow_as_the_recipe_says(build, changes, expected):
    task = build(**{f"loss__{key}": value for key, value in changes.items()})
    for step, learns, weight in expected:
        before, means = weights(task.adversary.engine.module), weights(task.adversary.lecam)
        scalars = task.step([images(step)], step).scalars
        assert equal(before, weights(task.adversary.engine.module)) != learns
        assert equal(means, weights(task.adversary.lecam)) != learns
        for name in ("loss/discriminator", "loss/lecam", "lr/discriminator", "grad_norm/discriminator"):
            assert (name in scalars) == learns
        for name in ("weight/generator", "loss/generator"):
            assert (name in scalars) == (weight is not None)
        used = {**DEFAULT_WEIGHTS, "loss/generator": weight}
        if weight is not None:
            assert float(scalars["weight/generator"]) == pytest.approx(weight)
        assert_total(scalars, used)


def test_without_an_adversarial_term_there_is_no_discriminator(build, tmp_path):
    task = build(loss__generator__weight=0.0)
    assert task.adversary.engine is None
    scalars = task.step([images()], 0).scalars
    adversarial = {name for name in scalars if "generator" in name or "discriminator" in name or "lecam" in name}
    assert not adversarial
    load(task, *save(task, tmp_path))


def test_perceptual_weight_zero_builds_no_vgg(build, monkeypatch):
    monkeypatch.setattr(perceptual_module, "Perceptual", Mock(side_effect=AssertionError("VGG was built")))
    task = build()
    assert task.perceptual.lpips is None
    assert "loss/perceptual" not in task.step([images()], 0).scalars
    with pytest.raises(AssertionError, match="VGG was built"):
        build(loss__perceptual__weight=0.5)


def test_a_missing_vgg_file_is_an_error_and_no_random_weights(build, tmp_path):
    with pytest.raises(ModelError, match=r"loss\.perceptual\.weight=0"):
        build(loss__perceptual__weight=1.0, loss__perceptual__vgg16_weights=str(tmp_path / "vgg16.pth"))


def test_perceptual_term_is_logged_and_weighed(build, monkeypatch):
    class Squares(torch.nn.Module):
        def __init__(self, file):
            super().__init__()
            assert file == "here.pth"

        def forward(self, x_bchw, y_bchw):
            return (x_bchw - y_bchw).square().mean(dim=(1, 2, 3))

    monkeypatch.setattr(perceptual_module, "Perceptual", Squares)
    task = build(loss__perceptual__weight=2.0, loss__perceptual__vgg16_weights="here.pth")
    with torch.no_grad():
        reconstruction_bchw = task.tokenizer(as_float(images())).reconstruction_bchw
    scalars = task.step([images()], 0).scalars
    expected = (reconstruction_bchw - as_float(images())).square().mean().item()
    assert float(scalars["loss/perceptual"]) == pytest.approx(expected, rel=1e-5)
    assert_total(scalars, {**DEFAULT_WEIGHTS, "loss/perceptual": 2.0})


def test_adaptive_weight_compares_gradients_at_the_last_layer(build):
    task = build(loss__generator__adaptive=True, loss__reconstruction__weight=2.0)
    tokenizer = copy.deepcopy(task.tokenizer)
    scalars = task.step([images()], 0).scalars
    terms = generator_loss_by_hand(tokenizer, task.adversary.engine.module, as_float(images()))
    last_layer = tokenizer.decoder.conv_out.weight
    reconstruction, generator = (
        torch.autograd.grad(term, last_layer, retain_graph=True)[0].norm().item()
        for term in (2 * terms["loss/reconstruction"], terms["loss/generator"])
    )
    expected = 0.1 * reconstruction / (generator + 1e-4)
    assert expected != pytest.approx(0.1, rel=0.1)
    assert float(scalars["weight/generator"]) == pytest.approx(expected, rel=1e-3)
    assert_total(scalars, {**DEFAULT_WEIGHTS, "loss/reconstruction": 2.0, "loss/generator": expected}, rel=1e-4)


def test_adaptive_weight_is_capped_and_ramped(build):
    task = build(loss__generator__adaptive=True, loss__generator__adaptive_cap=0.01, loss__generator__ramp_steps=2)
    assert float(task.step([images()], 0).scalars["weight/generator"]) == pytest.approx(0.5 * 0.1 * 0.01)
    assert float(task.step([images()], 1).scalars["weight/generator"]) == pytest.approx(0.1 * 0.01)


def test_batch_norm_never_mixes_real_and_fake(build):
    task = build(discriminator__norm="batch")
    network = copy.deepcopy(task.adversary.engine.module)
    with torch.no_grad():
        fake_bchw = task.tokenizer(as_float(images())).reconstruction_bchw
    mixed = copy.deepcopy(network)
    seen = watch(task.adversary.engine, lambda: gradients(task.adversary.engine.module))
    task.step([images()], 0)

    # Real and fake apart for its own update, then fake again, by the updated weights, for the generator's.
    real, fake = network(as_float(images())), network(fake_bchw)
    loss = 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())
    (loss + 0.05 * (real.relu().square().mean() + (-fake).relu().square().mean())).backward()
    torch.testing.assert_close(seen[0], gradients(network), rtol=1e-3, atol=1e-6)
    network.load_state_dict(dict(task.adversary.engine.module.named_parameters()), strict=False)
    network(fake_bchw)
    buffers = dict(task.adversary.engine.module.named_buffers())
    assert buffers
    torch.testing.assert_close(buffers, dict(network.named_buffers()), rtol=1e-4, atol=1e-6)
    mixed(torch.cat([as_float(images()), fake_bchw]))
    assert not torch.allclose(buffers["main.3.running_mean"], mixed.main[3].running_mean, rtol=1e-2)


def test_group_norm_judges_real_and_fake_in_one_forward(build):
    task = build()
    sizes = []
    task.adversary.engine.module.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    task.step([images()], 0)
    assert sizes == [16, 8]


@pytest.mark.parametrize("kind", ["hinge", "vanilla"])
def test_a_step_does_not_depend_on_how_its_batch_is_cut(build, kind):
    results = []
    for micro_batch_size in (8, 2):
        task = build(trainer__micro_batch_size=micro_batch_size, loss__discriminator__kind=kind)
        micro_batches = list(images().split(micro_batch_size))
        assert len(micro_batches) == task.main_engine.micro_batches
        engines = task.main_engine, task.adversary.engine
        seen = [watch(engine, lambda module=engine.module: gradients(module)) for engine in engines]
        scalars = task.step(micro_batches, 0).scalars
        results.append((seen, scalars, task))
    (whole, whole_scalars, whole_task), (parts, parts_scalars, parts_task) = results
    for whole_gradients, parts_gradients in zip(whole, parts, strict=True):
        assert torch.stack([gradient.norm() for gradient in whole_gradients[0].values()]).norm() > 0.1
        torch.testing.assert_close(parts_gradients[0], whole_gradients[0], rtol=1e-4, atol=1e-6)
    whole_state, parts_state = everything(whole_task), everything(parts_task)
    for part in ("tokenizer", "discriminator", "lecam", "ema"):
        torch.testing.assert_close(parts_state[part], whole_state[part], rtol=0, atol=1e-6)
    assert numbers(parts_scalars) == pytest.approx(numbers(whole_scalars), rel=1e-4, abs=1e-6)
    assert torch.equal(whole_task.health.recent.counts_k, parts_task.health.recent.counts_k)
    assert whole_task.health.recent.token_count() == 8 * 16


def test_rates_follow_the_schedule_for_both_networks(build):
    schedule = ScheduleConfig(kind="multistep", warmup_steps=4, milestones=[6], factor=0.1)
    task = build(schedule=schedule, optimizer__discriminator_lr=4e-3)
    before = weights(task.tokenizer), weights(task.adversary.engine.module)
    rates = []
    for step in (0, 1, 4, 6):
        scalars = task.step([images()], step).scalars
        rates.append((scalars["lr/tokenizer"], scalars["lr/discriminator"]))
        if step == 0:  # the first rate of the warm-up is 0
            assert equal(before[0], weights(task.tokenizer)) and equal(before[1], weights(task.adversary.engine.module))
        for engine, rate in zip((task.main_engine, task.adversary.engine), rates[-1], strict=True):
            assert [group["lr"] for group in engine.optimizer.param_groups] == [rate]
    assert rates == [pytest.approx((1e-3 * share, 4e-3 * share)) for share in (0.0, 0.25, 1.0, 0.1)]


def test_a_discriminator_rate_of_zero_is_zero_and_none_is_the_generators(build):
    assert build(optimizer__discriminator_lr=0.0).adversary.lr == 0.0
    assert build(optimizer__discriminator_lr=None).adversary.lr == 1e-3


def test_clipping_bounds_the_update_and_logs_the_norm_before_it(build):
    norms = []
    for clip in (None, 1e-3):
        task = build(trainer__gradient_clip_norm=clip, loss__generator__weight=0.0)
        original = [p.detach().clone() for p in task.tokenizer.parameters()]
        for engine in (task.main_engine, task.codebook):  # one norm for both
            parameters = [p for group in engine.optimizer.param_groups for p in group["params"]]
            engine.optimizer = torch.optim.SGD(parameters, lr=1.0)
        scalars = task.step([images()], 0).scalars
        moved = torch.stack([(p - o).norm() for p, o in zip(task.tokenizer.parameters(), original, strict=True)]).norm()
        norms.append((float(scalars["grad_norm/tokenizer"]), moved.item() / 1e-3))
    (norm, moved), (clipped_norm, clipped_moved) = norms
    assert norm > 0.01 and clipped_norm == pytest.approx(norm, rel=1e-5)
    assert moved == pytest.approx(norm, rel=1e-3)
    assert clipped_moved == pytest.approx(1e-3, rel=0.1)


def test_vq_trains_without_entropy_terms(build):
    task = build(model__quantizer="vq")
    before = weights(task.tokenizer)
    scalars = task.step([images()], 0).scalars
    assert not any("entropy" in name or "double" in name for name in scalars)
    assert {"loss/commitment", "loss/codebook"} <= scalars.keys()
    assert not torch.equal(before["quantize.embedding.weight"], task.tokenizer.quantize.embedding.weight)


@pytest.mark.parametrize(
    ("changes", "word"), [({"loss__entropy__weight": 0.0}, "entropy"), ({"trainer__precision": "bf16"}, "loss_scale")]
)
def test_what_is_not_there_is_not_logged(build, changes, word):
    assert not any(word in name for name in build(**changes).step([images()], 0).scalars)


def test_bf16_keeps_weights_and_gradients_in_fp32_and_stays_near_fp32(build):
    steps = {}
    for precision in ("fp32", "bf16"):
        task = build(trainer__precision=precision)
        seen = watch(task.main_engine, lambda task=task: gradients(task.tokenizer))
        steps[precision] = task.step([images()], 0).scalars
        assert all(gradient.dtype == torch.float32 for gradient in seen[0].values())
        assert all(p.dtype == torch.float32 for p in task.tokenizer.parameters())
    fp32, bf16 = (float(steps[precision]["loss/reconstruction"]) for precision in ("fp32", "bf16"))
    assert fp32 != bf16 and bf16 == pytest.approx(fp32, rel=0.02)


def features(task, images_bchw):
    with torch.no_grad():
        return task.tokenizer.encode(as_float(images_bchw)).movedim(1, -1).flatten(0, 2).double()


@pytest.mark.parametrize("quantizer", ["ibq", "soft_vq", "vq"])
def test_a_new_run_begins_with_centred_features_and_codes_among_them(build, quantizer):
    task, batch = build(model__quantizer=quantizer), images()
    before = features(task, batch)
    task.init_from_data([batch])
    after = features(task, batch)
    torch.testing.assert_close(after, before - before.mean(dim=0), atol=1e-6, rtol=0)
    codes_kd = task.tokenizer.quantize.embedding.weight.detach().double()
    length = after.square().sum(dim=1).mean().sqrt() / 2 if quantizer == "vq" else torch.tensor(1.25).double()
    torch.testing.assert_close(codes_kd.norm(dim=1), length.expand(24), atol=0, rtol=1e-5)
    assert equal(averages(task), weights(task.tokenizer))


@pytest.mark.parametrize("scale", [1.0, 1e-8])  # short features have codes of the same length
def test_codes_point_where_features_do(scale):
    quantizer = quantizer_of("ibq", 4096, 8)
    basis_dd = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    variance = torch.tensor([8.0, 4, 2, 1, 0.5, 0, 0, 0], dtype=torch.float64)
    quantizer.match_features(scale * (basis_dd * variance) @ basis_dd.T)
    along = (quantizer.embedding.weight.detach().double() @ basis_dd).square().mean(dim=0)
    assert along.sum().item() == pytest.approx(1.25**2, rel=1e-5)
    assert along.tolist() == sorted(along.tolist(), reverse=True)[:5] + along[5:].tolist()
    assert 0 < along[5:].max() < 0.01 * along[4]


def test_features_that_do_not_vary_leave_the_codes(build):
    task = build()
    before = task.tokenizer.quantize.embedding.weight.detach().clone()
    with torch.no_grad():
        task.tokenizer.quant_conv.weight.mul_(1e-9)  # a variance that only rounding makes, of any sign
        task.tokenizer.quant_conv.bias.fill_(1.3)
    task.init_from_data([images()])
    assert torch.equal(task.tokenizer.quantize.embedding.weight, before)
    assert features(task, images()).abs().max() < 1e-6


def test_features_that_are_not_finite_end_in_a_line_before_anything_moves(build):
    task = build()
    with torch.no_grad():
        task.tokenizer.quant_conv.weight[0, 0] = torch.inf
    before = weights(task.tokenizer)
    assert "not finite" in refusal(TrainerError, task.init_from_data, [images()])
    assert equal(weights(task.tokenizer), before)


def test_the_start_does_not_depend_on_how_the_batch_is_cut(build):
    batch, whole, cut = images(), build(), build(trainer__micro_batch_size=2)
    whole.init_from_data([batch])
    cut.init_from_data(list(batch.split(2)))
    torch.testing.assert_close(weights(cut.tokenizer), weights(whole.tokenizer), atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"model__codebook_init": "normal"},
        {"init_from__source": "a run whose codes are to stay"},
        {"model__quantizer": "lfq", "model__codebook_size": 64, "loss__quantizer__double_quantization_weight": 0.0},
        {"model__quantizer": "bsq", "model__codebook_size": 64},
        {"model__quantizer": "fsq", "model__codebook_size": 64, "model__levels": [2] * 6},
    ],
)
def test_a_start_that_is_another_stays_as_it_is(build, changes):
    task = build(**changes)
    before = weights(task.tokenizer)
    task.init_from_data([images()])
    assert equal(weights(task.tokenizer), before)


def test_usage_of_groups_has_names_of_its_own(build):
    huge = {"model__quantizer": "bsq", "model__codebook_size": 2**32, "model__code_dim": 32}
    for changes, there, absent in (
        (huge, "codebook/group_usage", "codebook/usage"),
        ({"model__quantizer": "bsq", "model__codebook_size": 2**18, "model__code_dim": 18}, "codebook/usage", None),
    ):
        task = build(**changes)
        task.step([images()], 0)
        scalars = task.scalars(0)
        assert there in scalars and absent not in scalars
        names = {name.removeprefix("codebook/") for name in scalars}
        assert {name.removeprefix("group_") for name in names} == {
            "usage",
            "usage_since_start",
            "dead_codes",
            "perplexity",
        }
    # Of 128 tokens few of 2^18 codes are chosen; counted one bit at a time, both values of each bit occur.
    assert scalars["codebook/usage"] <= 128 / 2**18


def test_validation_images_of_a_folder_have_the_classes_of_training(build, tmp_path):
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        Image.fromarray(images()[0].movedim(0, -1).numpy()).save(tmp_path / name / "x.png")
    for source, labels in (("imagenet", [0, 1]), ("mine", [None, None])):  # imagenet has a folder for each class
        sources = [{"name": source, "root": str(tmp_path)}]
        task = build(data__val=str(tmp_path), data__image_size=16, data__sources=sources)
        assert [image.label for image in task.validation_images()] == labels


@pytest.mark.parametrize("warmup_steps", [0, 20])
def test_codes_of_vqbridge_which_start_at_zero_raise_no_alarm(build, warmup_steps):
    changes = {"model__quantizer": "vqbridge", "model__bridge_group": 4, "model__codebook_size": 64}
    changes |= {"model__bridge_width": 16, "model__bridge_heads": 2, "loss__entropy__weight": 0.0}
    changes |= {"loss__quantizer__form": "paper", "optimizer__epsilon": 1e-8, "data__image_size": 128}
    task, usage = build(**changes, schedule__warmup_steps=warmup_steps), []
    assert not task.tokenizer.quantize.codes().any() and task.health.start_steps == 40 + warmup_steps
    for step in range(12 + warmup_steps):
        task.step([images(step)], step)
        usage.append(task.scalars(step)["codebook/usage"])
        assert task.alarm is None
    assert usage[0] < task.health.COLLAPSED_USAGE < usage[-1]  # the alarm of codes that start apart


def test_restarts_of_all_codes_in_each_step_are_refused(build):
    # 8 images of 4 x 4 tokens: 2 tokens a code.
    changes = {"model__quantizer": "vq_ema", "model__codebook_size": 64, "data__image_size": 16}
    build(**changes, model__restart_below=2.0).check_settings()
    said = refusal(TrainerError, build(**changes, model__restart_below=2.5).check_settings)
    assert "model.restart_below=2.5 is above the 2 tokens" in said
    assert "128 tokens for 64 codes" in said and "give 0.5 or less" in said
    build(**changes, model__restart_below=2.5, init_from__freeze="encoder").check_settings()  # codes that never restart


@pytest.mark.parametrize(
    ("changes", "titles"),
    [
        ({"model__quantizer": "vq_ema"}, ["codebook, moving averages", "statistics of the codes"]),
        (
            {"model__quantizer": "vq_ema", "init_from__freeze": "encoder"},
            ["encoder, frozen", "statistics of the codes"],
        ),
        ({"model__quantizer": "simvq"}, ["codebook, frozen"]),
        ({"model__quantizer": "vq"}, []),
    ],
)
def test_the_dry_run_tells_how_a_codebook_is_held(build, changes, titles):
    assert list(build(**changes).frozen_bytes()) == titles


def test_same_seed_same_start_and_another_seed_another(build):
    first, same, other = build(seed=1), build(seed=1), build(seed=2)
    for module in (attrgetter("tokenizer"), attrgetter("adversary.engine.module")):
        assert equal(weights(module(first)), weights(module(same)))
        assert not equal(weights(module(first)), weights(module(other)))


def test_ema_follows_the_weights_after_each_update(build):
    task = build()
    start = weights(task.tokenizer)
    task.step([images()], 0)
    expected = {name: 2 / 11 * start[name] + 9 / 11 * value for name, value in weights(task.tokenizer).items()}
    torch.testing.assert_close(averages(task), expected, rtol=1e-5, atol=1e-7)
    assert build(ema__decay=0.0).state.ema is None


def test_evaluation_shows_ema_weights_in_eval_mode_and_gives_the_raw_ones_back(build):
    task = build()
    task.step([images()], 0)
    raw, average = weights(task.tokenizer), averages(task)
    assert not equal(raw, average)
    with task.evaluation():
        assert equal(weights(task.tokenizer), average)
        assert not any(module.training for module in task.tokenizer.modules())
    assert equal(weights(task.tokenizer), raw)
    assert equal(averages(task), average)
    assert all(module.training for module in task.tokenizer.modules())


@pytest.mark.parametrize("decay", [0.9, 0.0])
def test_evaluation_gives_the_raw_weights_back_when_something_inside_fails(build, decay):
    task = build(ema__decay=decay)
    task.step([images()], 0)
    raw = weights(task.tokenizer)
    with pytest.raises(RuntimeError, match="inside"), task.evaluation():
        assert equal(weights(task.tokenizer), raw) == (decay == 0.0)
        raise RuntimeError("inside")
    assert equal(weights(task.tokenizer), raw)
    assert all(module.training for module in task.tokenizer.modules())


def test_reconstructions_are_those_of_the_weights_in_force_within_the_range_of_images(build):
    task = build()
    task.step([images()], 0)
    originals_bchw = as_float(images(1))
    seen = []
    for inside in (task.evaluation(), nullcontext()):
        with inside:
            index_bhw, reconstruction_bchw = task.reconstruct(originals_bchw)
            assert torch.equal(index_bhw, task.tokenizer.tokenize(originals_bchw))
            expected = task.tokenizer.detokenize(index_bhw).clamp(-1, 1)
            torch.testing.assert_close(reconstruction_bchw, expected, rtol=1e-5, atol=1e-6)
            assert not reconstruction_bchw.requires_grad
            seen.append(reconstruction_bchw)
    assert not torch.allclose(*seen)
    assert not task.forwards_together  # of a world of one, each reconstructs by itself
    with torch.no_grad():
        task.tokenizer.decoder.conv_out.bias.fill_(3.0)
    assert task.reconstruct(originals_bchw)[1].max() == 1


def test_validation_does_not_take_infinity_for_white(build, tmp_path):
    Image.fromarray(images(1)[0].permute(1, 2, 0).numpy()).save(tmp_path / "0.png")
    task = build(data__val=str(tmp_path), data__image_size=16, ema__decay=0.0)
    with torch.no_grad():
        task.tokenizer.decoder.conv_out.bias.fill_(torch.inf)
    scalars = task.validate(lambda: None).scalars
    assert math.isnan(scalars["val/psnr"]) and math.isnan(scalars["val/l1"])


def task_of_rank(**changes) -> TokenizerTask:
    """On each of several ranks."""
    return tokenizer_task(World(dist.get_rank(), dist.get_world_size(), torch.device("cpu")), **changes)


def validated(folder: str) -> dict[str, float]:
    """An untrained model's validation on three images, under an engine whose ranks forward equally often."""
    changes = {"data__val": folder, "data__image_size": 16, "trainer__validation_images": 3, "engine__kind": "fsdp2"}
    return task_of_rank(**changes).validate(lambda: None).scalars


def test_validation_counts_each_image_once_over_all_ranks(ranks, tmp_path):
    for number, image_chw in enumerate(images(count=4)):
        Image.fromarray(image_chw.permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
    (one,), two = (ranks.call(processes, validated, str(tmp_path)) for processes in (1, 2))
    assert one.keys() == {"val/psnr", "val/l1", "val/usage"} and one["val/usage"] > 4 / 24
    for of_rank in two:
        assert of_rank == pytest.approx(one, rel=1e-5)


def optimizer_tensors(engine):
    state = engine.optimizer.state_dict()["state"]
    return {(number, name): value.clone() for number, part in state.items() for name, value in part.items()}


def everything(task):
    """All that a step may change of what a checkpoint holds, by name."""
    parts = {
        "tokenizer": weights(task.tokenizer),
        "discriminator": weights(task.adversary.engine.module),
        "lecam": weights(task.adversary.lecam),
        "ema": averages(task),
        "health": weights(task.health),
    }
    for name, network in task.state.trained.items():
        parts[f"moments of the {name}"] = optimizer_tensors(network.engine)
    return parts


def unlike(first, second):
    """The names of the parts in which two states differ."""
    assert first.keys() == second.keys()
    assert all(first.values())
    return {name for name, part in first.items() if not equal(part, second[name])}


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_saved_and_loaded_it_goes_on_bit_for_bit(build, tmp_path, norm):
    changes = {"discriminator__norm": norm, "loss__lecam__decay": 0.5}
    task = build(**changes)
    for step in range(2):
        task.step([images(step)], step)
    resumed = build(seed=9, **changes)
    assert len(unlike(everything(task), everything(resumed))) == 8
    load(resumed, *save(task, tmp_path))
    assert not unlike(everything(task), everything(resumed))
    assert task.adversary.lecam.mean_real != 0 and task.adversary.lecam.mean_fake != 0
    for step in (2, 3):
        one, other = (numbers(it.step([images(step)], step).scalars) for it in (task, resumed))
        assert one == other
    assert not unlike(everything(task), everything(resumed))


def test_an_ema_that_is_switched_on_starts_from_the_weights_of_the_checkpoint(build, tmp_path):
    task = build(ema__decay=0.0)
    task.step([images()], 0)
    resumed = build(seed=9)
    load(resumed, *save(task, tmp_path))
    assert equal(weights(resumed.tokenizer), weights(task.tokenizer))
    assert equal(averages(resumed), weights(task.tokenizer))


def test_a_checkpoint_holds_each_tensor_once_by_the_names_of_the_state_dicts(build, tmp_path):
    task = build(discriminator__norm="batch")
    folder, _ = save(task, tmp_path)
    files = ShardedTensors(folder)
    adversary = task.adversary
    modules = {"tokenizer": task.tokenizer, "discriminator": adversary.engine.module, "lecam": adversary.lecam}
    modules["codebook_health"] = task.health
    parts = {model: weights(module) for model, module in modules.items()} | {"tokenizer_ema": averages(task)}
    expected = {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}
    trained = [(f"tokenizer{{}}/{name}", p) for name, p in task.tokenizer.named_parameters()]
    trained += [(f"discriminator{{}}/{name}", p) for name, p in task.adversary.engine.module.named_parameters()]
    for key in (".exp_avg", ".exp_avg_sq"):
        expected |= {name.format(key): torch.zeros_like(p) for name, p in trained}
    assert sorted(files.names()) == sorted(expected)
    assert all(torch.equal(files.tensor(name), value) for name, value in expected.items())


@pytest.mark.parametrize("change", [{"codebook_size": 32}, {"num_res_blocks": 2}, {"channels": 32}])
def test_a_checkpoint_of_another_model_is_refused_in_one_line(build, tmp_path, change):
    folder, state = save(build(), tmp_path)
    other = build(**{f"model__{key}": value for key, value in change.items()})
    assert "tokenizer/" in refusal(ModelError, load, other, folder, state)


def test_adams_settings_are_the_recipes_also_after_loading(build, tmp_path):
    task = build()
    task.step([images()], 0)
    resumed = build(optimizer__betas=[0.8, 0.9], optimizer__epsilon=1e-5, optimizer__weight_decay=0.1)
    load(resumed, *save(task, tmp_path))
    for engine in (resumed.main_engine, resumed.codebook, resumed.adversary.engine):
        matrices, *others = engine.param_groups
        assert matrices["weight_decay"] == 0.1
        assert all(group["weight_decay"] == 0 for group in others)
        assert all((group["betas"], group["eps"]) == ((0.8, 0.9), 1e-5) for group in engine.param_groups)
        assert engine.updates == 1


def poison(monkeypatch, kind, value=float("nan"), losses=GENERATOR_LOSSES):
    """The adversarial loss of that kind gives the value wherever it is asked, and a gradient of that kind."""
    monkeypatch.setitem(losses, kind, lambda *logits_bchw: sum(logits.mean() for logits in logits_bchw) * value)


GENERATORS = {"tokenizer", "ema", "moments of the tokenizer", "moments of the codebook"}
DISCRIMINATORS = {"discriminator", "lecam", "moments of the discriminator"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_generator_loss_that_is_not_finite_leaves_its_networks_as_they_were(build, monkeypatch, value):
    task = build()
    task.step([images(0)], 0)
    before = everything(task)
    with monkeypatch.context() as patch:
        poison(patch, "non_saturating", value)
        result = task.step([images(1)], 1)
    assert result.skipped == ["tokenizer"]
    assert not math.isfinite(float(result.scalars["loss/total"]))
    # The codes were counted, and the discriminator, whose loss was well, learned.
    assert unlike(before, everything(task)) == DISCRIMINATORS | {"health"}
    assert (task.main_engine.updates, task.codebook.updates, task.adversary.engine.updates) == (1, 1, 2)
    assert all(gradient is None for gradient in gradients(task.tokenizer).values())
    assert task.step([images(2)], 2).skipped == []
    assert unlike(before, everything(task)) == GENERATORS | DISCRIMINATORS | {"health"}
    assert all(value.isfinite().all() for part in everything(task).values() for value in part.values())


def test_a_discriminator_loss_that_is_not_finite_leaves_it_and_lecam_as_they_were(build, monkeypatch):
    task = build()
    task.step([images(0)], 0)
    before = everything(task)
    with monkeypatch.context() as patch:
        poison(patch, "hinge", losses=DISCRIMINATOR_LOSSES)
        result = task.step([images(1)], 1)
    assert result.skipped == ["discriminator"]
    assert unlike(before, everything(task)) == GENERATORS | {"health"}
    assert (task.main_engine.updates, task.adversary.engine.updates) == (2, 1)
    assert task.step([images(2)], 2).skipped == []


@pytest.mark.parametrize(
    ("loss", "finite", "not_finite"),
    [
        # The square root of 0 has the gradient infinity, times 0: NaN.
        (lambda x: (0 * x).square().sum().sqrt(), "loss/total", "grad_norm/tokenizer"),
        (lambda x: x.mean() + math.inf, "grad_norm/tokenizer", "loss/total"),
    ],
)
def test_a_loss_or_a_gradient_that_is_not_finite_counts_though_the_other_is(
    build, monkeypatch, loss, finite, not_finite
):
    task = build()
    before = everything(task)
    monkeypatch.setitem(GENERATOR_LOSSES, task.config.loss.generator.kind, loss)
    result = task.step([images()], 0)
    assert math.isfinite(result.scalars[finite]) and not math.isfinite(result.scalars[not_finite])
    assert result.skipped == ["tokenizer"]
    assert not unlike(before, everything(task)) & GENERATORS


def test_features_that_are_not_finite_leave_both_networks_as_they_were(build):
    task = build()
    task.step([images(0)], 0)
    before = everything(task)
    hook = task.tokenizer.quant_conv.register_forward_hook(lambda _, __, z_bdhw: z_bdhw * float("nan"))
    assert task.step([images(1)], 1).skipped == ["discriminator", "tokenizer"]
    hook.remove()
    assert unlike(before, everything(task)) == {"health"}
    assert task.step([images(2)], 2).skipped == []


@pytest.mark.parametrize(("micro_batch_size", "norm"), [(8, "group"), (2, "group"), (2, "batch")])
def test_one_bad_micro_batch_skips_the_whole_step(build, micro_batch_size, norm):
    task = build(trainer__micro_batch_size=micro_batch_size, discriminator__norm=norm)
    micro_batches = list(images().split(micro_batch_size))
    last = []

    def of_the_last(_, __, z_bdhw):
        last.append(None)
        return z_bdhw * float("nan") if len(last) % len(micro_batches) == 0 else z_bdhw

    before = everything(task)
    hook = task.tokenizer.quant_conv.register_forward_hook(of_the_last)
    assert task.step(micro_batches, 0).skipped == ["discriminator", "tokenizer"]
    hook.remove()
    assert unlike(before, everything(task)) <= {"health"}
    assert all(gradient is None for gradient in gradients(task.tokenizer).values())


def step_with_a_bad_loss_on_rank_1(gradient: bool) -> tuple[list[str], int]:
    """What is skipped, and the number of updates. gradient: whether the gradient is NaN, too."""
    task = task_of_rank()
    if dist.get_rank() == 1:
        bad = (lambda logits: logits.mean() * math.nan) if gradient else (lambda logits: logits.mean() + math.nan)
        GENERATOR_LOSSES[task.config.loss.generator.kind] = bad
    return task.step([images(dist.get_rank(), 4)], 0).skipped, task.main_engine.updates


@pytest.mark.parametrize("gradient", [True, False])
def test_a_bad_loss_of_one_rank_skips_the_step_on_all_ranks(ranks, gradient):
    assert ranks.call(2, step_with_a_bad_loss_on_rank_1, gradient) == 2 * [(["tokenizer"], 0)]


def test_an_overflow_of_fp16_is_the_scales_doing_until_it_is_one(build, monkeypatch):
    task = build(trainer__precision="fp16")
    scale = task.state.loss_scales["tokenizer"]
    scale.value = 4.0
    before = everything(task)
    kind = task.config.loss.generator.kind
    with monkeypatch.context() as patch:
        poison(patch, kind, float("inf"))
        seen = []
        for step in range(3):
            result = task.step([images()], step)
            seen.append((result.scalars["loss_scale/tokenizer"], result.skipped))
    assert seen == [(4.0, []), (2.0, []), (1.0, ["tokenizer"])]
    assert not unlike(before, everything(task)) & GENERATORS  # nothing was learned of any of them
    assert task.main_engine.updates == 0
    assert scale.value == 1.0 and task.state.loss_scales["discriminator"].value == 2.0**16


def test_the_loss_scale_changes_neither_gradients_nor_what_is_logged(build):
    steps = []
    for value in (1.0, 1024.0):
        task = build(trainer__precision="fp16", trainer__gradient_clip_norm=0.01)
        for scale in task.state.loss_scales.values():
            scale.value = value
        result = task.step([images()], 0)
        assert result.skipped == [] and result.scalars.pop("loss_scale/tokenizer") == value
        assert result.scalars.pop("loss_scale/discriminator") == value
        steps.append((result.scalars, weights(task.tokenizer), weights(task.adversary.engine.module)))
    (plain, *plain_weights), (scaled, *scaled_weights) = steps
    assert numbers(scaled) == pytest.approx(numbers(plain), rel=1e-2, abs=1e-4)
    torch.testing.assert_close(scaled_weights, plain_weights, rtol=0, atol=2e-4)


def test_the_loss_scale_is_gone_on_with(build, tmp_path):
    task = build(trainer__precision="fp16")
    task.state.loss_scales["tokenizer"].value = 32.0
    resumed = build(trainer__precision="fp16")
    load(resumed, *save(task, tmp_path))
    scales = {name: scale.value for name, scale in resumed.state.loss_scales.items()}
    assert scales == {"tokenizer": 32.0, "discriminator": 2.0**16}


def test_all_terms_have_weights_of_their_own(build):
    """Each weight of the recipe scales its own term of the total, and nothing else."""
    used = {
        "loss/reconstruction": 2.0,
        "loss/double_quantization": 0.5 * 3.0,
        "loss/commitment": 0.5 * 0.2,
        "loss/codebook": 0.5,
        "loss/sample_entropy": 0.3 * 0.7,
        "loss/average_entropy": -0.3 * 1.3,
        "loss/generator": 0.4,
    }
    task = build(
        loss__reconstruction__weight=2.0,
        loss__generator=GeneratorLoss(weight=0.4, kind="linear"),
        loss__lecam__weight=0.0,
        loss__quantizer=QuantizerLoss(weight=0.5, form="paper", beta=0.2, double_quantization_weight=3.0),
        loss__entropy=EntropyLoss(weight=0.3, temperature=0.5, sample_weight=0.7, average_weight=1.3),
    )
    scalars = task.step([images()], 0).scalars
    assert "loss/lecam" not in scalars
    assert_total(scalars, used)
