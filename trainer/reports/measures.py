"""How measured values are named, formatted and put into tables."""

import re
from typing import NamedTuple

from data.text import printable

ALL_COLORS = 2**24  # of 8 bits a channel


class Measure(NamedTuple):
    """A measure's title, and the format of measured and of published values."""

    title: str
    measured: str = ".2f"
    published: str = ".2f"

    def format_published(self, value: float | None) -> str:
        """``-`` for None. Published percentages are stored as fractions."""
        if value is None:
            return "-"
        if self.published.endswith("%"):
            return f"{100 * value:{self.published[:-1]}}%"
        return format(value, self.published)

    def format_measured(self, value: float | None) -> str:
        """``-`` for None, which here means not measured (report.json also writes null for an infinite PSNR)."""
        return "-" if value is None else format(value, self.measured)


# By key of report.json and of model_zoo/published.yaml.
MEASURES = {
    "rfid": Measure("rFID"),
    "lpips_vgg": Measure("LPIPS (VGG)", ".4f", ".4f"),
    "lpips_alex": Measure("LPIPS (AlexNet)", ".4f", ".4f"),
    "psnr": Measure("PSNR (dB)"),
    "ssim": Measure("SSIM", ".4f"),
    "usage": Measure("codebook usage", ".1%", ".3g%"),
    "usage_65536": Measure("usage in 65,536 tokens", ".1%", ".3g%"),
    "perplexity": Measure("perplexity", ",.1f"),
    # In place of the three before, if there are too many codes to count.
    "group_usage": Measure("usage of groups", ".1%", ".3g%"),
    "group_usage_65536": Measure("usage of groups in 65,536 tokens", ".1%", ".3g%"),
    "group_perplexity": Measure("perplexity of groups", ",.1f"),
    "l1": Measure("L1 on [-1, 1]", ".4f"),
}


def has_fitted_palette(codes: int) -> bool:
    """Whether the palette baseline has as many colours as there are codes: there are 2^24 colours in all."""
    return codes <= ALL_COLORS


def plain_markdown(text: str) -> str:
    """Markdown that shows the text as it is: names of files and samples are no markup."""
    return re.sub(r"[\\`*\[\]<>|]|\b_|_\b", lambda found: "\\" + found[0], printable(text))


def markdown_table(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is the heading, and all columns but the first are right-aligned."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---|" + "---:|" * (len(rows[0]) - 1))
    return "\n".join(lines)


def describe_crop(provenance: dict) -> str:
    """The image size and the resize method of an evaluation."""
    size = provenance["image_size"]
    if size == "original":
        return "original size"
    named = f"{size} x {size}" if str(size).isdecimal() else size.replace(",", ", ")
    return f"{named} ({provenance['resize']})"


def describe_seconds(seconds: dict[str, float]) -> str:
    """The total and its parts, the largest first."""
    parts = sorted(((name, value) for name, value in seconds.items() if name != "total"), key=lambda part: -part[1])
    return f"{seconds['total']:.1f} in total: " + ", ".join(f"{name} {value:.1f}" for name, value in parts)
