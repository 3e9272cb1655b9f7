"""VQ whose codes are moving averages of their features (van den Oord et al. 2017, arXiv 1711.00937), a baseline."""

import torch
import torch.distributed as dist
from torch import Tensor

from model_zoo.config import TokenizerConfig
from model_zoo.ops.chunked import ChosenCodes
from model_zoo.ops.codebook_parallel import CodebookShard
from model_zoo.ops.eager import eager
from model_zoo.ops.tiled import HardGradient
from model_zoo.ops.types import IndexBackprop
from model_zoo.quantizers.vq import VectorQuantizer

EPSILON = 1e-5  # of the Laplace smoothing, as published


class MovingAverageQuantizer(VectorQuantizer):
    """Selects the code at the smallest Euclidean distance; the gradient to the encoder is straight-through. No gradient
    reaches the codes. After each step, code i moves by the n_i features z of the global batch that chose it (appendix
    A.1, eq. 6-8, with gamma = ``model.codebook_decay``):

        N_i <- gamma N_i + (1 - gamma) n_i        m_i <- gamma m_i + (1 - gamma) sum of z        e_i = m_i / N'_i

    N' is N with Laplace smoothing, (N_i + eps) / (n + K eps) n, where n is the sum of all N_i, as in DeepMind's code of
    VQ-VAE. The paper leaves the start open: N_i = 1 and m_i = e_i, as in Jukebox (arXiv 2005.00341). A code that is no
    longer chosen stays in place until N_i is as small as eps (1,100 steps with gamma = 0.99), then shrinks towards 0.

    With ``model.restart_below`` above 0, each step moves every code with a smaller N_i to a feature of that step's
    global batch, drawn at random without replacement (Jukebox, where the threshold is 1). A step restarts at most as
    many codes as it has features. Jukebox leaves N and m of such codes as they are, which would draw the code back to
    where it was as soon as it is in use; here N_i becomes the threshold and m_i the feature times N_i. Which features
    are drawn depends on the number of the update and on the order of the global batch alone, so it does not depend on
    the number of ranks, and a resumed run draws the same.

    The first 1 / (1 - gamma) steps (100 with gamma = 0.99) restart no code. N starts at 1 whatever the codes are, and
    tells only after these steps how often a code is chosen. Earlier restarts would replace good codes, such as those
    that fine-tuning loads. The N of the source is not used: it depends on the tokens of a step there, and exports do
    not have it. The number of updates is part of `statistics`, so that a resumed run does not wait again.

    In a training loop of your own call `after_step` after each step: features are kept until then.
    """

    shards = False
    normalizes = False
    moves_codes = True

    def __init__(self, config: TokenizerConfig, shard: CodebookShard | None = None):
        super().__init__(config, shard)
        self.embedding.requires_grad_(False)
        self.decay, self.restart_below = config.codebook_decay, config.restart_below
        self.first_restart = round(1 / (1 - self.decay))  # the number of the first update that restarts codes
        codes_kd = self.embedding.weight
        # The codes define the tokenizer; these are only needed to go on training, which saves `statistics`.
        self.register_buffer("usage_k", codes_kd.new_ones(len(codes_kd)), persistent=False)  # N
        self.register_buffer("sums_kd", torch.zeros_like(codes_kd), persistent=False)  # m; set by the first update
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64), persistent=False)
        self.chosen: list[tuple[Tensor, Tensor]] = []  # features and codes of the step's micro-batches

    def assign(self, z_nd: Tensor, entropy_temperature: float | None) -> IndexBackprop:
        out = super().assign(z_nd, entropy_temperature)
        if self.training and torch.is_grad_enabled():
            self._keep(z_nd.detach(), out.index_n)
        return out

    @eager
    def _keep(self, z_nd: Tensor, index_n: Tensor) -> None:
        self.chosen.append((z_nd, index_n))

    def anneal(self, progress: float) -> None:
        self.chosen.clear()  # those of a step that was skipped

    @torch.no_grad()
    def after_step(self) -> None:
        if not self.chosen:  # the codes are frozen
            return
        z_nd, index_n = (torch.cat(parts) for parts in zip(*self.chosen, strict=True))
        self.chosen.clear()
        codes_kd = self.embedding.weight
        codes, dim = codes_kd.shape
        if self.updates == 0:
            self.sums_kd.copy_(codes_kd)
        self.updates += 1

        own = ChosenCodes(HardGradient(index_n, z_nd), codes, codes)
        batch = torch.cat([torch.zeros_like(codes_kd), torch.bincount(index_n, minlength=codes)[:, None]], dim=1)
        batch[own.index_m, :dim] = own.sums_md
        _sum_over_ranks(batch)
        self.usage_k.lerp_(batch[:, dim], 1 - self.decay)
        self.sums_kd.lerp_(batch[:, :dim], 1 - self.decay)
        if self.restart_below > 0 and self.updates >= self.first_restart:
            self._restart(z_nd)
        total = self.usage_k.sum()
        smoothed_k = (self.usage_k + EPSILON) / (total + codes * EPSILON) * total
        codes_kd.copy_(self.sums_kd / smoothed_k[:, None])

    def _restart(self, z_nd: Tensor) -> None:
        """Moves the codes that are hardly used to features of the global batch, of which ``z_nd`` is this rank's."""
        dead_m = (self.usage_k < self.restart_below).nonzero().flatten()
        if not len(dead_m):
            return
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        tokens_r = torch.zeros(ranks, dtype=torch.int64, device=z_nd.device)
        tokens_r[rank] = len(z_nd)
        tokens = _sum_over_ranks(tokens_r).tolist()
        first = sum(tokens[:rank])
        generator = torch.Generator().manual_seed(int(self.updates))
        dead_m = dead_m[torch.randperm(len(dead_m), generator=generator)[: sum(tokens)].to(dead_m.device)]
        place_m = torch.randperm(sum(tokens), generator=generator)[: len(dead_m)].to(z_nd.device) - first
        mine_m = (place_m >= 0) & (place_m < len(z_nd))
        feature_md = torch.where(mine_m[:, None], z_nd[place_m.clamp(0, len(z_nd) - 1)], 0)
        _sum_over_ranks(feature_md)
        self.usage_k[dead_m] = self.restart_below
        self.sums_kd[dead_m] = self.restart_below * feature_md

    def statistics(self) -> dict[str, Tensor]:
        return {"usage": self.usage_k, "sums": self.sums_kd, "updates": self.updates}


def _sum_over_ranks(tensor: Tensor) -> Tensor:
    """In place; outside training there is one rank."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor
