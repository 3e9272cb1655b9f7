"""`ibq shards`: images to WebDataset tars; what is wrong with tars; what is in them."""

import contextlib
import functools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tools import histograms

if TYPE_CHECKING:
    from data.prep.check import Checked
    from data.prep.stats import Counted, Score

NAMED = 10  # images of a list
NAMED_OF_KIND = 3  # problems of one kind in one tar
COLORS = {"ok": typer.colors.GREEN, "flawed": typer.colors.YELLOW, "broken": typer.colors.RED}
STDOUT = "-"

app = typer.Typer(help="Make WebDataset tars, check them, and count what is in them.", no_args_is_help=True)

Paths = Annotated[
    list[str],
    typer.Argument(metavar="PATH", help="Tars, folders of them, patterns in quotes, .txt lists, http, s3 or gs URLs."),
]
Jobs = Annotated[int | None, typer.Option(min=1, metavar="N", help="Processes; without it, one for each core.")]
Json = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write what was found as JSON; - is for stdout.")
]
Index = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Index file; without it, index.safetensors beside local tars.")
]


@app.command()
def pack(
    source: Annotated[
        Path, typer.Argument(metavar="PATH", help="Folder with jpg, png or webp images and sub-folders, or a zip file.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the tars; must not hold tars yet.")],
    layout: Annotated[
        Literal["folder", "imagenet", "coco"],
        typer.Option(help="folder: .txt and .cls beside the image; imagenet: a folder per class; coco: annotations."),
    ] = "folder",
    annotations: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Of the layout coco: captions_val2017.json or the like.")
    ] = None,
    prefix: Annotated[str, typer.Option(help="Tars are named PREFIX-000000.tar and so on.")] = "train",
    max_samples_per_shard: Annotated[int, typer.Option(help="Images in a tar, at most.")] = 10_000,
    max_bytes_per_shard: Annotated[
        int, typer.Option(help="A tar is closed once its files reach this size.")
    ] = 1_000_000_000,
    shorter_side: Annotated[
        int | None, typer.Option(help="Store larger images as JPEG with this shorter side, in pixels.")
    ] = None,
    quality: Annotated[int, typer.Option(help="JPEG quality of resized images, 1 to 100.")] = 95,
    shuffle: Annotated[
        bool, typer.Option(help="Mix the images in a fixed order; otherwise they are sorted by path.")
    ] = True,
) -> None:
    """Packs a folder or a zip file of images into WebDataset tars.

    A caption comes from a .txt file beside the image, a class from a .cls file (a number), but for other layouts.

    Example: ibq shards pack photos --out shards/photos --shorter-side 256

    One folder per class, named in classes.json: ibq shards pack imagenet/train --out shards/imagenet --layout imagenet

    COCO: ibq shards pack val2017.zip --out shards/coco --layout coco --annotations annotations/captions_val2017.json
    """
    import data

    with _progress("packing") as progress:
        report = data.pack(
            source,
            out,
            layout=layout,
            annotations=annotations,
            prefix=prefix,
            max_samples_per_shard=max_samples_per_shard,
            max_bytes_per_shard=max_bytes_per_shard,
            shorter_side=shorter_side,
            quality=quality,
            shuffle=shuffle,
            progress=progress,
        )
    typer.echo(f"packed {report.samples} images into {len(report.shards)} tars in {out}")
    _name("skipped {} that cannot be read", [f"{skipped.source}: {skipped.reason}" for skipped in report.skipped])
    _name(f"packed {{}} without a caption in {annotations}", report.without_caption)
    _name(f"left out captions of {{}} that are not in {source}", report.without_image)


