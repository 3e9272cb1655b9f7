"""`ibq bench`: time and memory on this machine, beside the alternatives."""

import contextlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

IMPLS = ("dense", "chunked", "triton", "attention")
NEED_CUDA = ("triton", "attention", "liger")
CROSS_ENTROPY_IMPLS = ("dense", "chunked", "liger")
DTYPES = ("float32", "bfloat16", "float16")
REFERENCE_FILE = Path("src/IBQ/modules/vqvae/quantize.py")
COLORS = {
    "reference": "#7a7a7a",
    "dense": "#c44e52",
    "chunked": "#4c72b0",
    "triton": "#55a868",
    "attention": "#dd8452",
}
LEGEND = """\
skipped: tiles without weight, in the gradients of the softmax / of the entropies; sweeps: products of all tokens with
all codes that were made; of rate: their time at a plain matrix product's rate, as a share of the time measured."""
LONG_LEGEND = """\
Each row is measured in a fresh process. z is normal(0, scale^2), the codebook normal(0, 1), as it is at the start; the
loss uses the quantized vectors and, unless the temperature is 0, both entropies. Times are those of the fastest repeat;
processor time far below threads x time says that others used the machine. Extra memory is the peak of the process (on
CUDA: of what PyTorch allocates on the device) minus operands and gradients, in the first repeat.

A sweep is one product of all tokens with all codes, 2 N K D operations; counted are those really made, so without what
was skipped. The floor is their time at the rate of a plain matrix product, measured in the same process.

reference: TencentARC/SEED-Voken's own quantizer, z as pictures of 16 x 16 tokens, with its VQ losses, which take two
sweeps more. attention: q = z, k = v = codebook; the same softmax and its gradients, but no choice and no entropies."""

app = typer.Typer(no_args_is_help=True, help="Measure time and memory on this machine.")


class Shape(NamedTuple):
    """What rows are compared at."""

    tokens: int
    codes: int
    dim: int
    dtype: str

    def __str__(self) -> str:
        return f"N {self.tokens:,}, K {self.codes:,}, D {self.dim}, {self.dtype}"


class Row(NamedTuple):
    """measured: the fields of `tools.bench.quantizer.Measured`, or None, and then why there are none."""

    impl: str
    shape: Shape
    measured: dict | None
    reason: str = ""

    @property
    def seconds(self) -> float:
        return self.measured["forward_seconds"] + self.measured["backward_seconds"]

    @property
    def floor_seconds(self) -> float:
        sweep = 2 * self.shape.tokens * self.shape.codes * self.shape.dim
        return self.measured["sweeps"] * sweep / self.measured["operations_per_second"]

    @property
    def nanoseconds_per_logit(self) -> float:
        return 1e9 * self.seconds / self.shape.tokens / self.shape.codes

    @property
    def extra_mib(self) -> float:
        return self.measured["extra_bytes"] / 2**20


class _Column(NamedTuple):
    """A column of the full table; terminal: its heading in the narrower one, or None."""

    heading: str
    terminal: str | None
    cell: Callable[["Row"], str]


SHAPE_COLUMNS = [
    _Column("impl", "impl", lambda row: row.impl),
    _Column("dtype", "dtype", lambda row: row.shape.dtype),
    _Column("N", "N", lambda row: str(row.shape.tokens)),
    _Column("K", "K", lambda row: str(row.shape.codes)),
    _Column("D", "D", lambda row: str(row.shape.dim)),
]
COLUMNS = [
    _Column("forward, s", "forward s", lambda row: f"{row.measured['forward_seconds']:.3f}"),
    _Column("backward, s", "backward s", lambda row: f"{row.measured['backward_seconds']:.3f}"),
    _Column("both, s", "both s", lambda row: f"{row.seconds:.3f}"),
    _Column("processor, s", None, lambda row: f"{row.measured['processor_seconds']:.3f}"),
    _Column("ns per N x K", None, lambda row: f"{row.nanoseconds_per_logit:.2f}"),
    _Column("extra memory, MiB", "extra MiB", lambda row: f"{row.extra_mib:.0f}"),
    _Column("process in all, MiB", None, lambda row: f"{row.measured['process_bytes'] / 2**20:.0f}"),
    _Column("skipped, softmax / entropies", "   skipped    ", lambda row: _skipped(row.measured)),
    _Column("sweeps made", "sweeps", lambda row: f"{row.measured['sweeps']:.2f}"),
    _Column("matmul, GFLOP/s", None, lambda row: f"{row.measured['operations_per_second'] / 1e9:.0f}"),
    _Column("floor, s", None, lambda row: f"{row.floor_seconds:.3f}"),
    _Column("of matmul rate", "of rate", lambda row: f"{row.floor_seconds / row.seconds:.0%}"),
]


