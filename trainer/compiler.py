"""Whether torch.compile works on this machine."""

import os
import shutil

import torch

from trainer import TrainerError


def check_compiler(device: torch.device, setting: str) -> None:
    """Compiles and runs a small function, which takes seconds, before a model is compiled in minutes. setting: what
    asks for it and can be left out. Raises TrainerError, one line in place of a page of the compiler's."""
    advice = f"`ibq doctor` says more, or leave out {setting}"
    command = os.environ.get("CXX", "g++")  # as torch.compile chooses it; kernels for a GPU are compiled by Triton
    if device.type == "cpu" and shutil.which(command) is None:
        raise TrainerError(
            f"{setting} needs a C++ compiler, and {command} is not on PATH: install one (Debian: apt install g++), or "
            f"set CXX; {advice}"
        )
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except Exception as error:  # of any of several libraries
        reason = next(iter(str(error).strip().splitlines()), "")[:200]
        raise TrainerError(f"{setting} does not work here ({type(error).__name__}: {reason}): {advice}") from error