@app.command()
def check(
    paths: Paths,
    decode: Annotated[
        bool, typer.Option("--decode", help="Decode every image, too; tokens are looked at anyway.")
    ] = False,
    index: Index = None,
    write: Annotated[
        bool, typer.Option("--write-index", help="Write the index, if no tar is broken; do not compare with it.")
    ] = False,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave broken tars out of the index.")] = False,
    json_file: Json = None,
    jobs: Jobs = None,
) -> None:
    """Finds damaged, empty and doubled tars and samples, and writes the index that training finds samples by.

    Every tar is read once, whole, also where an index tells its size: only its content proves that it has not changed.
    Exit status 1 where something is wrong. JSON has one line for each tar.

    Example: ibq shards check shards/photos --write-index

    Tars in a store: ibq shards check s3://bucket/photos --write-index --index photos.safetensors
    """
    import data
    from data.index import Index, write_index
    from data.parallel import cores
    from data.prep.check import check_shards, find_duplicates, missing_shards

    if misplaced := next((path for path in paths if path.endswith(".safetensors")), None):
        raise data.DataError(f"{misplaced} is no tar: an index is named as --index {misplaced}")
    if skip_broken and not write:
        raise typer.BadParameter("--skip-broken is for --write-index")
    urls = list(dict.fromkeys(data.expand(paths)))
    place = index or _index_place(urls, write)
    _check_writable(json_file, place if write else None)
    known = Index(place) if place and not write else None
    found: list[Checked] = []
    broken = 0
    with _progress("checking") as progress:
        for checked in check_shards(urls, index=known, decode_images=decode, jobs=min(jobs or cores(), len(urls))):
            found.append(checked)
            broken += checked.status == "broken"
            progress(len(found), len(urls), f", {broken:,} broken" if broken else "")
    find_duplicates(found)
    if known:
        found += missing_shards(found, known)
    say = functools.partial(typer.echo, err=json_file == STDOUT)
    _show_found(found, say)
    whole = [checked for checked in found if checked.table is not None]
    if write and whole and (skip_broken or len(whole) == len(found)):
        write_index(place, *zip(*((checked.url, checked.table, checked.sha256) for checked in whole), strict=True))
        say(f"wrote {place}: {len(whole):,} tars, {sum(checked.samples for checked in whole):,} samples")
    elif write:
        say("wrote no index: move the broken tars elsewhere, or leave them out of it with --skip-broken")
    _write_json(json_file, "".join(json.dumps(checked.record()) + "\n" for checked in found))
    if any(checked.status != "ok" for checked in found):
        raise typer.Exit(1)


@app.command()
def stats(
    paths: Paths,
    samples: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Count so many, spread evenly, instead of all.")
    ] = None,
    source: Annotated[
        str | None, typer.Option(metavar="NAME", help="Entry of data/sources.yaml: where captions and scores are.")
    ] = None,
    index: Index = None,
    picture: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the histograms.")] = None,
    json_file: Json = None,
    jobs: Jobs = None,
) -> None:
    """Counts images, their sizes and shapes, tokens, captions, classes and scores, and draws them as bars.

    Also of a folder or a zip file of images. Only the headers of images are read; that their pixels are whole is what
    `ibq shards check --decode` finds out.

    Example: ibq shards stats shards/photos --picture photos.png
    """
    import data
    from data.parallel import cores
    from data.prep.stats import count
    from data.sources import open_source

    if source is not None and source not in data.catalogue():
        raise data.DataError(f"data/sources.yaml has no {source}: choose one of {', '.join(data.catalogue())}")
    if picture is not None and picture.suffix != ".png":
        raise typer.BadParameter(f"{picture} does not end in .png", param_hint="--picture")
    _check_writable(json_file, picture)
    root = paths[0] if len(paths) == 1 else paths
    config = data.SourceConfig(name=source or "images", root=root, index=str(index) if index else None)
    with _progress("looking for samples") as progress:
        opened = open_source(config, scan_all=True, progress=progress)
    with _progress("counting") as progress:
        counted = count(opened, samples, jobs or cores(), progress)
    say = functools.partial(typer.echo, err=json_file == STDOUT)
    title = _title(paths, len(opened.shards), opened.samples, counted)
    for line in [title, *_summary(counted, opened.layout.fields)]:
        say(line)
    drawn = counted.histograms()
    for histogram in drawn:
        say("\n" + "\n".join(histograms.lines(histogram)))
    if picture and drawn:
        histograms.draw(drawn, title, picture)
        say(f"\ndrew {picture}")
    shards = {"shards": len(opened.shards), "samples_in_all": opened.samples}
    _write_json(json_file, json.dumps({**shards, **counted.record()}, indent=2) + "\n")


