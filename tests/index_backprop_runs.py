"""What tests of index backpropagation's tiled implementations run, and how far it may be from the truth."""

import json

import numpy as np
import torch
from golden.make_index_backprop import FILE
from torch import Tensor

from model_zoo.ops.tiled import Settings, index_backprop_tiled

OUTPUTS = ["quantized_nd", "code_nd", "sample_entropy", "average_probability_k"]
GOLDEN_CASES = json.loads(FILE.read_text())
TILE = (16, 32)  # small, so that the tests' shapes have many


def tiled_by(sweeps):
    """The operation with these sweeps, and settings by name."""

    def op(z_nd, codebook_kd, temperature, **settings):
        return index_backprop_tiled(z_nd, codebook_kd, temperature, sweeps=sweeps, settings=Settings(**settings))

    return op


def random_operands(tokens, codes, dim, dtype=torch.float64, *, scale=1.0, device="cpu"):
    """z and codebook, and a gradient for each differentiable output, rounded to ``dtype``."""
    generator = np.random.default_rng(0)
    z_nd, codebook_kd = (scale * generator.normal(size=(n, dim)) / dim**0.25 for n in (tokens, codes))
    shapes = [(tokens, dim), (tokens, dim), (), (codes,)]
    upstream = {name: generator.normal(size=shape) for name, shape in zip(OUTPUTS, shapes, strict=True)}
    z_nd, codebook_kd = (torch.tensor(x, dtype=dtype, device=device) for x in (z_nd, codebook_kd))
    return z_nd, codebook_kd, {name: torch.tensor(g, dtype=dtype, device=device) for name, g in upstream.items()}


def tied_operands(codes, device="cpu"):
    """z of 20 tokens, a codebook of five vectors many times over, and the lowest of the codes that tie."""
    generator = torch.Generator().manual_seed(0)
    # Integers, so that equal codes have exactly equal logits whatever the order of summation.
    few_kd = torch.randint(-3, 4, (5, 8), generator=generator).float()
    codebook_kd = few_kd[torch.randint(0, 5, (codes,), generator=generator)]
    z_nd = torch.randint(-3, 4, (20, 8), generator=generator).float()
    z_nd[7] = 0  # ties with all
    logits_nk = z_nd @ codebook_kd.T
    lowest_n = (logits_nk == logits_nk.amax(dim=1, keepdim=True)).int().argmax(dim=1)
    assert lowest_n[7] == 0
    return z_nd.to(device), codebook_kd.to(device), lowest_n.to(device)


def run(op, z_nd, codebook_kd, upstream, temperature, dtype=None, **settings):
    """Outputs and gradients by name, as float64, and the indices. ``upstream`` names the outputs that the loss uses."""
    z, codebook = (x.detach().to(dtype or x.dtype).requires_grad_() for x in (z_nd, codebook_kd))
    out = op(z, codebook, temperature, **settings)
    used = {name: g for name, g in upstream.items() if getattr(out, name) is not None}
    outputs = [getattr(out, name) for name in used]
    torch.autograd.backward(outputs, [g.to(o.dtype) for g, o in zip(used.values(), outputs, strict=True)])
    values = {name: getattr(out, name) for name in OUTPUTS} | {"z.grad": z.grad, "codebook.grad": codebook.grad}
    return {name: v.detach().double() for name, v in values.items() if v is not None}, out.index_n


def run_golden(op, case, dtype, device="cpu", **settings) -> dict[str, Tensor]:
    """Outputs and gradients of a golden case by the case's names."""
    z, codebook, grad_nd = (
        torch.tensor(case[name], dtype=dtype, device=device) for name in ("z_nd", "codebook_kd", "grad_nd")
    )
    out = op(z.requires_grad_(), codebook.requires_grad_(), case["temperature"], **settings)
    loss = (out.quantized_nd * grad_nd).sum()
    if case["temperature"] is not None:
        loss = loss + case["sample_weight"] * out.sample_entropy + case["average_weight"] * out.average_entropy
    loss.backward()
    values = out._asdict() | {"average_entropy": out.average_entropy}
    values |= {"grad_z_nd": z.grad, "grad_codebook_kd": codebook.grad}
    return {name: value.detach() for name, value in values.items() if value is not None and name in case}


def error(value, exact, least=1e-30) -> float:
    """The largest error over the largest true value."""
    return ((value - exact).abs().max() / exact.abs().max().clamp(min=least)).item()