TERMINAL_COLUMNS = [column for column in SHAPE_COLUMNS + COLUMNS if column.terminal]
# Of the cross-entropy, which skips nothing.
CROSS_ENTROPY_COLUMNS = [column for column in TERMINAL_COLUMNS if not column.heading.startswith(("skipped", "sweeps"))]


@app.callback()
def bench() -> None:
    """Measure time and memory on this machine."""


@app.command()
def quantizer(
    context: typer.Context,
    tokens: Annotated[str, typer.Option(metavar="N,...", help="Vectors that are quantized at once.")] = "1024",
    codes: Annotated[str, typer.Option(metavar="K,...", help="Sizes of the codebook.")] = "16384,65536,262144",
    dim: Annotated[str, typer.Option(metavar="D,...", help="Numbers in a code.")] = "256",
    dtype: Annotated[str, typer.Option(metavar="TYPE,...", help="float32, bfloat16, float16.")] = "float32",
    impl: Annotated[
        str,
        typer.Option(
            metavar="IMPL,...", help="dense, chunked; on CUDA also triton, and attention (FlashAttention, as a peer)."
        ),
    ] = "dense,chunked",
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="CHECKOUT", help="Time the published quantizer too, from a checkout of TencentARC/SEED-Voken."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.md", help="New file for the full table; FILE.png goes beside it.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of the entropies; 0 leaves them out.")] = 0.01,
    scale: Annotated[
        float, typer.Option(help="z is normal(0, scale^2): the larger, the fewer codes take the weight.")
    ] = 1.0,
    no_skip: Annotated[bool, typer.Option("--no-skip", help="Visit all tiles, also those without weight.")] = False,
    tile: Annotated[
        str | None,
        typer.Option(metavar="TOKENS,CODES", help="Size of a tile.", show_default="what suits the device"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU.", show_default="all cores")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="The fastest counts.")] = 3,
) -> None:
    """Time and memory of index backpropagation, forward and backward.

    Several values are written with commas: every impl is measured at every shape, each in a fresh process. A row that
    does not fit into memory says so, and the table goes on.

    Example: ibq bench quantizer --codes 16384,262144 --impl dense,chunked
    """
    shapes = [
        Shape(*values)
        for values in product(
            _numbers("--tokens", tokens), _numbers("--codes", codes), _numbers("--dim", dim), _names("--dtype", dtype)
        )
    ]
    impls = _names("--impl", impl)
    if device not in ("auto", "cpu", "cuda"):
        raise _bad("--device", f"{device!r} is none of auto, cpu, cuda")
    if not 0 <= temperature < math.inf:
        raise _bad("--temperature", f"{temperature} is no number from 0 on; 0 leaves the entropies out")
    if not 0 < scale < 1e6:
        raise _bad("--scale", f"{scale} is no number above 0 and below a million")
    if tile is not None and len(_numbers("--tile", tile)) != 2:
        raise _bad("--tile", f"{tile!r} is not TOKENS,CODES, as in 1024,256")
    if reference is not None:
        impls.insert(0, "reference")
    reference_file = None if reference is None else _reference_file(reference)
    if out is not None:
        _check_out(out, ".png")

    machine = _run("machine", device=device, threads=threads, reference=reference_file)
    if "failed" in machine:
        raise _bad(None, machine["failed"])
    settings = dict(
        temperature=temperature or None,
        scale=scale,
        skip=not no_skip,
        tile=tile and _numbers("--tile", tile),
        device=machine["device"],
        threads=threads,
        repeats=repeats,
        reference=reference_file,
    )
    heading = [_machine_line(machine), *([_revision(reference)] if reference else []), f"`{_command(context)}`"]
    widths = _widths(impls, shapes)
    typer.echo("\n".join(heading[:-1]) + "\n\n" + _line([column.terminal for column in TERMINAL_COLUMNS], widths))
    rows = []
    for row in _rows(impls, shapes, settings):
        rows.append(row)
        typer.echo(_line(_cells(row, TERMINAL_COLUMNS), widths))
        if out is not None:
            out.write_text(_markdown(heading, rows), encoding="utf-8")
    typer.echo("\n".join(["", LEGEND, "", *_notes(rows)]).rstrip())
    if out is not None:
        typer.echo(f"\ntable: {out}")
        if any(row.measured for row in rows):
            _draw(rows, machine["name"], out.with_suffix(".png"))
            typer.echo(f"picture: {out.with_suffix('.png')}")


@app.command("cross-entropy")
def cross_entropy(
    tokens: Annotated[str, typer.Option(metavar="N,...", help="Tokens of a step.")] = "2048",
    codes: Annotated[str, typer.Option(metavar="K,...", help="Sizes of the vocabulary.")] = "262144",
    dim: Annotated[str, typer.Option(metavar="D,...", help="Width of the generator.")] = "1024",
    dtype: Annotated[str, typer.Option(metavar="TYPE,...", help="float32, bfloat16, float16.")] = "float32",
    impl: Annotated[
        str, typer.Option(metavar="IMPL,...", help="dense (PyTorch's own), chunked; on CUDA also liger.")
    ] = "dense,chunked",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU.", show_default="all cores")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="The fastest counts.")] = 1,
) -> None:
    """Time and memory of a generator's loss over all codes, forward and backward.

    Every impl is measured at every shape, each in a fresh process. Extra memory is the peak minus operands and
    gradients. dense at the default shape needs 7 GB.

    Example: ibq bench cross-entropy --codes 16384,262144
    """
    shapes = [
        Shape(*values)
        for values in product(
            _numbers("--tokens", tokens), _numbers("--codes", codes), _numbers("--dim", dim), _names("--dtype", dtype)
        )
    ]
    impls = _names("--impl", impl, CROSS_ENTROPY_IMPLS)
    if device not in ("auto", "cpu", "cuda"):
        raise _bad("--device", f"{device!r} is none of auto, cpu, cuda")
    machine = _run("machine", device=device, threads=threads, reference=None)
    if "failed" in machine:
        raise _bad(None, machine["failed"])
    settings = dict(module="cross_entropy", device=machine["device"], threads=threads, repeats=repeats)
    widths = dict(zip(TERMINAL_COLUMNS, _widths(impls, shapes), strict=True))
    widths = [widths[column] for column in CROSS_ENTROPY_COLUMNS]
    heading = _line([column.terminal for column in CROSS_ENTROPY_COLUMNS], widths)
    typer.echo(f"{_machine_line(machine)}\n\n{heading}")
    rows = []
    for row in _rows(impls, shapes, settings):
        rows.append(row)
        typer.echo(_line(_cells(row, CROSS_ENTROPY_COLUMNS), widths))
    typer.echo("\n".join(["", *_notes(rows)]).rstrip())


@app.command("data")
def data_stream(
    context: typer.Context,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Local tars: a folder or a pattern in quotes; each row goes over all of them.",
            show_default="2,048 pictures of scikit-image's photographs, made anew",
        ),
    ] = None,
    workers: Annotated[str, typer.Option(metavar="N,...", help="Loader workers; 0: none.")] = "0,1,2",
    world: Annotated[int, typer.Option(min=1, metavar="W", help="Ranks that bytes are counted for.")] = 4,
    image_size: Annotated[int, typer.Option(min=1, help="Side of the images, in pixels.")] = 256,
    seconds: Annotated[float, typer.Option(help="Least time of a repeat, which goes over all samples anyway.")] = 5.0,
    repeats: Annotated[int, typer.Option(min=1, help="The fastest counts.")] = 3,
    memory_batches: Annotated[
        int, typer.Option(help="Batches of 8 small images, over which the workers' memory is watched; 0 leaves it out.")
    ] = 10_000,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.md", help="New file for all tables; FILE.json and FILE.png go beside it."),
    ] = None,
) -> None:
    """Images per second, bytes and memory of the training stream.

    Beside it: the bound (decode and resize alone), webdataset, and ranks that decode all and keep each W-th. Every
    repeat of every row is a fresh process.

    Example: ibq bench data --workers 0,2,4 --out data.md
    """
    numbers = list(dict.fromkeys(_numbers("--workers", workers, least=0)))
    if not 0 < seconds < math.inf:
        raise _bad("--seconds", f"{seconds} is no number above 0")
    if memory_batches and memory_batches < 20:
        raise _bad("--memory-batches", f"{memory_batches} are too few for a slope: 20 at least, or 0 for none")
    if out is not None:
        _check_out(out, ".png", ".json")
    from tools.bench.data import Plan, compare

    plan = Plan(numbers, world, image_size, seconds, repeats, memory_batches)
    compare(data, plan, out, _command(context))