# -------------------------------------------------------------------------------------------------------------- places


def _index_place(urls: list[str], write: bool) -> Path | None:
    """Where the index is, or is to be written, if nothing else is said."""
    from data import DataError
    from data.addresses import is_remote
    from data.index import INDEX_NAME, common_root

    if any(map(is_remote, urls)):
        if write:
            raise DataError("an index cannot be written beside remote tars: say where with --index FILE")
        return None
    place = Path(common_root(urls)) / INDEX_NAME
    return place if write or place.is_file() else None


def _check_writable(*places: str | Path | None) -> None:
    """Before all the work. Raises DataError."""
    from data import DataError

    for place in places:
        if place is None or place == STDOUT:
            continue
        folder = Path(place).absolute().parent
        if Path(place).is_dir() or not os.access(folder, os.W_OK):
            raise DataError(f"cannot write {place}: name a file in a folder that is there and may be written to")


def _write_json(place: str | None, content: str) -> None:
    from data import DataError

    if place == STDOUT:
        typer.echo(content, nl=False)
    elif place is not None:
        try:
            Path(place).write_text(content, encoding="utf-8")
        except OSError as error:
            raise DataError(f"cannot write {place}: {error.strerror}; name another file") from error


# -------------------------------------------------------------------------------------------------------- what is shown


@app.command()
def sources(name: Annotated[str | None, typer.Argument(help="One of them: how to get it.")] = None) -> None:
    """Lists the data sets of the catalogue, or tells how to get one of them.

    Example: ibq shards sources cc12m
    """
    from data import DataError, catalogue

    entries = catalogue()
    if name is None:
        width = max(map(len, entries))
        for one, entry in entries.items():
            typer.echo(f"{one:{width}}  {entry['title']}")
        return
    if name not in entries:
        raise DataError(f"the catalogue has no {name}; it has {', '.join(entries)}")
    for key in ("title", "home", "license", "images", "bytes"):
        if key in entries[name]:
            typer.echo(f"{key:8} {str(entries[name][key]).strip()}")
    typer.echo(f"\n{entries[name]['how'].strip()}")


@app.command()
def audit(run: Annotated[Path, typer.Argument(help="Folder of a run that was trained with data.audit=true.")]) -> None:
    """Counts what a run's steps were made of, by source and epoch. Exit status 1 where a sample came twice in an epoch.

    Example: ibq shards audit runs/mine
    """
    from trainer.audit import read_audit

    seen: dict[tuple[str, int], Counter] = {}
    steps = set()
    found = read_audit(run)
    for one in found.delivered:
        steps.add(one.step)
        seen.setdefault((one.source, one.epoch), Counter())[one.shard, one.key] += 1
    total = sum(counts.total() for counts in seen.values())
    typer.echo(f"{len(steps):,} steps, {total:,} images")
    for source in sorted({source for source, _ in seen}):
        of_source = {epoch: counts for (name, epoch), counts in sorted(seen.items()) if name == source}
        images = sum(counts.total() for counts in of_source.values())
        typer.echo(f"{source}: {images:,} images, {images / total:.2%} of all")
        for epoch, counts in of_source.items():
            twice = [key for key, count in counts.items() if count > 1]
            more = f", {len(twice):,} of them more than once, first {twice[0][1]} in {twice[0][0]}" if twice else ""
            of = f" of {found.samples_of_sources[source]:,}" if found.samples_of_sources.get(source) else ""
            typer.echo(f"  epoch {epoch}: {len(counts):,}{of} samples{more}")
    for missing in found.missing_steps:
        typer.echo(f"steps {missing[0]} to {missing[-1]} were trained without an audit")
    if any(max(counts.values()) > 1 for counts in seen.values()):
        raise typer.Exit(1)


