"""What tests of models share: small models, their checkpoints and runs, and checks of what is loaded or refused."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from comparing import refusal
from omegaconf import OmegaConf
from torch import Tensor, nn

from model_zoo import ModelError, Tokenizer, TokenizerConfig, Transformer, TransformerConfig
from model_zoo.io.manifest import MANIFEST, STATE, entry_of
from model_zoo.io.run_layout import checkpoint_step
from model_zoo.io.sharded_tensors import save_shards, whole_tensor
from model_zoo.io.weights import TRAINED, TRAINED_G
from model_zoo.quantizers.base import Quantizer
from model_zoo.quantizers.registry import QUANTIZERS

TOKENIZER = TokenizerConfig(
    codebook_size=32, code_dim=4, channels=8, channel_multipliers=[1], num_res_blocks=1, attention_factors=[],
    latent_channels=4, patch_size=4,
)  # fmt: skip


def tokenizer_of(seed: int = 0, **changes) -> Tokenizer:
    """Random weights; codes of 4 x 4 pixels, unless changes of TOKENIZER are given."""
    torch.manual_seed(seed)
    return Tokenizer(replace(TOKENIZER, **changes))


def quantizer_of(name: str, codes: int, dim: int, /, init_std: float = 1.0, shard=None, **changes) -> Quantizer:
    config = TokenizerConfig(quantizer=name, codebook_size=codes, code_dim=dim, codebook_init_std=init_std, **changes)
    return QUANTIZERS[name](config, shard)


def random_transformer(config: TransformerConfig, seed: int = 0) -> Transformer:
    """In eval mode, with weights that all matter: the head begins at zero, and gates begin near it."""
    torch.manual_seed(seed)
    transformer = Transformer(config).eval()
    with torch.no_grad():
        for tensor in (*transformer.parameters(), *transformer.buffers()):
            if tensor is not transformer.rope_tp2:
                tensor.normal_(std=0.3)
    return transformer


def features(dim: int = 8, b: int = 2, h: int = 3, w: int = 5) -> Tensor:
    """Random (b, dim, h, w), the same each time, with a gradient."""
    return torch.randn(b, dim, h, w, generator=torch.Generator().manual_seed(1)).requires_grad_()


def tokens(z_bdhw: Tensor) -> Tensor:
    """(N, D), without a graph."""
    return z_bdhw.detach().movedim(1, 3).flatten(0, 2)


class NearestCodes(NamedTuple):
    """Chosen codes, their vectors and VQ's two losses."""

    index_n: Tensor
    code_nd: Tensor
    commitment: Tensor
    codebook: Tensor


def nearest_by_hand(z_nd: Tensor, codes_kd: Tensor, grad_nd: Tensor, weights: tuple[float, float]) -> NearestCodes:
    """VQ by its formulas: the nearest codes, and a backward pass of the weighted (commitment, codebook) losses and of
    ``grad_nd``, the gradient of the quantized vectors, straight through."""
    index_n = (z_nd[:, None] - codes_kd[None]).square().sum(dim=2).argmin(dim=1)
    code_nd = codes_kd[index_n]
    commitment, codebook = (z_nd - code_nd.detach()).square().mean(), (z_nd.detach() - code_nd).square().mean()
    through_nd = z_nd + (code_nd - z_nd).detach()
    (weights[0] * commitment + weights[1] * codebook + (through_nd * grad_nd).sum()).backward()
    return NearestCodes(index_n, code_nd, commitment, codebook)


def write_checkpoint(folder: Path, *, ranks: int = 1, **models: nn.Module) -> None:
    """Writes a run's checkpoint of models by their names there; each of its ranks holds a share of every tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    states = {kind: model.state_dict() for kind, model in models.items()}
    shards = [whole_tensor(f"{kind}/{name}", value) for kind, state in states.items() for name, value in state.items()]
    if (trained_c := getattr(models.get("generator"), "trained_c", None)) is not None:
        shards.append(whole_tensor(TRAINED, trained_c))
    if (trained_g := getattr(models.get("generator"), "trained_g", None)) is not None:
        shards.append(whole_tensor(TRAINED_G, trained_g))
    for rank in range(ranks):
        save_shards(folder / f"rank_{rank:05d}.safetensors", [shard.part(rank, ranks) for shard in shards])


def write_run(run: Path, config: Any, *, step: int = 3, ranks: int = 1, **models: nn.Module) -> Path:
    """Writes and returns a run's folder with a checkpoint of models by their names there. ranks: how many wrote it, of
    which each has a part of every tensor."""
    checkpoint = run / "checkpoints" / f"step_{step:08d}"
    write_checkpoint(checkpoint, ranks=ranks, **models)
    (checkpoint.parent / "latest").write_text(checkpoint.name)
    OmegaConf.save(config, run / "config.yaml")
    return run


def write_manifest(checkpoint: Path) -> None:
    """Completes a checkpoint by its state and its manifest."""
    (checkpoint / STATE).write_text(json.dumps({"step": checkpoint_step(checkpoint)}))
    files = {file.name: entry_of(file) for file in checkpoint.iterdir()}
    (checkpoint / MANIFEST).write_text(json.dumps({"files": files}))


def assert_same(loaded: nn.Module, expected: nn.Module) -> None:
    """A loaded model has the configuration and the weights of ``expected``, and is in evaluation mode."""
    assert loaded.config == expected.config
    assert not any(module.training for module in loaded.modules())
    state, expected_state = loaded.state_dict(), expected.state_dict()
    assert state.keys() == expected_state.keys()
    assert all(torch.equal(state[name], value) for name, value in expected_state.items())


refused = partial(refusal, ModelError)
