"""For all tests."""

import os

import torch

# Triton reads this once, where it decorates a kernel: without a GPU its interpreter runs the kernels on the CPU. Set
# here, before any test module imports them.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
