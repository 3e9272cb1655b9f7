"""What `ibq shards check` and `ibq shards stats` print and draw."""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from tools.bench.common import pyplot, save
from tools.console import counted

if TYPE_CHECKING:
    from data.prep.check import Checked
    from data.prep.stats import Counted, Histogram, Score

NAMED_OF_KIND = 3  # problems of one kind in one tar that are printed
COLORS = {"ok": typer.colors.GREEN, "flawed": typer.colors.YELLOW, "broken": typer.colors.RED}
EIGHTHS = " ▏▎▍▌▋▊▉█"
BAR_CHARACTERS = 40
BAR_COLOR = "#4c72b0"
DRAWN_BY = "ibq shards stats"


def problems(found: list["Checked"]) -> Iterator[str]:
    """The problems of each tar, and the totals."""
    from data.addresses import redacted
    from data.folder_reader import is_files
    from data.index import common_root, without_query
    from data.text import printable

    root = redacted(common_root([checked.url for checked in found]))
    names = [printable(redacted(without_query(checked.url)).removeprefix(root)) for checked in found]
    for checked, name in zip(found, names, strict=True):
        for kind, count in checked.counts.items():
            shown = [problem for problem in checked.problems if problem.kind == kind][:NAMED_OF_KIND]
            texts = [f"sample {one.sample}: {one.message}" if one.sample is not None else one.message for one in shown]
            if count > len(shown):
                texts.append(f"and {count - len(shown):,} more")
            for text in texts:
                yield f"{_colored(checked.status)}  {name}  {kind}: {printable(text)}"
    statuses = Counter(checked.status for checked in found)
    counts = ", ".join(f"{statuses[status]:,} {_colored(status)}" for status in COLORS if statuses[status])
    sizes = [checked.bytes for checked in found if checked.bytes is not None]  # folders and zip files have none
    are_tars = len(sizes) == len(found)
    totals = [counted(len(found), "tar" if are_tars else "shard")]
    totals.append(counted(sum(checked.samples for checked in found), "sample"))
    totals += [_bytes(sum(sizes)) + ("" if are_tars else " in tars")] if sizes else []
    yield f"{', '.join(totals)}: {counts}"
    yield from (f"{name}: {checked.not_read}" for checked, name in zip(found, names, strict=True) if checked.not_read)
    if dotted := sum(checked.dotted for checked in found):
        yield (
            f"{dotted:,} {'key has' if dotted == 1 else 'keys have'} a dot: each is a separate sample here; webdataset "
            "would end keys at the first dot; if KEY.part.png belongs to the image KEY.jpg, name the suffix of images "
            "(--image, a source's image)"
        )
    tars = [(checked, name) for checked, name in zip(found, names, strict=True) if not is_files(checked.url)]
    if broken := [name for checked, name in tars if checked.status == "broken"]:
        yield f"to train without the broken ones: 'data.quarantine=[{','.join(broken)}]'"


def _colored(status: str) -> str:
    return typer.style(status, fg=COLORS[status])


def title(paths: list[str], shards: int, samples: int | None, found: "Counted") -> str:
    from data.addresses import redacted

    where = redacted(paths[0]) if len(paths) == 1 else f"{len(paths):,} paths"
    if samples == found.samples or samples is None:
        return f"{where}: {counted(shards, 'shard')}, {counted(found.samples, 'sample')}"
    return f"{where}: {counted(shards, 'shard')}, {found.samples:,} of {counted(samples, 'sample')}"


def summary(found: "Counted", fields: dict[str, str]) -> Iterator[str]:
    """Everything without a histogram. fields: a score's name -> its field in the samples' json."""
    from data.prep.stats import spread

    if found.formats or found.tokens:
        kinds = [f"{count:,} {name}" for name, count in found.formats.most_common()]
        kinds += [f"{tokens:,} of tokens"] if (tokens := found.tokens.total()) else []
        yield f"  {_bytes(found.bytes)}, {_bytes(found.bytes / found.samples)} a sample: {', '.join(kinds)}"
        for header, count in found.tokens.most_common():
            (rows, columns), views = header.grid, f"{header.views} view{'s' * (header.views != 1)}"
            what = f"{header.vocabulary:,} codes, {rows} x {columns}, {views}"
            yield f"  tokens of tokenizer {header.tokenizer}: {what}: {count:,}"
        yield f"  captions: {_with_missing(sum(found.lengths.values()), found.missing_captions)}"
        images = spread(Counter(found.classes.values()))
        classes = f" in {len(found.classes):,} classes of {images.min:,} to {images.max:,}" if images else ""
        yield f"  classes: {_with_missing(found.classes.total(), found.missing_classes)}{classes}"
    for name, score in found.scores.items():
        yield f"  {name} ({fields[name]}): {_score(score)}"
    if found.unusable_samples:
        yield f"  unusable: {found.unusable_samples:,}"
        for text in found.unusable[:NAMED_OF_KIND]:
            yield f"    {text}"