@contextlib.contextmanager
def _progress(doing: str) -> Iterator[Callable[..., None]]:
    """A bar, on a terminal. Yields what is to be called with (done, in all, more words).

    No thread draws it, since processes are forked in the meantime.
    """
    console, drawn = Console(stderr=True), 0.0
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden, auto_refresh=False) as bar:
        task = bar.add_task(doing, total=None)

        def show(done: int, total: int, more: str = "") -> None:
            nonlocal drawn
            refresh = time.monotonic() > drawn + 0.1
            drawn = time.monotonic() if refresh else drawn
            bar.update(task, completed=done, total=total, description=doing + more, refresh=refresh)

        yield show


def _name(what: str, names: list[str]) -> None:
    """Counts and names images on stderr, where there are any."""
    if names:
        typer.echo(what.format(f"{len(names):,}") + ":", err=True)
        for name in names[:NAMED]:
            typer.echo(f"  {name}", err=True)
        if len(names) > NAMED:
            typer.echo(f"  and {len(names) - NAMED:,} more", err=True)


def _show_found(found: list["Checked"], say: Callable[[str], None]) -> None:
    """The problems of each tar, and what there is in all."""
    from data.addresses import redacted
    from data.index import common_root, without_query

    root = redacted(common_root([checked.url for checked in found]))
    names = [redacted(without_query(checked.url)).removeprefix(root) for checked in found]
    for checked, name in zip(found, names, strict=True):
        for kind, count in checked.counts.items():
            shown = [problem for problem in checked.problems if problem.kind == kind][:NAMED_OF_KIND]
            texts = [f"sample {one.sample}: {one.message}" if one.sample is not None else one.message for one in shown]
            if count > len(shown):
                texts.append(f"and {count - len(shown):,} more")
            for text in texts:
                say(f"{_colored(checked.status)}  {name}  {kind}: {text}")
    statuses = Counter(checked.status for checked in found)
    counts = ", ".join(f"{statuses[status]:,} {_colored(status)}" for status in COLORS if statuses[status])
    samples, size = sum(checked.samples for checked in found), sum(checked.bytes or 0 for checked in found)
    say(f"{len(found):,} tars, {samples:,} samples, {_bytes(size)}: {counts}")
    if broken := [name for checked, name in zip(found, names, strict=True) if checked.status == "broken"]:
        say(f"to train without the broken ones: 'data.quarantine=[{','.join(broken)}]'")


def _colored(status: str) -> str:
    return typer.style(status, fg=COLORS[status])


def _title(paths: list[str], shards: int, samples: int | None, counted: "Counted") -> str:
    from data.addresses import redacted

    where = redacted(paths[0]) if len(paths) == 1 else f"{len(paths):,} paths"
    of_all = "" if samples == counted.samples or samples is None else f" of {samples:,}"
    return f"{where}: {shards:,} {'shard' if shards == 1 else 'shards'}, {counted.samples:,}{of_all} samples"


def _summary(counted: "Counted", fields: dict[str, str]) -> Iterator[str]:
    """What has no histogram. fields: a score's name -> its field of the samples' json."""
    from data.prep.stats import spread

    if counted.formats or counted.tokens:
        kinds = [f"{count:,} {name}" for name, count in counted.formats.most_common()]
        kinds += [f"{tokens:,} of tokens"] if (tokens := counted.tokens.total()) else []
        yield f"  {_bytes(counted.bytes)}, {_bytes(counted.bytes / counted.samples)} a sample: {', '.join(kinds)}"
        for header, count in counted.tokens.most_common():
            (rows, columns), views = header.grid, f"{header.views} view{'s' * (header.views != 1)}"
            what = f"{header.vocabulary:,} codes, {rows} x {columns}, {views}"
            yield f"  tokens of tokenizer {header.tokenizer}: {what}: {count:,}"
        yield f"  captions: {_with_missing(sum(counted.lengths.values()), counted.missing_captions)}"
        images = spread(Counter(counted.classes.values()))
        classes = f" in {len(counted.classes):,} classes of {images.min:,} to {images.max:,}" if images else ""
        yield f"  classes: {_with_missing(counted.classes.total(), counted.missing_classes)}{classes}"
    for name, score in counted.scores.items():
        yield f"  {name} ({fields[name]}): {_score(score)}"
    if counted.unusable_samples:
        yield f"  cannot be used: {counted.unusable_samples:,}"
        for text in counted.unusable[:NAMED_OF_KIND]:
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
