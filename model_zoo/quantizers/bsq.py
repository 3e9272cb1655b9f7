"""BSQ: binary spherical quantization (arXiv 2406.07548), a baseline."""

from torch import Tensor
from torch.nn import functional as F

from model_zoo.config import TokenizerConfig
from model_zoo.ops.codebook_parallel import CodebookShard
from model_zoo.quantizers.lfq import LookupFreeQuantizer


class BinarySphericalQuantizer(LookupFreeQuantizer):
    """LFQ on the unit sphere: features are divided by their norm, u = z / |z|, and codes are sign(u) / sqrt(d), so that
    both have norm 1 and the quantization error is bounded. Codes are numbered as LFQ's.

    The gradient is that of sign(u) as the identity: the decoder's gradient, divided by sqrt(d), reaches u.

    The soft assignment of the paper's entropies, q(c | u) = softmax(tau u C^T), factorises into d independent signs,
    q(c_j | u_j) = sigmoid(2 tau c_j u_j). With tau = 2 / temperature this is LFQ's softmax(2 u C^T / temperature);
    temperature 1 is the public code's default. The entropy of a token is the sum over its signs, without approximation.
    That of the mean assignment is approximated by the sum over signs, which is ``model.groups`` = d, the default; fewer
    groups are closer to it, and groups of 9 bits are the public code's other choice.

    Left open or different: ``a log(a + 1e-5)`` as in our other quantizers, where the public code adds 1e-8; the
    commitment term, which the published settings leave out, compares u with sign(u) / sqrt(d); the public code ramps
    the weight of the entropies down from three times its value over 2,000 steps, which we do not.
    """

    def __init__(self, config: TokenizerConfig, shard: CodebookShard | None = None):
        super().__init__(config, shard)
        self.code_size = config.code_dim**-0.5

    @staticmethod
    def default_groups(bits: int) -> int:
        return bits

    def prepare(self, z_nd: Tensor) -> Tensor:
        return F.normalize(z_nd)
