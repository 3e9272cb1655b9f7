"""`ibq bench sample` and `ibq bench train-ar`: a generator's speed and memory, beside the published code's."""

import math
import re
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

from model_zoo.config import TransformerConfig
from model_zoo.transformer import flops_per_token
from tools.bench import common
from tools.bench.common import Options, Prepared, bad, names, numbers
from trainer.config import GeneratorRun
from trainer.evaluation.provenance import installed_version
from trainer.recipes import load_recipe

REFERENCE_FILE = Path("src/IBQ/modules/transformer/llama.py")
REFERENCE_NAMES = ("GPT", "sample_IBQ")
PACKAGES = ("flash-attn", "liger-kernel", "apex")  # used on CUDA if installed
NOT_ON_CPU = {"cached-eager": "the same as cached on a CPU, which has no graphs"}
SAMPLE_LEGEND = """\
Each row is a fresh process with weights normal(0, 0.02^2). One batch warms up, then the fastest repeat counts; all
rows sample the same number of whole images, without top-k and top-p. Extra memory is the peak of the process (on
CUDA: of what PyTorch allocates on the device) minus the weights; on a CPU that of compiled includes the compiler. CPU
s: over all threads; far below threads x time means that other programs used the machine.

cached: as `ibq sample` does it, with cached keys and values and, on CUDA, captured graphs. cached-eager: without
graphs. compiled: cached, by torch.compile. uncached: one forward over all previous codes for each new code, the head
on the last position only. reference: TencentARC/SEED-Voken's own transformer and sampling, which caches keys and
values too, eager, in float32: its cache does not support autocast."""
TRAIN_LEGEND = """\
Each row is a fresh process. A step is forward, loss, backward and AdamW on random codes, with dropout; weights and
moments are fp32, products in the row's dtype by autocast. Two steps warm up, then the fastest repeat counts. MFU: the
operations of three forwards at the rate of a plain matrix product, measured in the same process, as a share of the
time. Extra memory is the peak of the process (on CUDA: of what PyTorch allocates on the device) minus weights,
moments and gradients. CPU s: over all threads; far below threads x time means that other programs used the machine.

ibq: as `ibq train` does it, the loss without logits, fused AdamW. compiled: each block by torch.compile.
checkpointed, selective: each block recomputes all, or only cheap, activations in the backward pass. dense: with all
logits. reference: TencentARC/SEED-Voken's own transformer, PyTorch's cross-entropy of its logits, AdamW that is not
fused."""


class Kind(NamedTuple):
    """One of the two benchmarks. job: in `tools.bench.generator_rows`; unit, per: of speed and time; did: the verb of
    notes; bases: the impls that others are compared with."""

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
    did="samples",
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
    """What rows are compared at. recipe: its name or DEPTHxHEADS; units: images of a batch or tokens of a step."""

    recipe: str
    model: TransformerConfig
    units: int

    def __str__(self) -> str:
        return f"{self.recipe}, V {self.model.vocabulary:,}"


class Row(NamedTuple):
    """measured: the fields of `tools.bench.generator_rows.Measured`, or None and the reason."""

    impl: str
    shape: Shape
    dtype: str
    measured: dict | None = None
    reason: str = ""

    @property
    def arguments(self) -> dict:
        return dict(model=asdict(self.shape.model), dtype=self.dtype)

    @property
    def speed(self) -> float:
        """Units per second."""
        return self.shape.units / self.measured["seconds"]

    @property
    def mfu(self) -> float:
        """Of training, where units are tokens."""
        return 3 * flops_per_token(self.shape.model) * self.speed / self.measured["operations_per_second"]

    @property
    def extra_mib(self) -> float:
        return self.measured["extra_bytes"] / 2**20


def compare_sampling(
    recipe: str | None, impl: str | None, dtype: str | None, options: Options, batch_size: int | None, guidance: float
) -> None:
    """`ibq bench sample`: measures every impl of every recipe, prints the table, and writes it to ``options.out``."""
    if not 1 <= guidance < math.inf:
        raise bad("--guidance", f"{guidance} is not a finite number >= 1 (1 is no guidance)")
    impls = impl and names("--impl", impl, SAMPLE.impls)
    prepared = common.prepare(options, REFERENCE_FILE, REFERENCE_NAMES)
    cuda = prepared.device == "cuda"
    batch = batch_size or (64 if cuda else 4)
    models = _models(recipe or ("ar_b,ar_l,ar_xl,ar_xxl" if cuda else "6x6"))
    shapes = [Shape(name, model, batch) for name, model in models.items()]
    impls = impls or ["uncached", *(["cached-eager"] if cuda else []), "cached"]
    dtype = dtype or ("bfloat16" if cuda else "float32")
    _compare(SAMPLE, impls, dtype, shapes, prepared, batch_size=batch, guidance=guidance)


def compare_training(
    recipe: str | None, impl: str | None, dtype: str | None, options: Options, vocabulary: str, micro_batch: int | None
) -> None:
    """`ibq bench train-ar`: measures every impl of every recipe, prints the table, and writes it to ``options.out``."""
    sizes = numbers("--vocabulary", vocabulary)
    impls = names("--impl", impl, TRAIN.impls) if impl else list(TRAIN.impls)
    prepared = common.prepare(options, REFERENCE_FILE, REFERENCE_NAMES)
    cuda = prepared.device == "cuda"
    batch = micro_batch or (16 if cuda else 2)
    models = _models(recipe or ("ar_xl,ar_xxl" if cuda else "4x4"))
    shapes = []
    for (name, model), size in product(models.items(), sizes):
        model = replace(model, vocabulary=size)
        shapes.append(Shape(name, model, batch * model.tokens))
    dtype = dtype or ("bfloat16" if cuda else "float32")
    _compare(TRAIN, impls, dtype, shapes, prepared, micro_batch=batch)


