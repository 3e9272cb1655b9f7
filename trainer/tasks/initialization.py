"""Weights of a new run: loaded from another model, and a tokenizer's codes placed among the features of the data."""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from model_zoo import ModelError
from model_zoo.io.hashing import fingerprint_of
from model_zoo.io.weights import Weights, check_weights, heads_encoder
from model_zoo.quantizers.base import CodebookQuantizer, Quantizer
from model_zoo.quantizers.vqgan_lc import LargeCodebookQuantizer
from model_zoo.transformer import CodebookEmbedding, Transformer
from trainer import TrainerError
from trainer.config import GeneratorRun, TokenizerRun
from trainer.init_from import InitRecord, read_initial_generator, read_initial_weights
from trainer.loading import check_together
from trainer.model_state import ModelState
from trainer.parallel import World, check_same_on_all_ranks, run_on_all_ranks, run_on_main, sum_over_ranks

ROUNDING = 1e-12  # features whose variance is below this share of their squared mean are constant up to fp32 rounding


def load_initial_weights(
    config: TokenizerRun, world: World, state: ModelState, discriminator: nn.Module | None
) -> InitRecord:
    """Loads the weights that ``init_from.source`` names; all ranks call together. Raises TrainerError."""
    check_together(world, config.init_from.source)
    weights, fingerprint = run_on_all_ranks(lambda: read_initial_weights(config))
    found = f"fingerprint {fingerprint_of(weights.tensors)}"
    check_same_on_all_ranks(f"init_from.source={config.init_from.source}", found)
    state.write("tokenizer", weights.tensors)
    return InitRecord(
        weights.origin,
        fingerprint,
        config.init_from.freeze,
        _load_discriminator(config, discriminator, weights),
    )


def load_initial_generator(
    config: GeneratorRun, world: World, state: ModelState, transformer: Transformer
) -> InitRecord:
    """Loads the weights that ``init_from.source`` names, and which classes and grids they were trained on; all ranks
    call together. Raises TrainerError."""
    check_together(world, config.init_from.source)
    weights, fingerprint, grids = run_on_all_ranks(lambda: read_initial_generator(config))
    check_same_on_all_ranks(f"init_from.source={config.init_from.source}", f"fingerprint {fingerprint}")
    embedding = transformer.tok_emb
    if isinstance(embedding, CodebookEmbedding):  # the tokenizer has filled it
        codebook_vd = weights.tensors["tok_emb.codebook_vd"].to(embedding.codebook_vd)
        if not torch.equal(codebook_vd, embedding.codebook_vd):
            raise TrainerError(
                f"init_from.source={config.init_from.source}: its code vectors are not those of tokenizer.source="
                f"{config.tokenizer.source}: name a generator of this tokenizer"
            )
    state.write("generator", weights.tensors)
    # A published file does not say which classes were trained, and was trained on all.
    trained_c = torch.ones_like(transformer.trained_c) if weights.trained_c is None else weights.trained_c
    transformer.trained_c.copy_(trained_c)
    if transformer.trained_g is not None:
        transformer.trained_g.copy_(weights.trained_g)
    return InitRecord(weights.origin, fingerprint, grids=grids)


def _load_discriminator(config: TokenizerRun, network: nn.Module | None, weights: Weights) -> str:
    """Loads the source's discriminator if it fits; returns a description of the initial weights. Heads fit only the
    encoder whose tokens they have learned."""
    if network is None:
        return "none"
    if not config.init_from.discriminator:
        return "random weights (init_from.discriminator=false)"
    if weights.discriminator is None:
        return "random weights (the source has none)"
    try:
        check_weights(weights.discriminator, network.state_dict(), "the source's")
    except ModelError as error:
        return f"random weights ({error})"
    settings = config.discriminator
    if settings.kind == "dino":
        ours = heads_encoder(settings.kind, settings.encoder, settings.sha256)
        if weights.heads_encoder is None:
            return "random weights (the source does not say which encoder its heads belong to)"
        if weights.heads_encoder != ours:
            return f"random weights (the source's heads belong to {weights.heads_encoder}; here it is {ours})"
    network.load_state_dict(weights.discriminator)
    return "the source's"


def read_codes(quantizer: Quantizer, world: World) -> None:
    """Reads the table of a new run from the file ``model.codes``, if the quantizer has one; all ranks call together.
    Only rank 0 reads the file. Raises TrainerError."""
    if isinstance(quantizer, LargeCodebookQuantizer):
        run_on_main(world, quantizer.read_codes)
        dist.broadcast(quantizer.embedding.weight.data, src=0)


@torch.no_grad()
def place_codes_among_features(
    quantizer: CodebookQuantizer,
    state: ModelState,
    encode: Callable[[Tensor], Tensor],
    micro_batches: Iterable[Tensor],
    code_replicas: dist.ProcessGroup | None,
    device: torch.device,
) -> None:
    """``model.codebook_init=features``: centres the features by the encoder's last bias, then draws the codes from the
    features' distribution; all ranks call together.

    encode: uint8 images to features ``(b, d, h, w)``. micro_batches: this rank's share of the first global batch;
    mean and covariance are computed over the whole batch. code_replicas: the ranks that hold copies of the same codes.
    Raises TrainerError if features are not finite.
    """
    dim = quantizer.embedding.weight.shape[1]
    sums = torch.zeros(dim + 1, dim + 1, dtype=torch.float64, device=device)
    for images_bchw in micro_batches:
        z_nd = encode(images_bchw).movedim(1, -1).flatten(0, 2).double()
        z_nd = F.pad(z_nd, (0, 1), value=1.0)
        sums += z_nd.T @ z_nd
    sum_over_ranks(sums)
    mean_d = sums[-1, :-1] / sums[-1, -1]
    covariance_dd = sums[:-1, :-1] / sums[-1, -1] - mean_d.outer(mean_d)
    if not covariance_dd.isfinite().all():  # the same on all ranks
        raise TrainerError(
            "the features of the first step's images are not finite: use model.codebook_init=normal, or with "
            "trainer.precision=fp16 another precision"
        )
    for shard in state.main_engine.weights():
        if shard.name == "quant_conv.bias":  # in CPU memory where the engine offloads
            shard.values.sub_(mean_d[shard.start : shard.start + len(shard.values)].to(shard.values))
    if covariance_dd.trace() > ROUNDING * mean_d.square().sum():
        quantizer.match_features(covariance_dd)
    # Processors may round differently, but the copies of a code must be equal.
    dist.broadcast(quantizer.embedding.weight.data, group=code_replicas, group_src=0)
    state.main_engine.sync_weights()
    if state.ema:
        state.ema.restart()
