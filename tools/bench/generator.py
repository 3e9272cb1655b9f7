"""`ibq bench sample` and `ibq bench train-ar`: a generator's speed and memory, beside the published code's."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import NamedTuple

import typer

from model_zoo.config import TransformerConfig
from model_zoo.transformer import flops_per_token
from tools.bench import command as bench
from tools.bench.data import Table, _markdown_table
from trainer.config import GeneratorRun
from trainer.recipes import load_recipe

REFERENCE_FILE = Path("src/IBQ/modules/transformer/llama.py")
DTYPES = ("float32", "bfloat16")
PACKAGES = ("flash-attn", "liger-kernel", "apex")  # that are used on CUDA where they are installed
NOT_ON_CPU = {"cached-eager": "without CUDA there are no graphs, and it is the same as cached"}
COLORS = {
    "reference": "#7a7a7a",
    "uncached": "#c44e52",
    "dense": "#c44e52",
    "cached": "#4c72b0",
    "ibq": "#4c72b0",
    "cached-eager": "#8fa9d4",
    "compiled": "#2f4b7c",
    "checkpointed": "#55a868",
    "selective": "#dd8452",
}
SAMPLE_LEGEND = """\
Each row is a fresh process, its weights are normal(0, 0.02^2). A batch is drawn to warm up, and then the repeats, of
which the fastest counts; all draw the same number of whole images, without top-k and top-p. Extra memory is the peak of
the process (on CUDA: of what PyTorch allocates on the device) minus the weights; on the CPU that of compiled holds the
compiler too. CPU s: in all threads; far below threads x time it says that others used the machine.

cached: as `ibq sample` draws, keys and values kept, on CUDA with captured graphs; cached-eager: without graphs;
compiled: those by torch.compile. uncached: a forward over all codes so far for each new one, the head on the last
position alone. reference: TencentARC/SEED-Voken's own transformer and sampling, which keep keys and values too, eager,
in float32: under autocast its cache takes no values."""
TRAIN_LEGEND = """\
Each row is a fresh process. A step is forward, loss, backward and AdamW on random codes, with dropout; weights and
moments are fp32, products in the row's type by autocast. Two steps warm up, and then the fastest repeat counts. MFU:
three forwards' operations at the rate of a plain matrix product, measured in the same process, as a share of the time.
Extra memory is the peak of the process (on CUDA: of what PyTorch allocates on the device) minus weights, moments and
gradients. CPU s: in all threads; far below threads x time it says that others used the machine.

