"""SVG charts of what a run logged. The page's CSS colours them, in light and in dark mode."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

MAX_POINTS = 240  # of a curve; longer curves are averaged down to this


@dataclass(frozen=True)
class Chart:
    """A chart's title, caption and curves (name in metrics.jsonl -> label). dashed: labels of dashed curves."""

    title: str
    caption: str
    curves: dict[str, str]
    log: bool = False
    percent: bool = False
    from_zero: bool = False
    detail: bool = False  # collapsed by default
    only_beside: str | None = None  # drawn only if this metric was logged too
    dashed: tuple[str, ...] = ()


# What `trainer.log_gradient_balance` logs: weighted loss terms that depend on the image, and the others.
IMAGE_TERMS = {"reconstruction": "L1", "perceptual": "LPIPS", "convnext": "ConvNeXt", "generator": "adversarial"}
OTHER_TERMS = {"quantizer": "VQ losses", "entropy": "entropy penalty", "semantic": "semantic"}


def gradient_chart(place: str, detail: bool) -> Chart:
    """The norms of the loss terms' gradients at one place: features, codes or encoder."""
    return Chart(
        f"Gradient at the {place}",
        "Norm, by weighted loss term. Solid: terms of the image that comes out. Dashed: the other terms. The image is "
        "drowned if all solid curves lie far below a dashed one.",
        {f"gradient/{place}/{term}": label for term, label in (IMAGE_TERMS | OTHER_TERMS).items()},
        log=True,
        detail=detail,
        dashed=tuple(OTHER_TERMS.values()),
    )


CHARTS = [
    Chart(
        "Reconstruction",
        "Distance from the originals. Lower is better.",
        {"loss/reconstruction": "L1", "loss/perceptual": "LPIPS", "loss/convnext": "ConvNeXt"},
        log=True,
    ),
    Chart("Validation", "PSNR in dB. Higher is better.", {"val/psnr": "PSNR"}),
    Chart(
        "Codebook usage",
        "Share of the codes that were chosen. It falls towards 0 if the codebook collapses.",
        {"codebook/usage": "training", "val/usage": "validation"},
        percent=True,
    ),
    Chart(
        "Usage of groups",
        "Share of the values of groups of bits that were chosen, since there are too many codes to count. It says less "
        "than the usage of codes, and does not compare with it.",
        {"codebook/group_usage": "training", "val/group_usage": "validation"},
        percent=True,
    ),
    Chart(
        "Codebook perplexity",
        "The number of equally frequent codes with the same entropy.",
        {"codebook/perplexity": "perplexity"},
        from_zero=True,
    ),
    Chart(
        "Quantizer",
        "Distances between encoder features and codes.",
        {
            "loss/double_quantization": "double quantization",
            "loss/commitment": "commitment",
            "loss/codebook": "codebook",
        },
        log=True,
    ),
    Chart(
        "Entropy",
        "Per token, low means a confident assignment; of the average, high means that all codes are used.",
        {"loss/sample_entropy": "per token", "loss/average_entropy": "of the average"},
    ),
    Chart(
        "Semantic term",
        "Cosine distance of the codes, by the head, from the encoder's features. Lower is better.",
        {"loss/semantic": "distance"},
    ),
    gradient_chart("features", detail=False),
    Chart(
        "Adversarial losses",
        "Generator and discriminator should stay in balance.",
        {"loss/generator": "generator", "loss/discriminator": "discriminator"},
        only_beside="loss/discriminator",
    ),
    Chart(
        "Next code",
        "Cross-entropy in nats per code. A value below the entropy of the code frequencies means that context helps.",
        {"loss/cross_entropy": "training", "val/loss": "validation", "val/unigram_entropy": "code frequencies"},
    ),
    Chart("Speed", "Images per second, over all processes.", {"images_per_second": "images/s"}, from_zero=True),
    Chart("Model FLOPs utilization", "Relative to the speed of a plain matrix product.", {"mfu": "MFU"}, percent=True),
    Chart("Logit scale", "Learned factor on the cosines.", {"codebook/logit_scale": "scale"}, detail=True),
    Chart("Logits", "Mean of logsumexp squared.", {"loss/z": "z"}, detail=True),
    Chart("Total loss", "The weighted sum that is minimized.", {"loss/total": "total"}, detail=True),
    Chart(
        "Discriminator logits",
        "Means over real images and over reconstructions.",
        {"discriminator/logits_real": "real", "discriminator/logits_fake": "reconstructed"},
        detail=True,
    ),
    Chart("LeCAM", "Regularizer of the discriminator.", {"loss/lecam": "LeCAM"}, detail=True),
    Chart(
        "Adversarial weight", "Weight of the generator's adversarial loss.", {"weight/generator": "weight"}, detail=True
    ),
    Chart(
        "Learning rates",
        "As set by the schedule.",
        {"lr/tokenizer": "tokenizer", "lr/generator": "generator", "lr/discriminator": "discriminator"},
        detail=True,
    ),
    gradient_chart("codes", detail=True),
    gradient_chart("encoder", detail=True),
    Chart(
        "Gradient norms",
        "Before clipping.",
        {
            "grad_norm/tokenizer": "tokenizer",
            "grad_norm/generator": "generator",
            "grad_norm/discriminator": "discriminator",
        },
        log=True,
        detail=True,
    ),
]


