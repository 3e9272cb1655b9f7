"""Precision of the forward pass, loss scaling for fp16, and full precision for evaluation."""

import contextlib
import math
from collections.abc import Iterator

import torch


def autocast_dtype(precision: str) -> torch.dtype | None:
    """The autocast dtype of ``trainer.precision``; None for fp32. Weights stay in fp32."""
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


class LossScale:
    """Dynamic loss scaling (Micikevicius et al., arXiv 1710.03740): losses are multiplied by ``value`` before the
    backward pass, so that small gradients do not vanish in fp16. The scale is halved when gradients overflow, and
    doubled after GROWTH_STEPS steps without overflow. It is always 1 if not ``needed``.

    PyTorch's GradScaler does the same, but steps the optimizer itself, which here is the engine's part.
    """

    FIRST, GROWTH_STEPS, LARGEST = 2.0**16, 2000, 2.0**24

    def __init__(self, needed: bool):
        self.needed = needed
        self.value = self.FIRST if needed else 1.0
        self.good_steps = 0

    def update(self, finite: bool) -> bool:
        """Call after each step. Returns whether a step that was not finite is due to the scale."""
        if not self.needed:
            return False
        if not finite:
            self.good_steps = 0
            was, self.value = self.value, max(1.0, self.value / 2)
            return was > 1
        self.good_steps += 1
        if self.good_steps % self.GROWTH_STEPS == 0:
            self.value = min(self.LARGEST, 2 * self.value)
        return False

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restores the `state_dict` of a run in any precision."""
        if self.needed and state["value"] > 1 and math.isfinite(state["value"]):
            self.value, self.good_steps = float(state["value"]), int(state["good_steps"])


@contextlib.contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Within the context: fp32 arithmetic without gradients, autocast or TF32."""
    matmul_precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.no_grad(),
            torch.autocast(device_type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul_precision)
