"""IBQ: index backpropagation quantization (arXiv 2412.02692)."""

from torch import Tensor

from model_zoo.config import TokenizerConfig
from model_zoo.ops.chunked import nearest_code
from model_zoo.ops.codebook_parallel import CodebookShard
from model_zoo.ops.index_backprop import index_backprop
from model_zoo.ops.types import IndexBackprop
from model_zoo.quantizers.base import CodebookQuantizer


class IndexBackpropQuantizer(CodebookQuantizer):
    """Selects the code with the largest dot product; the gradient reaches every code through the softmax (eq. 5-8)."""

    soft_assignment = True
    has_entropy = True
    shards = True
    normalizes = True
    impl = "auto"

    def __init__(self, config: TokenizerConfig, shard: CodebookShard | None = None):
        super().__init__(config, shard)
        self.logit_scale = config.logit_scale

    def assign(self, z_nd: Tensor, entropy_temperature: float | None) -> IndexBackprop:
        if self.normalize:
            z_nd = self.logit_scale * z_nd
        return index_backprop(
            z_nd, self.codes(), impl=self.impl, entropy_temperature=entropy_temperature, shard=self.shard
        )

    def nearest(self, z_nd: Tensor) -> Tensor:
        return nearest_code(z_nd, self.codes(), shard=self.shard)
