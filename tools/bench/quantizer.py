"""`ibq bench quantizer` and `ibq bench cross-entropy`: time and memory of the two operations over all codes."""

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import NamedTuple

from tools.bench import common
from tools.bench.common import Options, bad, names, numbers

IMPLS = ("dense", "chunked", "triton", "attention")
CROSS_ENTROPY_IMPLS = ("dense", "chunked", "liger")
NEED_CUDA = ("triton", "attention", "liger")
DTYPES = ("float32", "bfloat16", "float16")
REFERENCE_FILE = Path("src/IBQ/modules/vqvae/quantize.py")
REFERENCE_CLASS = "IndexPropagationQuantize"
LEGEND = """\
skipped: tiles skipped in the gradients of the softmax / of the entropies. sweeps: products of all tokens with all codes
that were computed. of rate: their time at the rate of a plain matrix product, as a share of the measured time."""
LONG_LEGEND = """\
Each row is measured in a fresh process. z is normal(0, scale^2), the codebook normal(0, 1), as at the start of
training. The loss uses the quantized vectors and, unless the temperature is 0, both entropies. Times are those of the
fastest repeat; processor time far below threads x time means that other programs used the machine. Extra memory is the
peak of the process (on CUDA: of what PyTorch allocates on the device) minus operands and gradients, in the first
repeat.

A sweep is one product of all tokens with all codes, 2 N K D operations. Skipped tiles are not counted. The floor is the
time of these sweeps at the rate of a plain matrix product, measured in the same process.

reference: TencentARC/SEED-Voken's own quantizer, z as images of 16 x 16 tokens, with its VQ losses, which take two more
sweeps. attention: q = z, k = v = codebook; the same softmax and its gradients, without choosing codes and without
entropies."""


class Shape(NamedTuple):
    """What rows are compared at."""

    tokens: int
    codes: int
    dim: int
    dtype: str

    def __str__(self) -> str:
        return f"N {self.tokens:,}, K {self.codes:,}, D {self.dim}, {self.dtype}"


class Row(NamedTuple):
    """measured: the fields of `tools.bench.measure.Measured`, or None and the reason."""

    impl: str
    shape: Shape
    measured: dict | None = None
    reason: str = ""

    @property
    def arguments(self) -> dict:
        return self.shape._asdict()

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


class Column(NamedTuple):
    """A column of the full table. terminal: its heading in the narrower one, or None."""

    heading: str
    terminal: str | None
    cell: Callable[[Row], str]


def _skipped(row: Row) -> str:
    rates = [row.measured["skip_soft"], row.measured["skip_entropy"]]
    return "-" if rates == [None, None] else " / ".join("-" if rate is None else f"{rate:.1%}" for rate in rates)


SHAPE_COLUMNS = [
    Column("impl", "impl", lambda row: row.impl),
    Column("dtype", "dtype", lambda row: row.shape.dtype),
    Column("N", "N", lambda row: str(row.shape.tokens)),
    Column("K", "K", lambda row: str(row.shape.codes)),
    Column("D", "D", lambda row: str(row.shape.dim)),
]
SKIPPED = Column("skipped, softmax / entropies", "   skipped    ", _skipped)
SWEEPS = Column("sweeps computed", "sweeps", lambda row: f"{row.measured['sweeps']:.2f}")
COLUMNS = [
    Column("forward, s", "forward s", lambda row: f"{row.measured['forward_seconds']:.3f}"),
    Column("backward, s", "backward s", lambda row: f"{row.measured['backward_seconds']:.3f}"),
    Column("both, s", "both s", lambda row: f"{row.seconds:.3f}"),
    Column("processor, s", None, lambda row: f"{row.measured['processor_seconds']:.3f}"),
    Column("ns per N x K", None, lambda row: f"{row.nanoseconds_per_logit:.2f}"),
    Column("extra memory, MiB", "extra MiB", lambda row: f"{row.extra_mib:.0f}"),
    Column("peak of the process, MiB", None, lambda row: f"{row.measured['process_bytes'] / 2**20:.0f}"),
    SKIPPED,
    SWEEPS,
    Column("matmul, GFLOP/s", None, lambda row: f"{row.measured['operations_per_second'] / 1e9:.0f}"),
    Column("floor, s", None, lambda row: f"{row.floor_seconds:.3f}"),
    Column("of matmul rate", "of rate", lambda row: f"{row.floor_seconds / row.seconds:.0%}"),
]


