"""Makes index_backprop.json: index backpropagation's forward and closed-form gradients in float64, by numpy alone.

    python tests/golden/make_index_backprop.py

The inputs are integers of a linear congruential generator over 32, so that they are the same, and exact, everywhere.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

EPSILON = 1e-5  # inside the logarithm of the average entropy
FILE = Path(__file__).with_name("index_backprop.json")
# tokens, codes, code dimension, temperature (None: no entropies), divisor of the inputs
CASES = [(1, 5, 3, 0.5, 32), (6, 7, 4, None, 32), (6, 7, 4, 0.5, 32), (9, 13, 8, 0.01, 64)]
WEIGHTS = {"sample_weight": 0.75, "average_weight": -1.25}


class ClosedForm(NamedTuple):
    """Forward values, and the gradients of sum(g * z_q) + sample_weight * H_sample + average_weight * H_average."""

    quantized_nd: np.ndarray
    index_n: np.ndarray
    sample_entropy: float | None
    average_probability_k: np.ndarray | None
    average_entropy: float | None
    grad_z_nd: np.ndarray
    grad_codebook_kd: np.ndarray


def log_softmax(logits_nk: np.ndarray) -> np.ndarray:
    shifted = logits_nk - logits_nk.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def closed_form(z_nd, codebook_kd, grad_nd, temperature=None, sample_weight=0.0, average_weight=0.0) -> ClosedForm:
    """The published equations, without automatic differentiation. Everything in float64."""
    logits_nk = z_nd @ codebook_kd.T
    index_n = logits_nk.argmax(axis=1)
    soft_nk = np.exp(log_softmax(logits_nk))
    soft_output_nd = soft_nk @ codebook_kd
    grad_logits_nk = soft_nk * (grad_nd @ codebook_kd.T - (grad_nd * soft_output_nd).sum(axis=1, keepdims=True))
    sample_entropy = average_k = average_entropy = None
    if temperature is not None:
        tokens = len(z_nd)
        log_q_nk = log_softmax(logits_nk / temperature)
        q_nk = np.exp(log_q_nk)
        entropy_n = -(q_nk * log_q_nk).sum(axis=1)
        sample_entropy = entropy_n.mean()
        average_k = q_nk.mean(axis=0)
        average_entropy = -(average_k * np.log(average_k + EPSILON)).sum()
        slope_k = -(np.log(average_k + EPSILON) + average_k / (average_k + EPSILON)) / tokens
        grad_sample_nk = -q_nk * (log_q_nk + entropy_n[:, None]) / temperature / tokens
        grad_average_nk = q_nk * (slope_k - (q_nk @ slope_k)[:, None]) / temperature
        grad_logits_nk = grad_logits_nk + sample_weight * grad_sample_nk + average_weight * grad_average_nk
    grad_codebook_kd = grad_logits_nk.T @ z_nd
    np.add.at(grad_codebook_kd, index_n, grad_nd)
    return ClosedForm(
        codebook_kd[index_n],
        index_n,
        sample_entropy,
        average_k,
        average_entropy,
        grad_logits_nk @ codebook_kd,
        grad_codebook_kd,
    )


def integers(count: int, seed: int) -> np.ndarray:
    """``count`` integers in [-64, 64)."""
    values = []
    for _ in range(count):
        seed = (1103515245 * seed + 12345) % 2**31
        values.append(seed // 2**24 - 64)
    return np.array(values, dtype=np.float64)


def make() -> list[dict]:
    cases = []
    for seed, (tokens, codes, dim, temperature, divisor) in enumerate(CASES, start=1):
        numbers = integers((2 * tokens + codes) * dim, seed) / divisor
        z_nd, grad_nd, codebook_kd = np.split(numbers.reshape(-1, dim), [tokens, 2 * tokens])
        result = closed_form(z_nd, codebook_kd, grad_nd, temperature, **WEIGHTS)
        case = {"temperature": temperature, **WEIGHTS, "z_nd": z_nd, "grad_nd": grad_nd, "codebook_kd": codebook_kd}
        case |= result._asdict()
        cases.append({name: value.tolist() if hasattr(value, "tolist") else value for name, value in case.items()})
    return cases


if __name__ == "__main__":
    FILE.write_text("[\n" + ",\n".join(json.dumps(case) for case in make()) + "\n]\n")
