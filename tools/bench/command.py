"""The `ibq bench` commands: options and help. Each imports its benchmark when it runs."""

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from tools.bench.common import Options, bad, check_out, command_line, names, numbers

app = typer.Typer(no_args_is_help=True, help="Measure time and memory on this machine.")

Tokens = Annotated[str, typer.Option(metavar="N,...", help="Vectors in one call.")]
Codes = Annotated[str, typer.Option(metavar="K,...", help="Codebook or vocabulary sizes.")]
Dim = Annotated[str, typer.Option(metavar="D,...", help="Dimensions of a code.")]
Dtypes = Annotated[str, typer.Option(metavar="TYPE,...", help="float32, bfloat16, float16.")]
Reference = Annotated[
    Path | None,
    typer.Option(metavar="CHECKOUT", help="Also measure the published code, from a checkout of TencentARC/SEED-Voken."),
]
Out = Annotated[
    Path | None, typer.Option(metavar="FILE.md", help="New file for the full table; FILE.png is written beside it.")
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to measure.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="all cores")]
Repeats = Annotated[int, typer.Option(min=1, help="Repeats of each row; the fastest counts.")]
RECIPE_HELP = "Generator recipes, or DEPTHxHEADS: ar_b with other numbers of blocks and of heads of 64 dimensions."
Dtype = Annotated[
    Literal["float32", "bfloat16"] | None,
    typer.Option(help="Of matrix products.", show_default="float32; on CUDA bfloat16"),
]


@app.command()
def quantizer(
    context: typer.Context,
    tokens: Tokens = "1024",
    codes: Codes = "16384,65536,262144",
    dim: Dim = "256",
    dtype: Dtypes = "float32",
    impl: Annotated[
        str,
        typer.Option(metavar="IMPL,...", help="dense, chunked; on CUDA also triton, and attention for comparison."),
    ] = "dense,chunked",
    reference: Reference = None,
    out: Out = None,
    temperature: Annotated[float, typer.Option(help="Of the entropies; 0 leaves them out.")] = 0.01,
    scale: Annotated[float, typer.Option(help="z is normal(0, scale^2); larger values allow more skipping.")] = 1.0,
    no_skip: Annotated[bool, typer.Option("--no-skip", help="Compute all tiles, also negligible ones.")] = False,
    tile: Annotated[
        str | None, typer.Option(metavar="TOKENS,CODES", help="Size of a tile.", show_default="chosen by device")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    repeats: Repeats = 3,
) -> None:
    """Measure time and memory of index backpropagation, forward and backward.

    Options accept lists: every impl is measured at every shape, each in a fresh process. A row that does not fit into
    memory is reported as such, and the table continues.

    Example: ibq bench quantizer --codes 16384,262144 --impl dense,chunked
    """
    from tools.bench.quantizer import IMPLS, compare_quantizers, parse_shapes

    shapes, impls = parse_shapes(tokens, codes, dim, dtype), names("--impl", impl, IMPLS)
    options = Options(device, threads, repeats, reference, out, command_line(context))
    compare_quantizers(shapes, impls, options, temperature=temperature, scale=scale, skip=not no_skip, tile=tile)


@app.command("cross-entropy")
def cross_entropy(
    tokens: Tokens = "2048",
    codes: Codes = "262144",
    dim: Dim = "1024",
    dtype: Dtypes = "float32",
    impl: Annotated[
        str, typer.Option(metavar="IMPL,...", help="dense (PyTorch's), chunked; on CUDA also liger.")
    ] = "dense,chunked",
    device: Device = "auto",
    threads: Threads = None,
    repeats: Repeats = 1,
) -> None:
    """Measure time and memory of a generator's loss over all codes, forward and backward.

    Every impl is measured at every shape, each in a fresh process. Extra memory is the peak minus operands and
    gradients. dense at the default shape needs 7 GB.

    Example: ibq bench cross-entropy --codes 16384,262144
    """
    from tools.bench.quantizer import CROSS_ENTROPY_IMPLS, compare_cross_entropies, parse_shapes

    shapes, impls = parse_shapes(tokens, codes, dim, dtype), names("--impl", impl, CROSS_ENTROPY_IMPLS)
    compare_cross_entropies(shapes, impls, Options(device, threads, repeats))


@app.command("data")
def data_stream(
    context: typer.Context,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Local tars: a folder or a quoted pattern; each row reads all of them.",
            show_default="2,048 images made from scikit-image's photographs",
        ),
    ] = None,
    workers: Annotated[str, typer.Option(metavar="N,...", help="Loader workers; 0 is none.")] = "0,1,2",
    world: Annotated[int, typer.Option(min=1, metavar="W", help="Ranks that bytes are counted for.")] = 4,
    image_size: Annotated[int, typer.Option(min=1, help="Side of the images, in pixels.")] = 256,
    buckets: Annotated[
        bool,
        typer.Option(help="Images of all shapes, in the buckets of data.pixels=[IMAGE_SIZE]."),
    ] = False,
    seconds: Annotated[float, typer.Option(help="Least time of a repeat, which always reads all samples.")] = 5.0,
    repeats: Repeats = 3,
    memory_batches: Annotated[
        int, typer.Option(help="Batches of 8 small images over which worker memory is watched; 0 skips it.")
    ] = 10_000,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.md", help="New file for all tables; FILE.json and FILE.png are written beside it."),
    ] = None,
) -> None:
    """Measure images per second, bytes and memory of the training stream.

    Compares it with the bound (decode and resize alone), webdataset, and ranks that each decode all samples and keep
    every W-th. Every repeat of every row is a fresh process.

    Example: ibq bench data --workers 0,2,4 --out data.md
    """
    counts = list(dict.fromkeys(numbers("--workers", workers, least=0)))
    if not 0 < seconds < math.inf:
        raise bad("--seconds", f"{seconds} is not a finite number above 0")
    if memory_batches and memory_batches < 20:
        raise bad("--memory-batches", f"{memory_batches} are too few for a slope; use at least 20, or 0 for none")
    check_out(out, ".png", ".json")
    from tools.bench.data import Plan, compare

    plan = Plan(counts, world, image_size, buckets, seconds, repeats, memory_batches)
    compare(data, plan, out, command_line(context))


