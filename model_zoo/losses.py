"""Losses of tokenizer training, each a plain function of tensors; the training task weights and logs them.

Sources: arXiv 2412.02692 (eq. 12 and the entropy penalty), VQGAN (arXiv 2012.09841), LeCAM (arXiv 2104.03310),
REPA (arXiv 2410.06940) and GigaTok (arXiv 2504.08736).
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_zoo.config import EntropyLoss, QuantizerLoss
from model_zoo.ops.codebook_parallel import sum_over_shards
from model_zoo.ops.types import AVERAGE_ENTROPY_EPSILON, average_entropy
from model_zoo.quantizers.base import Quantized


def hinge_discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Half the sum of the real and fake hinge losses, each a mean over all logits."""
    return 0.5 * (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean())


def vanilla_discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Half the sum of the real and fake cross-entropies (Goodfellow et al. 2014), each a mean over all logits."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


def non_saturating_generator_loss(logits_fake_b1hw: Tensor) -> Tensor:
    """Mean of -log sigmoid of each image's *mean* logit: patches are averaged first, as in the published training."""
    return F.softplus(-logits_fake_b1hw.flatten(1).mean(dim=1)).mean()


def linear_generator_loss(logits_fake_b1hw: Tensor) -> Tensor:
    """Minus the mean logit, which VQGAN uses together with the hinge loss."""
    return -logits_fake_b1hw.mean()


DISCRIMINATOR_LOSSES = {"hinge": hinge_discriminator_loss, "vanilla": vanilla_discriminator_loss}
GENERATOR_LOSSES = {"non_saturating": non_saturating_generator_loss, "linear": linear_generator_loss}


class Lecam(nn.Module):
    """LeCAM regularization: penalises logits that lie beyond the running mean of the opposite class.

    The running means are buffers, so checkpoints contain them. They start at 0, as in the published training.
    """

    def __init__(self, decay: float):
        super().__init__()
        self.decay = decay
        self.register_buffer("mean_real", torch.zeros(()))
        self.register_buffer("mean_fake", torch.zeros(()))

    def forward(self, logits_real: Tensor, logits_fake: Tensor) -> Tensor:
        """mean(relu(D(real) - mean_fake)^2) + mean(relu(mean_real - D(fake))^2)."""
        return (
            F.relu(logits_real - self.mean_fake).square().mean() + F.relu(self.mean_real - logits_fake).square().mean()
        )

    @torch.no_grad()
    def update(self, mean_real: Tensor, mean_fake: Tensor) -> None:
        """Updates the running means with the mean logits of one *global* batch. Call once per step, after its backward
        passes."""
        self.mean_real.lerp_(mean_real.to(self.mean_real.dtype), 1 - self.decay)
        self.mean_fake.lerp_(mean_fake.to(self.mean_fake.dtype), 1 - self.decay)


def quantizer_loss(quantized: Quantized, config: QuantizerLoss) -> Tensor:
    """The weighted VQ terms, in one of the two published forms.

    ``paper``: codebook + beta x commitment (arXiv 2412.02692 eq. 12; van den Oord et al. eq. 3).
    ``reference``: commitment + beta x codebook, which the released IBQ code computes and its checkpoints were trained
    with (VQGAN's code swaps the terms in the same way). The double quantization term is added if the quantizer has one;
    the codebook term is omitted if the quantizer learns no codebook.
    """
    codebook = 0.0 if quantized.codebook is None else quantized.codebook
    if config.form == "paper":
        loss = codebook + config.beta * quantized.commitment
    else:
        loss = quantized.commitment + config.beta * codebook
    if quantized.double_quantization is not None:
        loss = loss + config.double_quantization_weight * quantized.double_quantization
    return loss


class EntropyPenalty(NamedTuple):
    """loss: the weighted penalty. average_entropy: that of the whole global batch, for logging."""

    loss: Tensor
    average_entropy: Tensor


def entropy_penalty(quantized: Quantized, global_average_k: Tensor, config: EntropyLoss) -> EntropyPenalty:
    """Sample entropy minus the entropy of the *global* batch's mean assignment (before ``config.weight``).

    global_average_k: the mean of ``average_probability_k`` over all micro-batches and ranks, without gradient; only
        this rank's codes if the codebook is sharded.
    Value and gradient are those of the global batch: H is linearised at the global mean, where
    dH/da_k = -(log(a_k + eps) + a_k / (a_k + eps)), and each micro-batch contributes its part of the linear term.
    Training therefore does not depend on the number of ranks or micro-batches.
    """
    a_k = global_average_k.detach()
    slope_k = -(torch.log(a_k + AVERAGE_ENTROPY_EPSILON) + a_k / (a_k + AVERAGE_ENTROPY_EPSILON))
    pull = sum_over_shards((slope_k * quantized.average_probability_k).sum(), quantized.shard)
    average = average_entropy(a_k, quantized.shard) + (pull - pull.detach())
    loss = config.sample_weight * quantized.sample_entropy - config.average_weight * average
    return EntropyPenalty(loss, average.detach())


class SemanticHead(nn.Module):
    """Maps each code vector to the width of an encoder's features.

    It has ``depth`` linear layers with SiLU in between, as REPA's projector (3 layers of 2,048). With ``depth=1`` it is
    linear, as that of VA-VAE. Each position is mapped alone, so that the head cannot gather the meaning of a picture
    from other positions.
    """

    def __init__(self, code_dim: int, dim: int, width: int, depth: int):
        super().__init__()
        widths = [code_dim, *[width] * (depth - 1), dim]
        layers = [nn.Linear(before, after) for before, after in pairwise(widths)]
        self.layers = nn.Sequential(*[part for layer in layers for part in (layer, nn.SiLU())][:-1])

    def forward(self, codes_bdhw: Tensor) -> Tensor:
        """Code vectors ``(b, code_dim, h, w)`` -> ``(b, dim, h, w)``."""
        return self.layers(codes_bdhw.movedim(1, -1)).movedim(-1, 1)


def cosine_distance(projected_bdhw: Tensor, features_bdhw: Tensor) -> Tensor:
    """The semantic term: the mean over tokens of ``1 - cos(h(z_q), f)``, with the head h and the frozen features f.

    This is the form of REPA and of GigaTok's semantic regularization, plus the constant 1. It has one fixed weight, and
    neither the margins nor the distance matrices nor the adaptive weight of VA-VAE (arXiv 2501.01423). GigaTok applies
    it to a layer of its decoder. Here it is applied to the code vectors, because a generator learns these; VA-VAE
    aligns its latents too.

    The encoder's features are interpolated to the grid of the tokens, not the reverse: every token then has one target
    and equal weight, and no gradient passes through an interpolation.
    """
    size = projected_bdhw.shape[2:]
    if features_bdhw.shape[2:] != size:
        features_bdhw = F.interpolate(features_bdhw, size, mode="bilinear", antialias=True)
    return (1 - F.cosine_similarity(projected_bdhw, features_bdhw, dim=1)).mean()
