"""Histograms as bars, in the terminal and as an image."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from tools.bench.common import pyplot, save

if TYPE_CHECKING:
    from data.prep.stats import Histogram

EIGHTHS = " ▏▎▍▌▋▊▉█"
BAR_CHARACTERS = 40
COLOR = "#4c72b0"


def lines(histogram: "Histogram") -> list[str]:
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


def draw(histograms: list["Histogram"], title: str, path: Path) -> None:
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
        axis.bar_label(axis.barh(list(histogram.bins), counts, height=0.8, color=COLOR), texts, padding=3, fontsize=8)
        axis.set_xlim(0, 1.3 * max(counts))
        axis.set_ylim(bars[number // columns] - 0.4, -0.6)  # all bars have the same thickness, from the top
        axis.set_xticks([])
        axis.tick_params(left=False)
        axis.spines[["bottom", "left"]].set_visible(False)
        axis.set_title(histogram.title, loc="left", fontsize=10, fontweight="bold")
    figure.suptitle(title, fontsize=11)
    save(figure, path)