RECIPE_HELP = "A generator's recipe; or DEPTHxHEADS, B with other numbers of blocks and of heads of 64."
PublishedGenerator = Annotated[
    Path | None,
    typer.Option(metavar="CHECKOUT", help="Measure the published code too, from a checkout of TencentARC/SEED-Voken."),
]
Out = Annotated[
    Path | None, typer.Option(metavar="FILE.md", help="New file for the full table; FILE.png goes beside it.")
]
ProductType = Annotated[
    str | None, typer.Option(metavar="TYPE", help="Of products: float32 or bfloat16.", show_default="bfloat16 on CUDA")
]


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
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images at once.", show_default="4; on CUDA 64")] = None,
    guidance: Annotated[float, typer.Option(help="1: none, which halves the work.")] = 2.0,
    reference: PublishedGenerator = None,
    out: Out = None,
    dtype: ProductType = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU.", show_default="all cores")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="The fastest counts.")] = 2,
) -> None:
    """Images per second and memory of drawing a generator's codes.

    Every impl of every recipe is measured in a fresh process.

    Example: ibq bench sample --recipe 6x6,12x12 --reference SEED-Voken
    """
    from tools.bench.generator import compare_sampling

    compare_sampling(
        recipe=recipe,
        impl=impl,
        batch_size=batch_size,
        guidance=guidance,
        dtype=dtype,
        reference=reference,
        out=out,
        device=device,
        threads=threads,
        repeats=repeats,
        command=_command(context),
    )


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
    vocabulary: Annotated[str, typer.Option(metavar="V,...", help="Codes of it.")] = "16384,262144",
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Images of a step.", show_default="2; on CUDA 16")
    ] = None,
    reference: PublishedGenerator = None,
    out: Out = None,
    dtype: ProductType = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU.", show_default="all cores")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="The fastest counts.")] = 3,
) -> None:
    """Tokens per second, MFU and memory of a generator's training step.

    Every impl of every recipe is measured in a fresh process. A row that does not fit into memory says so, and the
    table goes on.

    Example: ibq bench train-ar --recipe 4x4 --vocabulary 262144 --reference SEED-Voken
    """
    from tools.bench.generator import compare_training

    compare_training(
        recipe=recipe,
        impl=impl,
        vocabulary=vocabulary,
        micro_batch=micro_batch,
        dtype=dtype,
        reference=reference,
        out=out,
        device=device,
        threads=threads,
        repeats=repeats,
        command=_command(context),
    )