@app.command("sample")
def sampling(
    context: typer.Context,
    recipe: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help=RECIPE_HELP, show_default="6x6; on CUDA ar_b, ar_l, ar_xl, ar_xxl"),
    ] = None,
    impl: Annotated[
        str | None,
        typer.Option(
            metavar="IMPL,...",
            help="uncached, cached, compiled; on CUDA also cached-eager, without graphs.",
            show_default="all but compiled",
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images in a batch.", show_default="4; on CUDA 64")
    ] = None,
    guidance: Annotated[float, typer.Option(help="1 is none, which halves the work.")] = 2.0,
    reference: Reference = None,
    out: Out = None,
    dtype: Dtype = None,
    device: Device = "auto",
    threads: Threads = None,
    repeats: Repeats = 2,
) -> None:
    """Measure images per second and memory of sampling a generator's codes.

    Every impl of every recipe is measured in a fresh process.

    Example: ibq bench sample --recipe 6x6,12x12 --reference SEED-Voken
    """
    from tools.bench.generator import compare_sampling

    options = Options(device, threads, repeats, reference, out, command_line(context))
    compare_sampling(recipe, impl, dtype, options, batch_size, guidance)


@app.command("train-ar")
def training(
    context: typer.Context,
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME,...", help=RECIPE_HELP, show_default="4x4; on CUDA ar_xl, ar_xxl")
    ] = None,
    impl: Annotated[
        str | None,
        typer.Option(metavar="IMPL,...", help="dense, ibq, compiled, checkpointed, selective.", show_default="all"),
    ] = None,
    vocabulary: Annotated[str, typer.Option(metavar="V,...", help="Vocabulary sizes.")] = "16384,262144",
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Images in a step.", show_default="2; on CUDA 16")
    ] = None,
    reference: Reference = None,
    out: Out = None,
    dtype: Dtype = None,
    device: Device = "auto",
    threads: Threads = None,
    repeats: Repeats = 3,
) -> None:
    """Measure tokens per second, MFU and memory of a generator's training step.

    Every impl of every recipe is measured in a fresh process. A row that does not fit into memory is reported as such,
    and the table continues.

    Example: ibq bench train-ar --recipe 4x4 --vocabulary 262144 --reference SEED-Voken
    """
    from tools.bench.generator import compare_training

    options = Options(device, threads, repeats, reference, out, command_line(context))
    compare_training(recipe, impl, dtype, options, vocabulary, micro_batch)