def _models(names: str) -> dict[str, TransformerConfig]:
    """The models of recipes; DEPTHxHEADS is the published B with other numbers of blocks and heads.

    Raises TrainerError and BadParameter.
    """
    models = {}
    for name in names.split(","):
        if numbers := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name):
            models[name] = TransformerConfig(depth=int(numbers[1]), heads=int(numbers[2]))
            continue
        run = load_recipe(name, [])
        if not isinstance(run, GeneratorRun):
            raise bad("--recipe", f"{name} is not a generator's recipe; use one of ar_b ... ar_xxl, or DEPTHxHEADS")
        models[name] = run.model
    return models


def _compare(kind: Kind, chosen: list[str], dtype: str, shapes: list[Shape], prepared: Prepared, **settings) -> None:
    """Measures and shows all rows. settings: further arguments of the job."""
    on_cpu = prepared.device == "cpu"
    impls = (["reference"] if prepared.reference else []) + [impl for impl in kind.impls if impl in chosen]
    rows = []
    for shape, impl in product(shapes, impls):
        own_dtype = "float32" if (kind, impl) == (SAMPLE, "reference") else dtype  # it supports no other
        rows.append(Row(impl, shape, own_dtype, reason=NOT_ON_CPU.get(impl, "") if on_cpu else ""))
    if not on_cpu:
        prepared.heading.insert(1, _packages())
    settings |= dict(reference=prepared.reference)
    measured = common.measure_rows("generator_rows", kind.job, rows, prepared, **settings)
    report = Report(kind, prepared.heading, [], prepared.options.command, prepared.name, tuple(rows))
    common.present(report, measured, prepared.options.out)


class Report(NamedTuple):
    """The table of all rows measured so far. planned: all rows, which decide the widths of columns."""

    kind: Kind
    heading: list[str]
    rows: list[Row]
    command: str = ""
    machine: str = ""
    planned: tuple[Row, ...] = ()

    @property
    def legend(self) -> str:
        return self.kind.legend

    @property
    def headings(self) -> list[str]:
        kind = self.kind
        speed = [f"{kind.unit}/s", *(["MFU"] if kind is TRAIN else []), f"s/{kind.per}", "CPU s"]
        bases = [f"x {base}" for base in kind.bases]
        return [*("impl", "recipe", "V", "dtype"), *speed, "extra MiB", "peak MiB", *bases]

    @property
    def widths(self) -> list[int]:
        widths = [max(6, len(text)) for text in self.headings]
        widths[0] = max(len(row.impl) for row in self.planned)
        widths[1] = max(map(len, ["recipe", *(row.shape.recipe for row in self.planned)]))
        widths[2] = max(widths[2], *(len(f"{row.shape.model.vocabulary}") for row in self.planned))
        widths[3] = max(len(row.dtype) for row in self.planned)
        return widths

    def times(self, row: Row, base: str) -> float | None:
        """The speed of a row divided by its base's; None if the base was not measured."""
        bases = [other for other in self.rows if (other.impl, other.shape) == (base, row.shape) and other.measured]
        return row.speed / bases[0].speed if bases else None

    def cells(self, row: Row) -> list[str]:
        """The row's numbers, or the reason why it has none."""
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
            f"{row.measured['process_bytes'] / 2**20:.0f}",
            *("-" if ratio is None else f"{ratio:.2f}" for ratio in times),
        ]

    def notes(self) -> list[str]:
        """Ratios of the other rows to the bases."""
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
        share = f"{common.share(ratio)} of" if ratio < 1 else f"{ratio:.2f} times"
        return f", with {share} its extra memory"

    def markdown(self, picture: str) -> str:
        table = common.Table(self.headings, [self.cells(row) for row in self.rows])
        picture = f"![Speed and memory]({picture})"
        return common.markdown_page(self.kind.title, self, [table], self.legend, picture)

    def draw(self, path: Path) -> None:
        """Bars of speed and of extra memory for each shape."""
        kind, rows = self.kind, self.rows
        shapes = list(dict.fromkeys(str(row.shape) for row in rows))
        impls = list(dict.fromkeys(row.impl for row in rows))
        size = 11, 0.9 + len(shapes) * (0.8 + 0.3 * len(impls))
        figure, axes = common.pyplot().subplots(len(shapes), 2, figsize=size, layout="constrained", squeeze=False)
        values = (
            (f"{kind.unit} per second (higher is better)", lambda row: row.speed),
            ("extra memory, MiB (lower is better)", lambda row: row.extra_mib),
        )
        for (shape, (title, value)), axis in zip(product(shapes, values), axes.flat, strict=True):
            own = [row for row in rows if str(row.shape) == shape]
            lengths = [value(row) if row.measured else 0 for row in own]
            texts = [common.bar_text(value(row)) if row.measured else "not measured" for row in own]
            colors = [common.COLORS[row.impl] for row in own]
            bars = axis.barh([row.impl for row in own], lengths, 0.75, color=colors)
            axis.bar_label(bars, texts, padding=3, fontsize=8)
            axis.invert_yaxis()
            axis.margins(x=0.15)
            axis.set_title(f"{shape}: {title}", loc="left", fontsize=9)
        figure.suptitle(f"{kind.title} ({rows[-1].dtype}; {self.machine})", fontsize=10)
        common.save(figure, path)


def _packages() -> str:
    versions = {name: installed_version(name) for name in PACKAGES}
    found = [f"{name} {version}" if version else f"no {name}" for name, version in versions.items()]
    return "packages: " + ", ".join(found)
