"""IBQ: index backpropagation quantization (arXiv 2412.02692)."""

import math

import torch
from torch import Tensor, nn

from model_zoo.config import TokenizerConfig
from model_zoo.errors import ModelError
from model_zoo.ops.chunked import nearest_code
from model_zoo.ops.codebook_parallel import CodebookShard
from model_zoo.ops.index_backprop import index_backprop
from model_zoo.ops.types import IndexBackprop
from model_zoo.quantizers.base import CodebookQuantizer

MAX_LEARNED_SCALE = 100.0  # as CLIP's


class IndexBackpropQuantizer(CodebookQuantizer):
    """Selects the code with the largest dot product; the gradient reaches every code through the softmax (eq. 5-8).

    With ``model.learn_logit_scale`` the scale s of the logits s z C^T, with z and C of norm 1, is a parameter, as
    CLIP's is (arXiv 2103.00020, section 2.5): it is stored as its logarithm, so that it stays positive, and clamped to
    at most 100 after each step. In the forward pass, a clamp would stop the gradient of a scale beyond 100, which could
    then never return.
    """

    soft_assignment = True
    has_entropy = True
    shards = True
    normalizes = True
    # The scale is positive, so that the largest logit is the same for all scales.
    without_effect_on_codes = ("log_logit_scale",)
    impl = "auto"

    def __init__(self, config: TokenizerConfig, shard: CodebookShard | None = None):
        super().__init__(config, shard)
        self.fixed_logit_scale, self.log_logit_scale = config.logit_scale, None
        if config.learn_logit_scale:
            if not config.normalize:
                raise ModelError("model.learn_logit_scale=true needs model.normalize=true")
            if config.logit_scale > MAX_LEARNED_SCALE:
                raise ModelError(
                    f"model.logit_scale={config.logit_scale} with model.learn_logit_scale=true must be at most "
                    f"{MAX_LEARNED_SCALE:g}"
                )
            self.log_logit_scale = nn.Parameter(torch.tensor(math.log(config.logit_scale)))

    @property
    def logit_scale(self) -> Tensor | float:
        """The factor on the cosines; differentiable if it is learned."""
        return self.fixed_logit_scale if self.log_logit_scale is None else self.log_logit_scale.exp()

    def assign(self, z_nd: Tensor, entropy_temperature: float | None) -> IndexBackprop:
        if self.normalize:
            z_nd = self.logit_scale * z_nd  # here and not in `prepare`: the loss terms compare vectors of norm 1
        return index_backprop(
            z_nd, self.codes(), impl=self.impl, entropy_temperature=entropy_temperature, shard=self.shard
        )

    def nearest(self, z_nd: Tensor) -> Tensor:
        return nearest_code(z_nd, self.codes(), shard=self.shard)

    @torch.no_grad()
    def after_step(self) -> None:
        if self.log_logit_scale is not None:
            self.log_logit_scale.clamp_(max=math.log(MAX_LEARNED_SCALE))

    @torch.no_grad()
    def scalars(self) -> dict[str, float]:
        return {} if self.log_logit_scale is None else {"logit_scale": self.logit_scale.item()}