ibq: as `ibq train` does it, the loss without logits, fused AdamW; compiled: each block by torch.compile; checkpointed,
selective: each block computes all, or what is cheap, again for the backward; dense: with all logits. reference:
TencentARC/SEED-Voken's own transformer, PyTorch's cross-entropy of its logits, AdamW that is not fused."""


class Kind(NamedTuple):
    """One of the two benchmarks. job: of `tools.bench.generator_rows`; unit, per: what speed and time are of; did: of
    the units, in notes; bases: the impls that others are compared with."""

    job: str
    title: str
    unit: str
    per: str
    did: str
    impls: tuple[str, ...]
    bases: tuple[str, ...]
    legend: str


SAMPLE = Kind(
    job="sample",
    title="Sampling images' codes",
    unit="images",
    per="batch",
    did="draws",
    impls=("uncached", "cached-eager", "cached", "compiled"),
    bases=("uncached", "reference"),
    legend=SAMPLE_LEGEND,
)
TRAIN = Kind(
    job="train",
    title="Training a generator",
    unit="tokens",
    per="step",
    did="trains on",
    impls=("dense", "ibq", "compiled", "checkpointed", "selective"),
    bases=("dense", "reference"),
    legend=TRAIN_LEGEND,
)


class Shape(NamedTuple):
    """What rows are compared at. recipe: its name or DEPTHxHEADS; units: of a batch or step."""

    recipe: str
    model: TransformerConfig
    units: int

    def __str__(self) -> str:
        return f"{self.recipe}, V {self.model.vocabulary:,}"


class Row(NamedTuple):
    """measured: the fields of `tools.bench.generator_rows.Measured`, or None, and then why there are none."""

    impl: str
    shape: Shape
    dtype: str
    measured: dict | None
    reason: str = ""

    @property
    def speed(self) -> float:
        """Units per second."""
        return self.shape.units / self.measured["seconds"]

    @property
    def mfu(self) -> float:
        """Of training, whose units are tokens."""
        return 3 * flops_per_token(self.shape.model) * self.speed / self.measured["operations_per_second"]

    @property
    def extra_mib(self) -> float:
        return self.measured["extra_bytes"] / 2**20

    @property
    def peak_mib(self) -> float:
        return self.measured["process_bytes"] / 2**20


def compare_sampling(
    *, recipe: str | None, impl: str | None, batch_size: int | None, guidance: float, **common
) -> None:
    """`ibq bench sample`; common: see `_compare`."""
    if not 1 <= guidance < math.inf:
        raise bench._bad("--guidance", f"{guidance} is no number from 1 on; 1 is none")
    impls = impl and bench._names("--impl", impl, SAMPLE.impls)

    def plan(cuda: bool) -> tuple[list[str], list[Shape], dict]:
        batch = batch_size or (64 if cuda else 4)
        models = _models(recipe or ("ar_b,ar_l,ar_xl,ar_xxl" if cuda else "6x6"))
        shapes = [Shape(name, model, batch) for name, model in models.items()]
        usual = ["uncached", "cached-eager", "cached"] if cuda else ["uncached", "cached"]
        return impls or usual, shapes, dict(batch_size=batch, guidance=guidance)

    _compare(SAMPLE, plan, **common)


def compare_training(
    *, recipe: str | None, impl: str | None, vocabulary: str, micro_batch: int | None, **common
) -> None:
    """`ibq bench train-ar`; common: see `_compare`."""
    sizes = bench._numbers("--vocabulary", vocabulary)
    impls = impl and bench._names("--impl", impl, TRAIN.impls)

    def plan(cuda: bool) -> tuple[list[str], list[Shape], dict]:
        batch = micro_batch or (16 if cuda else 2)
        models = _models(recipe or ("ar_xl,ar_xxl" if cuda else "4x4"))
        shapes = []
        for (name, model), size in product(models.items(), sizes):
            model = TransformerConfig(**{**asdict(model), "vocabulary": size})
            shapes.append(Shape(name, model, batch * model.tokens))
        return impls or list(TRAIN.impls), shapes, dict(micro_batch=batch)

    _compare(TRAIN, plan, **common)


def _models(names: str) -> dict[str, TransformerConfig]:
    """Of recipes, or DEPTHxHEADS: the published B with other numbers of blocks and heads. Raises TrainerError."""
    models = {}
    for name in names.split(","):
        if numbers := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name):
            models[name] = TransformerConfig(depth=int(numbers[1]), heads=int(numbers[2]))
            continue
        run = load_recipe(name, [])
        if not isinstance(run, GeneratorRun):
            raise bench._bad("--recipe", f"{name} is no generator's: give one of ar_b ... ar_xxl, or DEPTHxHEADS")
        models[name] = run.model
    return models


def _compare(
    kind: Kind,
    plan: Callable[[bool], tuple[list[str], list[Shape], dict]],
    *,
    dtype: str | None,
    reference: Path | None,
    out: Path | None,
    device: str,
    threads: int | None,
    repeats: int,
    command: str,
) -> None:
    """Measures all rows, prints them, and writes them to `out` and beside it. plan(cuda): impls, shapes, and the job's
    further arguments."""
    if device not in ("auto", "cpu", "cuda"):
        raise bench._bad("--device", f"{device!r} is none of auto, cpu, cuda")
    if dtype not in (None, *DTYPES):
        raise bench._bad("--dtype", f"{dtype!r} is none of {', '.join(DTYPES)}")
    file = None if reference is None else bench._reference_file(reference, REFERENCE_FILE)
    if out is not None:
        bench._check_out(out, ".png")
    machine = _run("machine", device=device, threads=threads, reference=file)
    if "failed" in machine:
        raise bench._bad(None, machine["failed"])
    cuda = machine["device"] == "cuda"
    impls, shapes, settings = plan(cuda)
    settings |= dict(device=machine["device"], threads=threads, repeats=repeats, reference=file)
    heading = [bench._machine_line(machine)]
    if cuda:
        heading.append(_packages())
    if reference is not None:
        heading.append(bench._revision(reference))
    impls = (["reference"] if reference else []) + [impl for impl in kind.impls if impl in impls]  # bases first
    report = Report(kind, [*heading, f"`{command}`"], [])
    headings = _headings(kind)
    widths = [max(6, len(text)) for text in headings]
    widths[:2] = max(map(len, impls)), max(map(len, ["recipe", *(shape.recipe for shape in shapes)]))
    typer.echo("\n".join([*heading, "", bench._line(headings, widths)]))
    for row in _rows(kind, impls, shapes, dtype or ("bfloat16" if cuda else "float32"), settings):
        report.rows.append(row)
        typer.echo(bench._line(report.cells(row), widths))
        if out is not None:
            out.write_text(report.markdown(out.with_suffix(".png").name), encoding="utf-8")
    typer.echo("\n".join(["", kind.legend, "", *report.notes()]).rstrip())
    if out is not None:
        typer.echo(f"\ntable: {out}")
        if any(row.measured for row in report.rows):
            _draw(report, machine["name"], out.with_suffix(".png"))
            typer.echo(f"picture: {out.with_suffix('.png')}")


_run = partial(bench._run, module="generator_rows")


def _rows(kind: Kind, impls: list[str], shapes: list[Shape], dtype: str, settings: dict) -> Iterator[Row]:
    """Measures one row after the other, and says on stderr at which it is."""
    jobs = list(product(shapes, impls))
    for number, (shape, impl) in enumerate(jobs, start=1):
        if impl in NOT_ON_CPU and settings["device"] == "cpu":
            yield Row(impl, shape, dtype, None, NOT_ON_CPU[impl])
            continue
        own_dtype = "float32" if (kind.job, impl) == ("sample", "reference") else dtype  # it cannot do otherwise
        with bench._saying(f"measuring row {number} of {len(jobs)}: {impl}, {shape}"):
            answer = _run(kind.job, impl=impl, model=asdict(shape.model), dtype=own_dtype, **settings)
        failed = answer.pop("failed", None)
        yield Row(impl, shape, own_dtype, None if failed else answer, failed or "")


class Report(NamedTuple):
    """All that was found so far."""

    kind: Kind
    heading: list[str]
    rows: list[Row]

    def times(self, row: Row, base: str) -> float | None:
        """How many times the base's speed a row's is; None where the base was not measured."""
        bases = [other for other in self.rows if (other.impl, other.shape) == (base, row.shape) and other.measured]
        return row.speed / bases[0].speed if bases else None

    def cells(self, row: Row) -> list[str]:
        """Its numbers; where there are none, the reason and nothing more."""
        names = [row.impl, row.shape.recipe, f"{row.shape.model.vocabulary}", row.dtype]
        if row.measured is None:
            return [*names, f"not measured: {row.reason}"]
        training = self.kind is TRAIN
        times = [self.times(row, base) for base in self.kind.bases]
        return [
            *names,
            f"{row.speed:.0f}" if training else f"{row.speed:.3f}",
            *([f"{row.mfu:.1%}"] if training else []),
            f"{row.measured['seconds']:.3f}",
            f"{row.measured['processor_seconds']:.3f}",
            f"{row.extra_mib:.0f}",
            f"{row.peak_mib:.0f}",
            *("-" if ratio is None else f"{ratio:.2f}" for ratio in times),
        ]

    def notes(self) -> list[str]:
        """What the numbers say: the rows that are no base beside those that are."""
        notes = []
        for row in self.rows:
            if not row.measured or row.impl in self.kind.bases:
                continue
            for base in self.kind.bases:
                if (ratio := self.times(row, base)) is not None:
                    units = f"{ratio:.2f} times the {self.kind.unit} of {base} per second"
                    notes.append(f"{row.shape}: {row.impl} {self.kind.did} {units}{self._memory(row, base)}")
        return notes

    def _memory(self, row: Row, base: str) -> str:
        other = next(one for one in self.rows if (one.impl, one.shape) == (base, row.shape))
        if not row.extra_mib or not other.extra_mib:
            return ""
        ratio = row.extra_mib / other.extra_mib
        share = f"{bench._share(ratio)} of" if ratio < 1 else f"{ratio:.2f} times"
        return f", with {share} its extra memory"

    def markdown(self, picture: str) -> str:
        table = _markdown_table(Table(tuple(_headings(self.kind)), [self.cells(row) for row in self.rows]))
        notes = "\n".join(f"- {note}" for note in self.notes())
        parts = [
            f"# {self.kind.title}",
            *self.heading,
            table,
            notes,
            self.kind.legend,
            f"![Speed and memory]({picture})",
        ]
        return "\n\n".join(part for part in parts if part) + "\n"


def _headings(kind: Kind) -> list[str]:
    speed = [f"{kind.unit}/s", *(["MFU"] if kind is TRAIN else []), f"s/{kind.per}", "CPU s"]
    return [*("impl", "recipe", "V", "dtype"), *speed, "extra MiB", "peak MiB", *(f"x {base}" for base in kind.bases)]


def _packages() -> str:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return "packages: " + ", ".join(found)


def _draw(report: Report, machine: str, path: Path) -> None:
    """Bars of speed and of extra memory, for each shape a line of both."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kind, rows = report.kind, report.rows
    shapes = list(dict.fromkeys(str(row.shape) for row in rows))
    impls = list(dict.fromkeys(row.impl for row in rows))
    size = 11, 0.9 + len(shapes) * (0.8 + 0.3 * len(impls))
    figure, axes = pyplot.subplots(len(shapes), 2, figsize=size, layout="constrained", squeeze=False)
    values = (
        (f"{kind.unit} per second (higher is better)", lambda row: row.speed),
        ("extra memory, MiB (lower is better)", lambda row: row.extra_mib),
    )
    for shape, pair in zip(shapes, axes, strict=True):
        own = [row for row in rows if str(row.shape) == shape]
        for axis, (title, value) in zip(pair, values, strict=True):
            lengths = [value(row) if row.measured else 0 for row in own]
            texts = [
                _bar_text(length) if row.measured else "not measured" for row, length in zip(own, lengths, strict=True)
            ]
            bars = axis.barh([row.impl for row in own], lengths, 0.75, color=[COLORS[row.impl] for row in own])
            axis.bar_label(bars, texts, padding=3, fontsize=8)
            axis.invert_yaxis()
            axis.margins(x=0.15)
            axis.set_title(f"{shape}: {title}", loc="left", fontsize=9)
            axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{kind.title} ({rows[-1].dtype}; {machine})", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _bar_text(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