class Point(NamedTuple):
    step: float
    value: float


Curve = list[Point]


def draw_chart(chart: Chart, curves: dict[str, Curve]) -> str:
    """An HTML figure with an SVG of curves by label. A log scale omits values that are not positive."""
    curves = {label: _downsample(curve) for label, curve in curves.items()}
    if chart.log and all(point.value <= 0 for curve in curves.values() for point in curve):
        chart = Chart(chart.title, chart.caption, chart.curves)
    if chart.log:
        curves = {label: [p for p in curve if p.value > 0] for label, curve in curves.items()}
        curves = {label: curve for label, curve in curves.items() if curve}
    width, height, left, right, top, bottom = 360, 204, 48, 10, 8, 28
    points = [point for curve in curves.values() for point in curve]
    x_low, x_high = min(p.step for p in points), max(p.step for p in points)
    x_ticks = _ticks(x_low, x_high, 4)
    y_low, y_high = min(p.value for p in points), max(p.value for p in points)
    if chart.percent:
        y_high = min(1.0, max(0.1, y_high * 1.05))
    if chart.percent or chart.from_zero:
        y_low = 0.0
    y_ticks = _log_ticks(y_low, y_high) if chart.log else _ticks(y_low, y_high, 4)
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])

    def x(step: float) -> float:
        return left + (width - left - right) * ((step - x_low) / (x_high - x_low) if x_high > x_low else 0.5)

    def y(value: float) -> float:
        low, high, at = (math.log(v) if chart.log else v for v in (y_low, y_high, value))
        return height - bottom - (height - top - bottom) * ((at - low) / (high - low) if high > low else 0.5)

    def text(value: float) -> str:
        return f"{value:.0%}" if chart.percent else _short(value)

    marks = []
    for tick in y_ticks:
        marks.append(f'<line class=grid x1={left} x2={width - right} y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        marks.append(f'<text x={left - 6} y="{y(tick) + 4:.1f}" text-anchor=end>{text(tick)}</text>')
    for tick in x_ticks:
        anchor = "end" if x(tick) > width - 30 else "middle"
        marks.append(f'<text x="{x(tick):.1f}" y={height - 7} text-anchor={anchor}>{_short(tick)}</text>')
    marks.append(f"<text x={left - 6} y={height - 7} text-anchor=end>step</text>")
    styles = {label: f"c{i}{' dashed' if label in chart.dashed else ''}" for i, label in enumerate(curves)}
    for label, curve in curves.items():
        if len(curve) == 1:
            at = f'cx="{x(curve[0].step):.1f}" cy="{y(curve[0].value):.1f}"'
            marks.append(f'<circle class="{styles[label]}" {at} r=3 />')
        path = " ".join(f"{x(p.step):.1f},{y(p.value):.1f}" for p in curve)
        marks.append(f'<polyline class="{styles[label]}" points="{path}"><title>{escape(label)}</title></polyline>')
    legend = "".join(
        f'<span><i class="{styles[label]}"></i>{escape(label)} <b>{text(curve[-1].value)}</b></span>'
        for label, curve in curves.items()
    )
    spoken = "; ".join(
        f"{label} from {text(curve[0].value)} at step {curve[0].step:.0f} "
        f"to {text(curve[-1].value)} at step {curve[-1].step:.0f}"
        for label, curve in curves.items()
    )
    scale = " (log scale)" if chart.log else ""
    return (
        f"<figure class=chart><figcaption><b>{chart.title}</b>{scale}<small>{chart.caption}</small></figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role=img aria-label="{escape(chart.title)} over training steps: '
        f'{escape(spoken)}">{"".join(marks)}</svg><div class=legend>{legend}</div></figure>'
    )


def _downsample(curve: Curve) -> Curve:
    """Averages neighbouring points until at most MAX_POINTS are left."""
    size = math.ceil(len(curve) / MAX_POINTS)
    groups = [curve[i : i + size] for i in range(0, len(curve), size)]
    return [Point(group[-1].step, math.fsum(p.value for p in group) / len(group)) for group in groups]


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers within [low, high]; one value if both are equal."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)] or [low, high]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, and 2 and 5 times these if the range is short; at least one at or beyond each end."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps: Iterable[int] = (1,) if last - first > 3 else (1, 2, 5)
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in steps]
    begin = max((i for i, tick in enumerate(ticks) if tick <= low), default=0)
    end = min((i for i, tick in enumerate(ticks) if tick >= high), default=len(ticks) - 1)
    return ticks[begin : end + 1]


def _short(value: float) -> str:
    """A number in at most seven characters: 1.2M, 450, 0.035, 1e-4."""
    if value == 0:
        return "0"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scale = 1e3 if unit == "k" else limit
            return f"{value / scale:.3g}{unit}"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}" if abs(value) >= 100 else f"{value:.3g}"
