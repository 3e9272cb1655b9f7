"""Causal attention: flash-attn if it is installed, otherwise PyTorch's own kernels.

Shapes: b sequences, t positions, h heads, d dimensions of a head.
"""

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# Modules with `flash_attn_func` by compute capability, the fastest first: 3 (Hopper), CuTe (Hopper, Blackwell), 2.
FLASH_MODULES = {9: ("flash_attn_interface", "flash_attn.cute", "flash_attn"), 10: ("flash_attn.cute", "flash_attn")}


def causal_attention(q_bthd: Tensor, k_bthd: Tensor, v_bthd: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v``, where position t attends to positions 0 to t; ``(b, t, h, d)`` in the operands'
    dtype.

    By flash-attn (2, 3 or CuTe) if it is installed and supports the operands: CUDA, half precision, heads of 8 to 256
    dimensions. Otherwise by PyTorch's kernels: on CUDA those of flash attention or cuDNN.
    """
    if _takes(q_bthd) and (flash := _flash(q_bthd.device)):
        out = flash(q_bthd, k_bthd, v_bthd, causal=True)
        return out[0] if isinstance(out, tuple) else out
    q, k, v = (x.transpose(1, 2) for x in (q_bthd, k_bthd, v_bthd))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _takes(q_bthd: Tensor) -> bool:
    in_half = q_bthd.dtype in (torch.float16, torch.bfloat16)
    return q_bthd.is_cuda and in_half and q_bthd.shape[-1] % 8 == 0 and q_bthd.shape[-1] <= 256


@functools.cache
def _flash(gpu: torch.device) -> Callable | None:
    """flash-attn's function for a GPU, or None if no release of it can be imported."""
    for name in FLASH_MODULES.get(torch.cuda.get_device_capability(gpu)[0], ("flash_attn",)):
        try:
            return importlib.import_module(name).flash_attn_func
        except (ImportError, AttributeError):  # not installed, or built for another torch; `ibq doctor` reports it
            continue
    return None
