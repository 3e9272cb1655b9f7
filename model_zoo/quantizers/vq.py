"""VQ: nearest neighbour with a straight-through gradient (van den Oord et al. 2017; VQGAN), a baseline."""

from torch import Tensor

from model_zoo.ops.chunked import nearest_code
from model_zoo.ops.types import IndexBackprop
from model_zoo.quantizers.base import CodebookQuantizer


class VectorQuantizer(CodebookQuantizer):
    """Selects the code at the smallest Euclidean distance; only chosen codes get a gradient. With ``model.normalize``
    that is the code with the largest cosine (ViT-VQGAN, arXiv 2110.04627; LlamaGen, arXiv 2406.06525)."""

    shards = True
    normalizes = True

    def settings(self) -> str:
        # IBQ's tensors have the same names and shapes, but IBQ takes the code with the largest dot product. IBQ's
        # settings stay without such a text, so that fingerprints in existing token shards remain valid.
        return "nearest\n" + super().settings()

    def assign(self, z_nd: Tensor, entropy_temperature: float | None) -> IndexBackprop:
        index_n = self.nearest(z_nd)
        code_nd = self.vectors(index_n)
        # Straight-through: the decoder sees the code; the encoder gets the decoder's gradient unchanged.
        return IndexBackprop(z_nd + (code_nd - z_nd).detach(), index_n, None, None, code_nd)

    def nearest(self, z_nd: Tensor) -> Tensor:
        return nearest_code(z_nd, self.codes(), distance="euclidean", shard=self.shard)
