"""The Triton kernels compile for GPUs that are not here, fit them and keep their registers.

Compilation needs a process in which Triton has not been told to interpret. There a sweep over tensors without memory
tells which kernels it would start with which arguments; these are compiled, and what ptxas made of them is printed.
"""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from ranks import Launch

pytest.importorskip("triton")

COMPILE = """
import json, re, subprocess, sys, tempfile
from pathlib import Path

import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model_zoo.ops import triton_sweeps
from model_zoo.ops.tiled import Assignment, EntropyGradient, HardGradient, Settings, SoftGradient

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TYPES |= {torch.int8: "i8", torch.int32: "i32", torch.int64: "i64"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compiled(kernel, arguments, options, arch):
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[place,] = [["tt.divisibility", 16]]
        elif kernel.params[place].is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(kernel):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.check_output([CUOBJDUMP, "--dump-resource-usage", file.name], text=True)
    counts = {name.lower(): int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\\d+)", text)}
    wgmma, pipelined = "wgmma.mma" in kernel.asm["ptx"], "cp.async.c" in kernel.asm["ptx"]
    return counts | {"shared": kernel.metadata.shared, "wgmma": wgmma, "pipelined": pipelined}


arch, shared_bytes, dtype, dim, precision = json.loads(sys.argv[1])
torch.set_float32_matmul_precision(precision)
launches = []
triton_sweeps.launch = lambda kernel, grid, arguments, options: launches.append((kernel, arguments, options))
triton_sweeps.device_of = lambda z_nd: triton_sweeps.Device(multiprocessors=100, shared_bytes=shared_bytes)

z_nd, codebook_kd = (torch.empty(n, dim, dtype=getattr(torch, dtype), device="meta") for n in (4096, 16384))
sweeps = triton_sweeps.TritonSweeps(z_nd, codebook_kd, len(codebook_kd), Settings())
sweeps.row_statistics(with_output=False)
index_n, max_n, sum_n, output_nd = sweeps.row_statistics(with_output=True)
sweeps.set_global_max(max_n)
assignment = Assignment(*sweeps.assignment_sums(max_n, 0.01), 0.01)
average_k = sweeps.assignment_columns(max_n, assignment)
average_n = sweeps.assignment_dot(max_n, assignment, average_k)
soft, entropy = SoftGradient(output_nd, max_n, sum_n), EntropyGradient(assignment, max_n, average_k, average_n)
sweeps.gradients(max_n, soft, entropy, HardGradient(index_n, output_nd), (True, True))
done = set()
for kernel, arguments, options in launches:
    variant = kernel, *(name for name, value in arguments.items() if value is None or value is False)
    if variant not in done:
        done.add(variant)
        row = {"kernel": kernel.__name__, "dots": "PRECISION" in arguments} | options
        print(json.dumps(row | resources(compiled(kernel, arguments, options, arch))))
"""

KIB = 1024
SHARED = {80: 163 * KIB, 90: 227 * KIB}
# Architecture, operands' type, D, torch.get_float32_matmul_precision().
CASES = [
    (90, "bfloat16", 256, "highest"),
    (80, "bfloat16", 256, "highest"),
    (90, "float32", 256, "high"),
    (80, "float32", 256, "highest"),
    (90, "bfloat16", 512, "highest"),
]
KERNELS = {
    "first_kernel",
    "gap_kernel",
    "assignment_rows_kernel",
    "assignment_columns_kernel",
    "grad_z_kernel",
    "grad_codebook_kernel",
}


def compile_for(launch: Launch, arch: int, *case) -> list[dict]:
    done = launch.python("-c", COMPILE, json.dumps([arch, SHARED[arch], *case])).succeeded()
    return [json.loads(line) for line in done.out.splitlines()]


@pytest.fixture(scope="module")
def compilations(launch):
    with ThreadPoolExecutor(2) as pool:
        started = {case: pool.submit(compile_for, launch, *case) for case in CASES}
        yield started
        pool.shutdown(cancel_futures=True)


@pytest.mark.full
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_every_kernel_fits_the_device(case, compilations):
    arch, dtype, dim, _ = case
    rows = compilations[case].result()
    assert {row["kernel"] for row in rows} == KERNELS
    for row in rows:
        assert row["shared"] <= SHARED[arch], row
        assert row["local"] == 0, row
        # ptxas spills a register or two on its own account, where one program more then runs at once.
        assert row["stack"] <= (8 if dtype == "float32" else 0), row
        if row["dots"]:
            assert row["pipelined"], row
            # Blocks of 64 x 512 would need too many registers, and smaller ones are beneath what wgmma takes.
            assert row["wgmma"] or (arch, dtype) != (90, "bfloat16") or dim == 512, row
