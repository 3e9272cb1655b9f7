"""Time and memory of index backpropagation, forward and backward, as a Markdown table.

    python benchmarks/quantizer.py --tokens 1024 --codes 16384 65536 262144 1048576 --dim 256 --impl dense chunked

Each row is measured in a fresh process: the rate of a plain matrix product, the operation's extra memory (peak of the
process, or of the device, minus operands and gradients) in the first run, and the times, the best of ``--repeats``;
processor time far below threads x time says that others used the machine.
Operands are normal(0, 1), as a codebook is at the start; ``--scale`` multiplies z, and with it how far the assignments
concentrate on few codes. The loss uses the quantized vectors and both entropies.

A sweep is one product of all tokens with all codes, 2 N K D operations: dense makes 6 (logits and code vectors;
backward g C^T, onehot^T g, dl C, dl^T z), chunked counts those it really made. Their time at the measured rate is the
floor.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from model_zoo.ops import IndexBackprop
from model_zoo.ops.chunked import SkipStats, index_backprop_chunked
from model_zoo.ops.dense import index_backprop_dense

# Products of a tile's live tokens with its codes that each of the counted sweeps makes.
PRODUCTS = {
    "output": 1,
    "assignment": 1,
    "average": 1,
    "soft_gradient": 4,
    "average_gradient": 1,
    "entropy_gradient": 3,
}
DENSE_SWEEPS = 6
COLUMNS = {
    "impl": "impl",
    "dtype": "dtype",
    "tokens": "N",
    "codes": "K",
    "dim": "D",
    "forward_seconds": "forward, s",
    "backward_seconds": "backward, s",
    "seconds": "both, s",
    "processor_seconds": "processor, s",
    "nanoseconds_per_logit": "ns per N x K",
    "extra_mib": "extra memory, MiB",
    "process_mib": "process in all, MiB",
    "skip_soft": "skipped, softmax",
    "skip_entropy": "skipped, entropy",
    "sweeps": "sweeps made",
    "gflops": "matmul, GFLOP/s",
    "floor_seconds": "floor, s",
    "of_rate": "of matmul rate",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--codes", type=int, nargs="+", default=[2**14, 2**16, 2**18, 2**20])
    parser.add_argument("--dim", type=int, nargs="+", default=[256])
    parser.add_argument("--impl", nargs="+", choices=["dense", "chunked"], default=["dense", "chunked"])
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--temperature", type=float, default=0.01, help="0 leaves the entropies out")
    parser.add_argument("--scale", type=float, default=1.0, help="z is normal(0, scale^2)")
    parser.add_argument("--no-skip", action="store_true", help="visit all tiles")
    parser.add_argument("--tile", type=int, nargs=2, metavar=("TOKENS", "CODES"), help="size of a tile")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-dense-codes", type=int, default=2**18, help="dense rows beyond this are left out")
    parser.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(**options.row)))
        return

    print(f"{datetime.now(timezone.utc):%Y-%m-%d}: {hardware(options)}\n")
    print(f"`python benchmarks/quantizer.py {' '.join(sys.argv[1:])}`\n")
    print("| " + " | ".join(COLUMNS.values()) + " |\n|" + " --- |" * len(COLUMNS), flush=True)
    shared = dict(
        temperature=options.temperature or None,
        scale=options.scale,
        skip=not options.no_skip,
        tile=options.tile,
        device=options.device,
        threads=options.threads,
        repeats=options.repeats,
    )
    for tokens in options.tokens:
        for codes in options.codes:
            for dim in options.dim:
                for dtype in options.dtype:
                    for impl in options.impl:
                        if impl == "dense" and codes > options.max_dense_codes:
                            continue
                        row = dict(impl=impl, dtype=dtype, tokens=tokens, codes=codes, dim=dim, **shared)
                        command = [sys.executable, __file__, "--row", json.dumps(row)]
                        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                        result = json.loads(done.stdout)
                        cells = [result[name] for name in COLUMNS]
                        print("| " + " | ".join("-" if c is None else str(c) for c in cells) + " |", flush=True)


def hardware(options: argparse.Namespace) -> str:
    if options.device == "cpu":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        device = f"{names[0] if names else platform.processor()}, {options.threads} threads"
    else:
        device = torch.cuda.get_device_name()
    return f"{device}; PyTorch {torch.__version__}, Python {platform.python_version()}"


def measure(impl, dtype, tokens, codes, dim, temperature, scale, skip, tile, device, threads, repeats) -> dict:
    torch.set_num_threads(threads)
    on_cpu = device == "cpu"
    dtype_ = getattr(torch, dtype)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.empty(shape, dtype=dtype_, device=device).normal_(generator=generator)

    def now() -> float:
        if not on_cpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak_bytes() -> int:
        return (
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10 if on_cpu else torch.cuda.max_memory_allocated()
        )

    def op(z_nd, codebook_kd, stats) -> IndexBackprop:
        if impl == "dense":
            return index_backprop_dense(z_nd, codebook_kd, temperature)
        return index_backprop_chunked(
            z_nd, codebook_kd, temperature, skip=skip, tile=tuple(tile) if tile else None, stats=stats
        )

    def run(z_nd, codebook_kd, grad_nd) -> tuple[float, float, float, float, SkipStats]:
        z_nd.grad = codebook_kd.grad = None
        stats = SkipStats()
        start, processor = now(), time.process_time()
        out = op(z_nd, codebook_kd, stats)
        loss = (out.quantized_nd * grad_nd).sum()
        if temperature is not None:
            loss = loss + out.sample_entropy - out.average_entropy
        middle = now()
        loss.backward()
        end = now()
        return end - start, middle - start, end - middle, time.process_time() - processor, stats

    rate = matmul_rate(normal, now, tokens, dim)
    run(normal(64, dim).requires_grad_(), normal(600, dim).requires_grad_(), normal(64, dim))  # libraries, threads
    z_nd, codebook_kd, grad_nd = normal(tokens, dim).mul_(scale), normal(codes, dim), normal(tokens, dim)
    z_nd.requires_grad_()
    codebook_kd.requires_grad_()
    before = peak_bytes()
    times = []
    for number in range(repeats):
        *measured, stats = run(z_nd, codebook_kd, grad_nd)
        times.append(measured)
        if number == 0:
            extra = peak_bytes() - before - z_nd.grad.nbytes - codebook_kd.grad.nbytes
            in_all = peak_bytes()
    seconds, forward, backward, processor = min(times)

    sweep = 2 * tokens * codes * dim
    sweeps = DENSE_SWEEPS
    skip_soft = skip_entropy = None
    if impl == "chunked":
        sweeps = 1 + sum(PRODUCTS[name] * (1 - stats.skip_rate(name)) for name in stats.visited)
        skip_soft = f"{stats.skip_rate('soft_gradient'):.1%}"
        skip_entropy = f"{stats.skip_rate('entropy_gradient'):.1%}" if temperature is not None else None
    return dict(
        impl=impl,
        dtype=dtype,
        tokens=tokens,
        codes=codes,
        dim=dim,
        forward_seconds=f"{forward:.3f}",
        backward_seconds=f"{backward:.3f}",
        seconds=f"{seconds:.3f}",
        processor_seconds=f"{processor:.3f}",
        nanoseconds_per_logit=f"{1e9 * seconds / tokens / codes:.2f}",
        extra_mib=f"{extra / 2**20:.0f}",
        process_mib=f"{in_all / 2**20:.0f}",
        skip_soft=skip_soft,
        skip_entropy=skip_entropy,
        sweeps=f"{sweeps:.2f}",
        gflops=f"{rate / 1e9:.0f}",
        floor_seconds=f"{sweeps * sweep / rate:.3f}",
        of_rate=f"{sweeps * sweep / rate / seconds:.0%}",
    )


def matmul_rate(normal, now, tokens: int, dim: int) -> float:
    """Operations per second of the best of ten products of the tokens with 4096 codes."""
    left, right = normal(tokens, dim), normal(4096, dim)
    out = left @ right.T
    best = float("inf")
    for _ in range(10):
        start = now()
        torch.mm(left, right.T, out=out)
        best = min(best, now() - start)
    return 2 * tokens * 4096 * dim / best


if __name__ == "__main__":
    main()