def compare_quantizers(
    shapes: list[Shape],
    impls: list[str],
    options: Options,
    *,
    temperature: float,
    scale: float,
    skip: bool,
    tile: str | None,
) -> None:
    """`ibq bench quantizer`: measures every impl at every shape, prints the table, and writes it to a file."""
    if not 0 <= temperature < math.inf:
        raise bad("--temperature", f"{temperature} is not a finite number >= 0 (0 leaves the entropies out)")
    if not 0 < scale < 1e6:
        raise bad("--scale", f"{scale} is not a number above 0 and below a million")
    tile_size = tile and numbers("--tile", tile)
    if tile_size and len(tile_size) != 2:
        raise bad("--tile", f"{tile!r} is not TOKENS,CODES, as in 1024,256")
    prepared = common.prepare(options, REFERENCE_FILE, (REFERENCE_CLASS,))
    rows = _planned([*(["reference"] if prepared.reference else []), *impls], shapes, prepared.device)
    settings = dict(temperature=temperature or None, scale=scale, skip=skip, tile=tile_size)
    settings |= dict(reference=prepared.reference)
    measured = common.measure_rows("quantizer_rows", "measure", rows, prepared, **settings)
    report = Report(prepared.heading, rows, SHAPE_COLUMNS + COLUMNS, LEGEND, options.command, prepared.name)
    common.present(report, measured, options.out)


def compare_cross_entropies(shapes: list[Shape], impls: list[str], options: Options) -> None:
    """`ibq bench cross-entropy`: measures every impl at every shape and prints the table."""
    prepared = common.prepare(options)
    rows = _planned(impls, shapes, prepared.device)
    columns = SHAPE_COLUMNS + [column for column in COLUMNS if column not in (SKIPPED, SWEEPS)]
    measured = common.measure_rows("quantizer_rows", "cross_entropy", rows, prepared)
    common.present(Report(prepared.heading, rows, columns), measured, None)


def parse_shapes(tokens: str, codes: str, dim: str, dtype: str) -> list[Shape]:
    """Every combination of the options' values. Raises BadParameter."""
    sizes = numbers("--tokens", tokens), numbers("--codes", codes), numbers("--dim", dim)
    return [Shape(*values) for values in product(*sizes, names("--dtype", dtype, DTYPES))]


def _planned(impls: list[str], shapes: list[Shape], device: str) -> list[Row]:
    missing = NEED_CUDA if device != "cuda" else ()
    return [Row(impl, shape, reason="needs CUDA" * (impl in missing)) for shape in shapes for impl in impls]


