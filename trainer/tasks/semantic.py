"""The semantic term of tokenizer training: codes are drawn towards the patch features of a frozen encoder."""

from torch import Tensor

from model_zoo.config import SemanticLoss
from model_zoo.eval_nets.patch_encoder import PatchEncoder
from model_zoo.losses import SemanticHead, cosine_distance
from trainer.engines.ddp import DataParallel
from trainer.parallel import World
from trainer.tasks.base import StepMetrics


class SemanticTerm:
    """The frozen encoder, and the trained head with its engine. ``engine`` is None where ``loss.semantic.weight`` is 0.

    The head is small, so every engine keeps it whole on each rank, as it does the discriminator. It is updated with the
    tokenizer, and belongs to no tokenizer: exports and evaluations have none.
    """

    def __init__(self, config: SemanticLoss, world: World, code_dim: int, make_optimizer, autocast, **batch):
        self.config, self.autocast = config, autocast
        self.engine = None
        if config.weight > 0:
            self.encoder = PatchEncoder(config.encoder, config.weights, config.sha256, config.size).to(world.device)
            head = SemanticHead(code_dim, self.encoder.dim, config.width, config.depth).to(world.device)
            self.engine = DataParallel(head, make_optimizer(), **batch)

    def loss(self, images_bchw: Tensor, codes_bdhw: Tensor, metrics: StepMetrics) -> Tensor:
        """The weighted term of a micro-batch's images in [-1, 1] and code vectors; logs it without its weight."""
        with self.autocast():
            features_bdhw, projected_bdhw = self.encoder(images_bchw), self.engine(codes_bdhw)
        distance = cosine_distance(projected_bdhw.float(), features_bdhw.float())
        metrics.add("loss/semantic", distance)
        return self.config.weight * distance

    def describe(self) -> list[str]:
        """The encoder and its file, for the line that a run starts with."""
        if self.engine is None:
            return []
        return [f"codes aligned with {self.config.encoder} (loss.semantic.sha256={self.config.sha256})"]

    def frozen_bytes(self) -> dict[str, int]:
        """Bytes of the encoder, by its name and its number of parameters."""
        if self.engine is None:
            return {}
        return {self.encoder.title: self.encoder.nbytes}
