"""VQBridge, of FVQ: a trained table that passes a transformer (arXiv 2509.10140), a baseline."""

import math

from torch import Tensor, nn
from torch.nn import functional as F

from model_zoo.config import TokenizerConfig
from model_zoo.errors import ModelError
from model_zoo.ops.codebook_parallel import CodebookShard
from model_zoo.quantizers import base
from model_zoo.quantizers.projected import ProjectedCodebook

MLP_RATIO = 2  # hidden size of a block's feed-forward layer, relative to its width
EPSILON = 1e-6  # of layer norms
# Updates for each place in a group after which more than a tenth of the codes should be in use. In small runs this took
# 1 to 3 updates per place.
UPDATES_PER_PLACE = 10


class VQBridgeQuantizer(ProjectedCodebook):
    """Codes are `Bridge` of a trained table, so that each chosen code has a gradient in all rows. The losses are
    beta |z - sg(c)|^2 + |sg(z) - c|^2, which is ``loss.quantizer.form=paper``. FVQ is VQBridge trained with a warm-up
    and a decreasing learning rate ("learning annealing"), which the recipe sets.

    What the paper leaves open follows the released code (its variant with ViT blocks, which it calls the paper's): the
    table starts with standard deviation 1 / (K sqrt(3)), that of its uniform(-1/K, 1/K), but normally distributed as
    our other tables are. ``model.codebook_init`` has no effect.

    Each forward in training computes all codes once. (The authors keep only the codes after training; here
    `ProjectedCodebook` keeps them at inference.) For 262,144 codes of 256 dimensions in groups of 64 this takes
    0.11 TFLOP. The table, its gradient, its two moments and its EMA take 268 MB each, and so do, from
    the forward to the backward pass, the codes, in the backward pass their gradient, and while the nearest codes are
    searched, the codes' squares.
    """

    def __init__(self, config: TokenizerConfig, shard: CodebookShard | None = None):
        codes, group = config.codebook_size, config.bridge_group
        if codes % group:
            fitting = max(size for size in range(1, min(group, codes) + 1) if codes % size == 0)
            raise ModelError(
                f"model.codebook_size={codes} must be a multiple of model.bridge_group={group}: give "
                f"model.bridge_group={fitting} or model.codebook_size={-(-codes // group) * group}"
            )
        if config.bridge_width % config.bridge_heads:
            fitting = -(-config.bridge_width // config.bridge_heads) * config.bridge_heads
            raise ModelError(
                f"model.bridge_width={config.bridge_width} must be a multiple of "
                f"model.bridge_heads={config.bridge_heads}: give model.bridge_width={fitting}"
            )
        std = 1 / (codes * math.sqrt(3))
        rows_kd = base.initial_codes(0, codes, codes, config.code_dim, std)
        super().__init__(config, shard, rows_kd, frozen=False)
        self.start_updates = UPDATES_PER_PLACE * group
        self.projector = Bridge(group, config.code_dim, config.bridge_width, config.bridge_depth, config.bridge_heads)


class Bridge(nn.Module):
    """Compress, process, recover: a linear layer maps each group of codes to one token; blocks of a vision transformer
    let the tokens attend to one another; a linear layer maps each token back to its group of codes.

    The released code lays the codes on a square grid and groups squares of it. Without positions, groups of consecutive
    rows are the same up to the numbering of the codes, for any number of codes. (Summaries of the paper describe
    consecutive groups, and a layer norm after the compression, which the released code and this one do not have.) The
    last layer starts at 0, and so do all codes. Features then choose the first code of all. Its gradient moves the rows
    of the last layer for the first place of a group, and so the first code of every group; the codes at the second
    place follow when a feature chooses them, and so on. Codes come into use one place after another (`start_updates`).
    """

    def __init__(self, group: int, code_dim: int, width: int, depth: int, heads: int):
        super().__init__()
        self.compress = nn.Linear(group * code_dim, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, EPSILON, elementwise_affine=False)
        self.recover = nn.Linear(width, group * code_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.recover.weight)

    def forward(self, rows_kd: Tensor) -> Tensor:
        x_gw = self.compress(rows_kd.reshape(-1, self.compress.in_features))
        for block in self.blocks:
            x_gw = block(x_gw)
        return self.recover(self.norm(x_gw)).view(rows_kd.shape)


class Block(nn.Module):
    """A block of a vision transformer with layer norms without parameters: x + attention(norm(x)), then
    x + feed-forward(norm(x)). Attention computes no matrix of tokens x tokens where PyTorch has a fused kernel."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, EPSILON, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.attended = nn.Linear(width, width)
        self.expand = nn.Linear(width, MLP_RATIO * width)
        self.contract = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x_gw: Tensor) -> Tensor:
        tokens, width = x_gw.shape
        qkv_3hgd = self.qkv(self.norm(x_gw)).view(tokens, 3, self.heads, width // self.heads).permute(1, 2, 0, 3)
        out_1hgd = F.scaled_dot_product_attention(*qkv_3hgd[:, None])
        x_gw = x_gw + self.attended(out_1hgd[0].transpose(0, 1).reshape(tokens, width))
        return x_gw + self.contract(F.gelu(self.expand(self.norm(x_gw)), approximate="tanh"))