def _with_missing(there: int, missing: int) -> str:
    return f"{there:,}, missing in {missing:,}" if there and missing else "none" if missing else "all"


def _score(score: "Score") -> str:
    parts = [_with_missing(score.numbers + score.not_numeric, score.missing)]
    if score.numbers:
        parts.append(f"from {score.least:.4g} to {score.most:.4g}, mean {score.total / score.numbers:.4g}")
    if score.not_numeric:
        parts.append(f"no number in {score.not_numeric:,}")
    return ", ".join(parts)


def _bytes(number: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}" if unit != "bytes" else f"{number:.0f} bytes"
        number /= 1000
    return f"{number:,.3g} TB"


def histogram_lines(histogram: "Histogram") -> list[str]:
    """The title, and for each bin a bar, its share and its count; at most 80 characters wide."""
    total, most = sum(histogram.bins.values()), max(histogram.bins.values())
    width = max(map(len, histogram.bins))
    rows = [
        f"  {label:>{width}} {_bar(count / most)} {_percent(count / total):>5} {count:>11,}"
        for label, count in histogram.bins.items()
    ]
    return [histogram.title, *rows]


def _bar(share: float) -> str:
    eighths = round(share * BAR_CHARACTERS * 8)
    if share and not eighths:
        eighths = 1  # a bin that is not empty is visible
    whole, part = divmod(eighths, 8)
    return (EIGHTHS[-1] * whole + EIGHTHS[part]).ljust(BAR_CHARACTERS)[:BAR_CHARACTERS]


def _percent(share: float) -> str:
    return f"{share:.0%}" if share == 0 or share >= 0.095 else f"{share:.1%}" if share >= 0.001 else "<0.1%"


def draw_histograms(histograms: list["Histogram"], title: str, path: Path) -> None:
    """Draws them in one image. Raises OSError."""
    columns = min(2, len(histograms))
    rows = math.ceil(len(histograms) / columns)
    bars = [max(len(one.bins) for one in histograms[row * columns : (row + 1) * columns]) for row in range(rows)]
    heights = [0.6 + 0.28 * count for count in bars]  # inches
    shape = dict(figsize=(5.5 * columns, 0.5 + sum(heights)), height_ratios=heights, squeeze=False)
    figure, axes = pyplot().subplots(rows, columns, layout="constrained", **shape)
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1)
    for axis in axes.flat[len(histograms) :]:
        axis.set_visible(False)
    for number, histogram in enumerate(histograms):
        axis, counts = axes.flat[number], list(histogram.bins.values())
        texts = [f"{count:,} ({_percent(count / sum(counts))})" if count else "" for count in counts]
        drawn = axis.barh(list(histogram.bins), counts, height=0.8, color=BAR_COLOR)
        axis.bar_label(drawn, texts, padding=3, fontsize=8)
        axis.set_xlim(0, 1.3 * max(counts))
        axis.set_ylim(bars[number // columns] - 0.4, -0.6)  # all bars have the same thickness, from the top
        axis.set_xticks([])
        axis.tick_params(left=False)
        axis.spines[["bottom", "left"]].set_visible(False)
        axis.set_title(histogram.title, loc="left", fontsize=10, fontweight="bold")
    figure.suptitle(title, fontsize=11)
    save(figure, path, DRAWN_BY)


def is_drawn(file: Path) -> bool:
    """Whether `draw_histograms` wrote a file, by the text before the pixels of the PNG. Raises OSError."""
    with file.open("rb") as opened:
        return f"Software\0{DRAWN_BY}".encode() in opened.read(1 << 12)
