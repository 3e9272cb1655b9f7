"""Functions that torch.compile runs eagerly instead of tracing them."""

import functools
from collections.abc import Callable

import torch


def eager(function: Callable) -> Callable:
    """`torch.compiler.disable`, but without importing torch's compiler (2 s of CPU time) unless something compiles."""
    disabled = torch._disable_dynamo(function)  # the variant that torch itself uses for this purpose

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return disabled(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

    return wrapper
