"""Losses of tokenizer training, each a plain function of tensors; the task weighs and logs them by name.

Facts: arXiv 2412.02692 (eq. 12 and the entropy penalty), VQGAN (arXiv 2012.09841), LeCAM (arXiv 2104.03310).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_zoo.config import EntropyLoss, QuantizerLoss
from model_zoo.ops import average_entropy, sum_over_shards
from model_zoo.ops.index_backprop import AVERAGE_ENTROPY_EPSILON
from model_zoo.quantizers import Quantized


def hinge_discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Half the sum of the real and fake hinges, a mean over all logits."""
    return 0.5 * (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean())


def vanilla_discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Half the sum of the two cross-entropies (Goodfellow et al. 2014), a mean over all logits."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


def non_saturating_generator_loss(logits_fake_b1hw: Tensor) -> Tensor:
    """Mean of -log sigmoid of each image's *mean* logit: the patches are averaged first, as in the published runs."""
    return F.softplus(-logits_fake_b1hw.flatten(1).mean(dim=1)).mean()


def linear_generator_loss(logits_fake_b1hw: Tensor) -> Tensor:
    """Minus the mean logit, VQGAN's partner of the hinge."""
    return -logits_fake_b1hw.mean()


DISCRIMINATOR_LOSSES = {"hinge": hinge_discriminator_loss, "vanilla": vanilla_discriminator_loss}
GENERATOR_LOSSES = {"non_saturating": non_saturating_generator_loss, "linear": linear_generator_loss}


class Lecam(nn.Module):
    """LeCAM: pulls the logits towards running means of the opposite side.

    The means are buffers, so they are saved and resumed. They start at 0, as in the published training.
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
        """Takes the mean logits of one *global* batch; call it once a step, after the step's backward passes."""
        self.mean_real.lerp_(mean_real.to(self.mean_real.dtype), 1 - self.decay)
        self.mean_fake.lerp_(mean_fake.to(self.mean_fake.dtype), 1 - self.decay)


def quantizer_loss(quantized: Quantized, config: QuantizerLoss) -> Tensor:
    """The VQ terms, weighed, in one of the two published forms.

    ``paper``: codebook + beta x commitment (arXiv 2412.02692 eq. 12; van den Oord et al. eq. 3).
    ``reference``: commitment + beta x codebook, what the released IBQ code computes and its checkpoints learned from
    (VQGAN's code has the same slip). Where the quantizer has a double quantization term, it is added; where it learns
    no codebook, that term is left out.
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
    """loss is the weighed penalty; average_entropy is the entropy of the whole global batch, for the log."""

    loss: Tensor
    average_entropy: Tensor


def entropy_penalty(quantized: Quantized, global_average_k: Tensor, config: EntropyLoss) -> EntropyPenalty:
    """Sample entropy minus the entropy of the *global* batch's mean assignment (before ``config.weight``).

    global_average_k: the mean of ``average_probability_k`` over all micro-batches and ranks, no gradient; of this
        rank's codes alone where the codebook is sharded.
    The value is that of the global batch, and so is the gradient: H is linearised at the global mean, where
    dH/da_k = -(log(a_k + eps) + a_k / (a_k + eps)), and each micro-batch pulls by its own share. So neither the number
    of ranks nor of micro-batches changes what is learned.
    """
    a_k = global_average_k.detach()
    slope_k = -(torch.log(a_k + AVERAGE_ENTROPY_EPSILON) + a_k / (a_k + AVERAGE_ENTROPY_EPSILON))
    pull = sum_over_shards((slope_k * quantized.average_probability_k).sum(), quantized.shard)
    average = average_entropy(a_k, quantized.shard) + (pull - pull.detach())
    return EntropyPenalty(
        config.sample_weight * quantized.sample_entropy - config.average_weight * average, average.detach()
    )
