"""SimVQ: a frozen random table times one trained linear layer (arXiv 2411.02038), a baseline."""

from model_zoo.config import TokenizerConfig
from model_zoo.ops.codebook_parallel import CodebookShard
from model_zoo.quantizers.projected import LinearCodebook


class SimVQQuantizer(LinearCodebook):
    """Codes are q_j W (Algorithm 1): k = argmin_j |z - q_j W|^2, z_q = z + sg(q_k W - z), and the losses are
    beta |z - sg(q_k W)|^2 + |sg(z) - q_k W|^2, which is ``loss.quantizer.form=paper``. Each step moves W and so all
    codes, chosen or not.

    The paper initializes the table "with Gaussian distribution" and leaves open how wide; Algorithm 1 has a matrix W
    without a bias. As in the released code, the standard deviation is code_dim^-0.5, and W is PyTorch's linear layer of
    code_dim x code_dim with its bias and its initialization. ``model.codebook_init`` has no effect.
    """

    def __init__(self, config: TokenizerConfig, shard: CodebookShard | None = None):
        super().__init__(config, shard, row_dim=config.code_dim, row_std=config.code_dim**-0.5)