def _rows(impls: list[str], shapes: list[Shape], settings: dict) -> Iterator[Row]:
    """Measures one row after the other, and says on stderr at which it is."""
    jobs = list(product(shapes, impls))
    for number, (shape, impl) in enumerate(jobs, start=1):
        if impl in NEED_CUDA and settings["device"] != "cuda":
            yield Row(impl, shape, None, "needs CUDA")
            continue
        doing = f"measuring row {number} of {len(jobs)}: {impl}, {shape}"
        with _saying(doing):
            answer = _run("measure", impl=impl, **shape._asdict(), **settings)
        failed = answer.pop("failed", None)
        yield Row(impl, shape, None, failed) if failed else Row(impl, shape, answer)


@contextlib.contextmanager
def _saying(doing: str) -> Iterator[None]:
    """A spinner on a terminal, else a line on stderr."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        typer.echo(doing, err=True)
    with console.status(doing) if console.is_terminal else contextlib.nullcontext():
        yield


def _run(job: str, *, module: str = "quantizer", **arguments) -> dict:
    """The answer of the module's `main` in a fresh process, or why there is none, as ``failed``.

    It imports from where this process does; with ``python -m`` the working directory would come first. Ctrl-C ends it
    without a traceback.
    """
    script = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
sys.path[:] = {sys.path!r}
from tools.bench.{module} import main
main()"""
    command = [sys.executable, "-c", script, job, json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode == -signal.SIGKILL:
        return {"failed": "killed, most likely for want of memory"}
    if done.returncode < 0:
        return {"failed": f"ended by {signal.Signals(-done.returncode).name}"}
    if done.returncode > 0:
        return {"failed": f"its process ended with status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def _skipped(measured: dict) -> str:
    rates = [measured["skip_soft"], measured["skip_entropy"]]
    return "-" if rates == [None, None] else " / ".join("-" if rate is None else f"{rate:.1%}" for rate in rates)


def _cells(row: Row, columns: list[_Column]) -> list[str]:
    """Its numbers; where there are none, the reason and nothing more."""
    if row.measured is not None:
        return [column.cell(row) for column in columns]
    return [*(column.cell(row) for column in SHAPE_COLUMNS), f"not measured: {row.reason}"]


def _widths(impls: list[str], shapes: list[Shape]) -> list[int]:
    rows = [Row(impl, shape, None) for impl in impls for shape in shapes]
    of_shapes = [max(len(column.cell(row)) for row in rows) for column in SHAPE_COLUMNS]
    # Measured ones are not known yet: 7 places hold 999.999 seconds.
    widths = of_shapes + [7] * (len(TERMINAL_COLUMNS) - len(of_shapes))
    return [max(width, len(column.terminal)) for width, column in zip(widths, TERMINAL_COLUMNS, strict=True)]


def _line(cells: list[str], widths: list[int]) -> str:
    """Names to the left, numbers to the right; what is said instead of numbers may be as long as it is."""
    numbers = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=False)]
    return "  ".join([cells[0].ljust(widths[0]), cells[1].ljust(widths[1]), *numbers])


