"""The perceptual terms of tokenizer training: LPIPS, the distance of ConvNeXt's logits, or both."""

import torch
from torch import Tensor

from model_zoo import ModelError
from model_zoo.config import PerceptualLoss
from model_zoo.eval_nets.convnext import ConvNextDistance
from model_zoo.eval_nets.lpips import SMALLEST_SIDE, Perceptual
from trainer.parallel import World
from trainer.tasks.base import StepMetrics


class PerceptualTerms:
    """The frozen networks of ``loss.perceptual``; ``lpips`` and ``convnext`` are None where they are not used.

    autocast: returns the recipe's autocast context. Raises ModelError for a weights file that is missing or another.
    """

    def __init__(self, config: PerceptualLoss, world: World, autocast):
        self.config, self.autocast = config, autocast
        self.lpips = self.convnext = None
        kinds = config.kind.split("+") if config.weight > 0 else []
        if "lpips" in kinds:
            try:
                self.lpips = Perceptual(config.vgg16_weights).to(world.device)
            except ModelError as error:
                raise ModelError(f"{error}; loss.perceptual.weight=0 trains without LPIPS") from error
        if "convnext" in kinds:
            try:
                self.convnext = ConvNextDistance(config.convnext_weights).to(world.device)
            except ModelError as error:
                raise ModelError(f"{error}; loss.perceptual.kind=lpips trains without ConvNeXt") from error

    @property
    def smallest_side(self) -> int:
        """Of a picture, in pixels."""
        return SMALLEST_SIDE["vgg"] if self.lpips else 0

    def weighted(self, reconstruction_bchw: Tensor, images_bchw: Tensor, metrics: StepMetrics) -> dict[str, Tensor]:
        """The weighted terms of a micro-batch, by name; logs them without their weights."""
        terms = {}
        if self.lpips:
            with self.autocast():
                distance = self.lpips(reconstruction_bchw, images_bchw).float().mean()
            metrics.add("loss/perceptual", distance)
            terms["perceptual"] = self.config.weight * distance
        if self.convnext:
            with torch.autocast(images_bchw.device.type, enabled=False):
                distance = self.convnext(reconstruction_bchw, images_bchw).mean()
            metrics.add("loss/convnext", distance)
            terms["convnext"] = self.config.weight * self.config.convnext_factor * distance
        return terms

    def frozen_bytes(self) -> dict[str, int]:
        """Bytes of the networks, by a name to print."""
        networks = {"LPIPS, frozen": self.lpips, "ConvNeXt-S, frozen": self.convnext}
        return {
            name: sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
            for name, network in networks.items()
            if network
        }
