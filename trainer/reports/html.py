"""The HTML page of a report, and the parts that the reports of tokenizers and generators share."""

import base64
import io
from html import escape
from pathlib import Path

from PIL import Image


def page(title: str, sections: list[str]) -> str:
    """The whole page; empty sections are left out."""
    return _PAGE.format(title=escape(title), css=_CSS, body="\n".join(filter(None, sections)))


def header(run: Path, summary: str) -> str:
    return (
        f"<header><p class=kicker>ibq training report</p><h1>{escape(run.resolve().name)}</h1><p>{summary}</p></header>"
    )


def tiles(values: list[tuple[str, str]]) -> str:
    """(value, label) pairs in large type."""
    found = "".join(f"<div class=tile><b>{value}</b><span>{label}</span></div>" for value, label in values)
    return f"<div class=tiles>{found}</div>"


def table(rows: list[list[str]]) -> str:
    """A table; the first row and the first column are headings."""
    (corner, *columns), *body = rows
    head = f"<td>{corner}</td>" + "".join(f"<th scope=col>{column}</th>" for column in columns)
    lines = "".join(
        f"<tr><th scope=row>{name}</th>" + "".join(f"<td>{value}</td>" for value in values) + "</tr>"
        for name, *values in body
    )
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"


def commands(steps: list[tuple[str, str]]) -> str:
    """The last section: (title, what to type) pairs."""
    items = "".join(f"<h3>{title}</h3><pre>{escape(command)}</pre>" for title, command in steps)
    return f"<section><h2>Next steps</h2>{items}</section>"


def image(path: Path, alt: str) -> str:
    """An image embedded in the page; large ones are converted to JPEG."""
    data, kind = path.read_bytes(), "png"
    if len(data) > 400_000:
        buffer = io.BytesIO()
        with Image.open(path) as picture:
            picture.convert("RGB").save(buffer, "JPEG", quality=90)
        data, kind = buffer.getvalue(), "jpeg"
    encoded = base64.b64encode(data).decode()
    return f'<img class=wide src="data:image/{kind};base64,{encoded}" alt="{escape(alt)}">'


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: ibq report</title>
<style>{css}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_CSS = """
:root { color-scheme: light dark; --bg: #f6f7f9; --card: #fff; --text: #1b1e24; --faint: #5d6470; --line: #e1e4ea;
  --accent: #2563c9; --c0: #2563c9; --c1: #c8551b; --c2: #16825a; --c3: #8a3fb0; --c4: #9a6b00; --c5: #0d7a8c; }
@media (prefers-color-scheme: dark) { :root { --bg: #121418; --card: #1b1e24; --text: #e8eaee; --faint: #a0a7b4;
  --line: #30353e; --accent: #7fb0ff; --c0: #7fb0ff; --c1: #ff9d66; --c2: #5fd0a0;
  --c3: #d39bf2; --c4: #e3bd55; --c5: #5cc8d8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--text); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 0 0 .8rem; }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
.kicker { color: var(--accent); font-weight: 600; margin: 0; }
header p:last-child { max-width: 44rem; font-size: 1.1rem; margin: 0; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 1.25rem;
  margin-top: 1.25rem; }
.tiles { display: grid; grid-template-columns: repeat(3, 1fr); gap: .6rem; }
.tile { border: 1px solid var(--line); border-radius: 10px; padding: .6rem .7rem; }
.tile b { display: block; font-size: clamp(1.05rem, 4.5vw, 1.7rem); line-height: 1.3; white-space: nowrap; }
.tile span, .note, small { line-height: 1.4; color: var(--faint); font-size: .875rem; }
.verdict { border-left: 4px solid var(--accent); padding-left: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .5rem; text-align: right; border-bottom: 1px solid var(--line); }
th[scope=row] { text-align: left; font-weight: 400; }
thead th { color: var(--faint); font-size: .875rem; font-weight: 600; }
tbody td:nth-child(2) { font-weight: 600; }
img.wide { display: block; width: 100%; height: auto; border-radius: 8px; image-rendering: auto; }
figure { margin: 0; }
figure + figure { margin-top: 1rem; }
figcaption { margin-bottom: .3rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 1.5rem 1.25rem; }
.chart + .chart { margin: 0; }
.chart { display: flex; flex-direction: column; }
.chart small { display: block; }
.chart svg { width: 100%; height: auto; margin-top: auto; }
svg text { fill: var(--faint); font-size: 12px; font-family: inherit; }
svg .grid { stroke: var(--line); }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
polyline.c0 { stroke: var(--c0); } polyline.c1 { stroke: var(--c1); } polyline.c2 { stroke: var(--c2); }
polyline.c3 { stroke: var(--c3); } polyline.c4 { stroke: var(--c4); } polyline.c5 { stroke: var(--c5); }
polyline.dashed { stroke-dasharray: 6 4; }
circle.c0 { fill: var(--c0); } circle.c1 { fill: var(--c1); } circle.c2 { fill: var(--c2); }
circle.c3 { fill: var(--c3); } circle.c4 { fill: var(--c4); } circle.c5 { fill: var(--c5); }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .875rem; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 3px; margin-right: .35em; }
i.c0 { background: var(--c0); } i.c1 { background: var(--c1); } i.c2 { background: var(--c2); }
i.c3 { background: var(--c3); } i.c4 { background: var(--c4); } i.c5 { background: var(--c5); }
.legend i.dashed { clip-path: polygon(0 0, 40% 0, 40% 100%, 60% 100%, 60% 0, 100% 0, 100% 100%, 0 100%); }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .25rem 1.2rem; margin: 0; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--bg); border: 1px solid var(--line);
  border-radius: 8px; margin: 0; padding: .6rem .8rem; font: .85rem/1.5 ui-monospace, monospace; }
details { margin-top: 1rem; } summary { cursor: pointer; color: var(--accent); } summary + * { margin-top: .75rem; }
@media print { body { background: none; } section { break-inside: avoid; } }
"""