class Report:
    """The table of all rows measured so far. planned: all rows, which decide the widths of columns."""

    def __init__(
        self,
        heading: list[str],
        planned: list[Row],
        columns: list[Column],
        legend: str = "",
        command: str = "",
        machine: str = "",
    ):
        self.heading, self.columns, self.legend = heading, columns, legend
        self.command, self.machine = command, machine
        self.shown = [column for column in columns if column.terminal]
        self.headings = [column.terminal for column in self.shown]
        of_shapes = [max(len(column.cell(row)) for row in planned) for column in SHAPE_COLUMNS]
        # 7 characters hold 999.999 seconds.
        least = of_shapes + [7] * (len(self.shown) - len(of_shapes))
        self.widths = [max(width, len(text)) for width, text in zip(least, self.headings, strict=True)]
        self.rows: list[Row] = []

    def cells(self, row: Row) -> list[str]:
        return _cells(row, self.shown)

    def markdown(self, picture: str) -> str:
        headings = [column.heading for column in self.columns]
        table = common.Table(headings, [_cells(row, self.columns) for row in self.rows])
        return common.markdown_page("Index backpropagation", self, [table], LONG_LEGEND)

    def notes(self) -> list[str]:
        """Ratios of the tiled impls to those that hold all logits, and the attention kernel."""
        measured = {(row.impl, row.shape): row for row in self.rows if row.measured}
        notes = []
        for (impl, shape), row in measured.items():
            for base in ("dense", "reference"):
                if impl in ("chunked", "triton", "liger") and (base, shape) in measured:
                    other = measured[base, shape]
                    times = f"{common.share(row.seconds / other.seconds)} of {base}'s time"
                    memory = ""
                    if row.extra_mib and other.extra_mib:
                        memory = f", {common.share(row.extra_mib / other.extra_mib)} of its extra memory"
                    notes.append(f"{shape}: {impl} takes {times}{memory}")
        kernels = sorted({row.measured["kernel"] for row in measured.values() if row.measured["kernel"]})
        return notes + [f"attention: {kernel}" for kernel in kernels]

    def draw(self, path: Path) -> None:
        """Bars over K: time per N x K and extra memory, for every impl and whatever else differs between rows."""
        rows = self.rows
        varying = [name for name in ("tokens", "dim", "dtype") if len({getattr(row.shape, name) for row in rows}) > 1]
        figure, axes = common.pyplot().subplots(1, 2, figsize=(11, 4.6), layout="constrained")
        _draw_bars(axes[0], rows, varying, "time, ns per N x K", lambda row: row.nanoseconds_per_logit)
        _draw_bars(axes[1], rows, varying, "extra memory, MiB", lambda row: row.extra_mib)
        shape = rows[0].shape
        shown = {"tokens": f"N {shape.tokens:,}", "dim": f"D {shape.dim}", "dtype": shape.dtype}
        same = [text for name, text in shown.items() if name not in varying]
        about = "; ".join([", ".join(same), self.machine] if same else [self.machine])
        figure.suptitle(f"Index backpropagation, forward and backward ({about}). Lower is better.", fontsize=10)
        handles = axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
        common.save(figure, path)


def _cells(row: Row, columns: list[Column]) -> list[str]:
    """The row's numbers, or the reason why it has none."""
    if row.measured is not None:
        return [column.cell(row) for column in columns]
    return [*(column.cell(row) for column in SHAPE_COLUMNS), f"not measured: {row.reason}"]


def _draw_bars(axis, rows: list[Row], varying: list[str], title: str, value: Callable[[Row], float]) -> None:
    """A group of bars for each K on a logarithmic axis."""

    def label(row: Row) -> str:
        letters = {"tokens": "N ", "dim": "D ", "dtype": ""}
        return ", ".join([row.impl, *(f"{letters[name]}{getattr(row.shape, name)}" for name in varying)])

    labels = list(dict.fromkeys(map(label, rows)))
    sizes = sorted({row.shape.codes for row in rows})
    width = 0.85 / len(labels)
    small = {"fontsize": 8 if len(labels) * len(sizes) <= 16 else 5}
    for place, name in enumerate(labels):
        own = [row for row in rows if label(row) == name]
        of_impl = [other for other in labels if other.partition(",")[0] == own[0].impl]
        at = [sizes.index(row.shape.codes) + (place - (len(labels) - 1) / 2) * width for row in own]
        heights = [max(value(row), 1) if row.measured else math.nan for row in own]
        shade = 1 - 0.7 * of_impl.index(name) / len(of_impl)
        bars = axis.bar(at, heights, width * 0.92, label=name, color=common.COLORS[own[0].impl], alpha=shade)
        axis.bar_label(bars, [common.bar_text(value(row)) if row.measured else "" for row in own], **small)
        for row, x in zip(own, at, strict=True):
            if not row.measured:
                where = {"transform": axis.get_xaxis_transform(), "rotation": 90, "ha": "center", "va": "bottom"}
                axis.text(x, 0.02, "not measured", color="gray", **where, **small)
    # A logarithmic axis has no 0: bars start at the power of ten below half the smallest value, which counts as >= 1.
    smallest = min(max(value(row), 1) for row in rows if row.measured)
    axis.set_yscale("log")
    axis.set_ylim(10 ** math.floor(math.log10(smallest / 2)), axis.get_ylim()[1] * 1.5)
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.yaxis.set_minor_formatter("")
    axis.set_xlim(-0.5, len(sizes) - 0.5)
    axis.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
    axis.set_xlabel("K, codes")
    axis.set_title(title, loc="left")