def _markdown(heading: list[str], rows: list[Row]) -> str:
    columns = SHAPE_COLUMNS + COLUMNS
    lines = ["| " + " | ".join(column.heading for column in columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [cell.replace("|", "/") for cell in _cells(row, columns)]
        lines.append("| " + " | ".join(cells + ["-"] * (len(columns) - len(cells))) + " |")
    notes = [f"- {note}" for note in _notes(rows) if note]
    parts = ["# Index backpropagation", "\n\n".join(heading), "\n".join(lines), "\n".join(notes), LONG_LEGEND]
    return "\n\n".join(part for part in parts if part) + "\n"


def _notes(rows: list[Row]) -> list[str]:
    """What the numbers say: the tiled impls beside those that hold all logits, and whose attention it was."""
    measured = {(row.impl, row.shape): row for row in rows if row.measured}
    notes = []
    for (impl, shape), row in measured.items():
        for base in ("dense", "reference"):
            if impl in ("chunked", "triton", "liger") and (base, shape) in measured:
                other = measured[base, shape]
                times = f"{_share(row.seconds / other.seconds)} of {base}'s time"
                memory = ""
                if row.extra_mib and other.extra_mib:
                    memory = f", {_share(row.extra_mib / other.extra_mib)} of its extra memory"
                notes.append(f"{shape}: {impl} takes {times}{memory}")
    kernels = sorted({row.measured["kernel"] for row in measured.values() if row.measured["kernel"]})
    return notes + [f"attention: {kernel}" for kernel in kernels]


def _share(ratio: float) -> str:
    return f"1/{1 / ratio:.0f}" if ratio < 0.1 else f"{ratio:.2f}"


def _draw(rows: list[Row], machine: str, path: Path) -> None:
    """Bars over K: time per N x K and extra memory, for every impl and what else differs between rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    varying = [name for name in ("tokens", "dim", "dtype") if len({getattr(row.shape, name) for row in rows}) > 1]

    def label(row: Row) -> str:
        letters = {"tokens": "N ", "dim": "D ", "dtype": ""}
        return ", ".join([row.impl, *(f"{letters[name]}{getattr(row.shape, name)}" for name in varying)])

    labels = list(dict.fromkeys(label(row) for row in rows))
    sizes = sorted({row.shape.codes for row in rows})
    width = 0.85 / len(labels)
    small = {"fontsize": 8 if len(labels) * len(sizes) <= 16 else 5}
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    values = (
        ("time, ns per N x K", lambda row: row.nanoseconds_per_logit),
        ("extra memory, MiB", lambda row: row.extra_mib),
    )
    for axis, (title, value) in zip(axes, values, strict=True):
        # A logarithmic axis has no 0: bars stand on the power of ten below half the smallest, 1 MiB at least.
        smallest = min(max(value(row), 1) for row in rows if row.measured)
        floor = 10 ** math.floor(math.log10(smallest / 2))
        for place, name in enumerate(labels):
            own = [row for row in rows if label(row) == name]
            of_impl = [other for other in labels if other.partition(",")[0] == own[0].impl]
            at = [sizes.index(row.shape.codes) + (place - (len(labels) - 1) / 2) * width for row in own]
            heights = [max(value(row), 1) if row.measured else math.nan for row in own]
            texts = [_bar_text(value(row)) if row.measured else "" for row in own]
            shade = 1 - 0.7 * of_impl.index(name) / len(of_impl)
            bars = axis.bar(at, heights, width * 0.92, label=name, color=COLORS[own[0].impl], alpha=shade)
            axis.bar_label(bars, texts, **small)
            for row, x in zip(own, at, strict=True):
                if not row.measured:
                    where = {"transform": axis.get_xaxis_transform(), "rotation": 90, "ha": "center", "va": "bottom"}
                    axis.text(x, 0.02, "not measured", color="gray", **where, **small)
        axis.set_yscale("log")
        axis.set_ylim(floor, axis.get_ylim()[1] * 1.5)
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.yaxis.set_minor_formatter("")
        axis.set_xlim(-0.5, len(sizes) - 0.5)
        axis.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
        axis.set_xlabel("K, codes")
        axis.set_title(title, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    shape = rows[0].shape
    shown = {"tokens": f"N {shape.tokens:,}", "dim": f"D {shape.dim}", "dtype": shape.dtype}
    same = [text for name, text in shown.items() if name not in varying]
    about = "; ".join([", ".join(same), machine] if same else [machine])
    figure.suptitle(f"Index backpropagation, forward and backward ({about}). Lower is better.", fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _bar_text(value: float) -> str:
    if value < 1:
        return "<1"
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _machine_line(machine: dict) -> str:
    name = machine["name"] if machine["device"] == "cuda" else f"{machine['name']}, {machine['threads']} threads"
    return f"{datetime.now(timezone.utc):%Y-%m-%d}: {name}; PyTorch {machine['torch']}, Python {machine['python']}"


def _revision(reference: Path) -> str:
    """The checkout's commit, where it is a git checkout."""
    revision = "revision unknown"
    if (reference / ".git").exists():
        command = ["git", "-C", str(reference), "describe", "--always", "--dirty"]
        revision = subprocess.run(command, capture_output=True, text=True).stdout.strip() or revision
    return f"reference: {reference} ({revision})"


def _command(context: typer.Context) -> str:
    """The command line, as it would be typed."""
    words = ["ibq", "bench", context.info_name]
    for option in context.command.params:
        if context.get_parameter_source(option.name).name == "COMMANDLINE":
            value = context.params[option.name]
            words += [option.opts[0]] if value is True else [option.opts[0], str(value)]
    return shlex.join(words)


def _numbers(option: str, text: str, least: int = 1) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [least - 1]
    if min(numbers) < least:
        wanted = "above 0, as in 1024,4096" if least else "from 0 on, as in 0,2,4"
        raise _bad(option, f"{text!r} is no list of whole numbers {wanted}")
    return numbers


def _names(option: str, text: str, impls: tuple[str, ...] = IMPLS) -> list[str]:
    choices = {"--impl": impls, "--dtype": DTYPES}[option]
    names = text.split(",")
    for name in names:
        if name not in choices:
            raise _bad(option, f"{name!r} is none of {', '.join(choices)}")
    return names


def _reference_file(checkout: Path, file: Path = REFERENCE_FILE) -> str:
    path = checkout / file
    if not path.is_file():
        mend = "git clone https://github.com/TencentARC/SEED-Voken, and give that folder"
        raise _bad("--reference", f"{checkout} holds no {file}: {mend}")
    return str(path.resolve())


def _check_out(out: Path, *beside: str) -> None:
    """Before hours of measuring: the files can be written, and nothing is overwritten. beside: their suffixes."""
    if out.suffix != ".md":
        raise _bad("--out", f"{out} does not end in .md")
    for path in (out, *map(out.with_suffix, beside)):
        if path.exists():
            raise _bad("--out", f"{path} is there already: choose another name")
    if not os.access(out.parent, os.W_OK):
        raise _bad("--out", f"{out.parent} is no folder that can be written to")


def _bad(option: str | None, message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint=option)
