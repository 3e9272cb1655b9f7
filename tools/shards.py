"""`ibq shards`: packs images into WebDataset tars, checks tars, and counts their contents."""

import functools
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from tools import shards_text
from tools.console import counted, echo, progress

NAMED = 10  # images of a list that are printed
STDOUT = "-"

app = typer.Typer(help="Pack images into WebDataset tars, check tars, and count their contents.", no_args_is_help=True)

Paths = Annotated[
    list[str],
    typer.Argument(metavar="PATH", help="Tars, folders of them, patterns in quotes, .txt lists, http, s3 or gs URLs."),
]
Jobs = Annotated[int | None, typer.Option(min=1, metavar="N", help="Processes.  [default: one per core]")]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the results as JSON; - is stdout.")]
Index = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Index file.  [default: index.safetensors beside local tars]")
]


@app.command()
def pack(
    source: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="Folder of jpg, png or webp images and sub-folders, or a zip file."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the tars; must be new or empty.")],
    layout: Annotated[
        Literal["folder", "imagenet", "coco"],
        typer.Option(help="folder: .txt and .cls beside the image; imagenet: a folder per class; coco: annotations."),
    ] = "folder",
    annotations: Annotated[
        Path | None, typer.Option(metavar="FILE", help="For the layout coco, such as captions_val2017.json.")
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="For the layout imagenet: number the folders as this classes.json."),
    ] = None,
    prefix: Annotated[str, typer.Option(help="Tars are named PREFIX-000000.tar and so on.")] = "train",
    max_samples_per_shard: Annotated[int, typer.Option(help="Largest number of images in a tar.")] = 10_000,
    max_bytes_per_shard: Annotated[
        int, typer.Option(help="A tar is closed when its files reach this size.")
    ] = 1_000_000_000,
    shorter_side: Annotated[
        int | None, typer.Option(help="Resize larger images to this shorter side, in pixels, and store them as JPEG.")
    ] = None,
    quality: Annotated[int, typer.Option(help="JPEG quality of resized images, 1 to 100.")] = 95,
    shuffle: Annotated[
        bool, typer.Option(help="Shuffle the images in a fixed order; otherwise they are sorted by path.")
    ] = True,
) -> None:
    """Pack a folder or a zip file of images into WebDataset tars.

    In the default layout, captions come from .txt files beside the images and classes from .cls files (numbers).
    Fields of .json files beside the images, such as scores, are kept in all layouts.

    Example: ibq shards pack photos --out shards/photos --shorter-side 256

    One folder per class, named in classes.json: ibq shards pack imagenet/train --out shards/imagenet --layout imagenet

    COCO: ibq shards pack val2017.zip --out shards/coco --layout coco --annotations annotations/captions_val2017.json
    """
    from data.prep.pack import pack

    with progress("packing", lines=False) as on_progress:
        report = pack(
            source,
            out,
            layout=layout,
            annotations=annotations,
            classes=classes,
            prefix=prefix,
            max_samples_per_shard=max_samples_per_shard,
            max_bytes_per_shard=max_bytes_per_shard,
            shorter_side=shorter_side,
            quality=quality,
            shuffle=shuffle,
            progress=on_progress,
        )
    echo(f"packed {counted(report.samples, 'image')} into {counted(len(report.shards), 'tar')} in {out}")
    if layout == "imagenet" and classes is None:
        echo(f"numbered the class folders in sorted order; pack other splits with --classes {out}/classes.json")
    _print_names(
        "skipped {} that cannot be read", [f"{skipped.source}: {skipped.reason}" for skipped in report.skipped]
    )
    _print_names(f"packed {{}} without a caption in {annotations}", report.without_caption)
    _print_names(f"left out captions of {{}} that are not in {source}", report.without_image)


@app.command()
def check(
    context: typer.Context,
    paths: Paths,
    decode: Annotated[
        bool, typer.Option("--decode", help="Also decode every image; tokens are always checked.")
    ] = False,
    index: Index = None,
    write: Annotated[
        bool, typer.Option("--write-index", help="Write the index if no tar is broken, instead of comparing with it.")
    ] = False,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave broken tars out of the index.")] = False,
    image: Annotated[
        list[str] | None,
        typer.Option(metavar="SUFFIX", help="Suffix of the images, as in a source's `image`; repeat it for more."),
    ] = None,
    json_file: Json = None,
    jobs: Jobs = None,
) -> None:
    """Find damaged, empty and duplicate tars and samples, and write the index that training uses.

    Also finds the unusable images of folders and zip files, which have no index. Reads every tar completely, even if it
    is in the index: only the content proves that it has not changed. Exit status 1 if something is wrong. The JSON has
    one line for each tar, folder or zip file.

    Example: ibq shards check shards/photos --write-index

    Remote tars: ibq shards check s3://bucket/photos --write-index --index photos.safetensors
    """
    from data.errors import DataError
    from data.folder_reader import find_images, is_files, is_zip
    from data.index import INDEX_NAME, Index, is_index, write_index
    from data.locks import WriterLock, file_lock, folder_lock
    from data.parallel import cores
    from data.prep.check import check_shards, find_duplicates, missing_shards
    from data.shards import expand
    from data.sources import Layout

    if misplaced := next((path for path in paths if path.endswith(".safetensors")), None):
        raise DataError(f"{misplaced} is not a tar; to use an index, write --index {misplaced}")
    if skip_broken and not write:
        raise typer.BadParameter("--skip-broken needs --write-index")
    # A folder without images is left to `expand`, which says what it lacks.
    files = [path for path in dict.fromkeys(paths) if is_zip(path) or (is_files(path) and find_images(Path(path)))]
    if files and (write or index):
        raise DataError(f"an index is of tars, and {files[0]} needs none: leave out --write-index and --index")
    tars = list(dict.fromkeys(expand([path for path in paths if path not in files]))) if set(paths) - set(files) else []
    urls, place = files + tars, index or (_index_place(tars, write) if tars else None)
    _check_output(json_file, _is_check)
    if write:
        # A file of the default name beside the tars is an index, even if it is too damaged to be known as one.
        _check_output(place, is_index if index else lambda file: True)
        # The index beside the tars belongs to their folder, which `ibq tokenize` may be filling.
        of_folder = place.name == INDEX_NAME
        lock = folder_lock(place.parent) if of_folder else file_lock(place)
        context.with_resource(WriterLock(lock, place.parent if of_folder else place)).take()
    known = Index(place) if place and not write else None
    layout, workers = Layout(image=tuple(image or ())), min(jobs or cores(), len(urls))
    found, broken = [], 0
    with progress("checking", lines=False) as on_progress:
        for checked in check_shards(urls, index=known, decode_images=decode, layout=layout, jobs=workers):
            found.append(checked)
            broken += checked.status == "broken"
            on_progress(len(found), len(urls), f"{broken:,} broken" if broken else "")
    find_duplicates(found)
    if known:
        found += missing_shards(found, known)
    say = functools.partial(echo, err=json_file == STDOUT)
    for text in shards_text.problems(found):
        typer.echo(text, err=json_file == STDOUT)  # in colours, on a terminal
    whole = [checked for checked in found if checked.table is not None]
    if write and whole and (skip_broken or len(whole) == len(found)):
        entries = zip(*((checked.url, checked.table, checked.sha256) for checked in whole), strict=True)
        write_index(place, *entries, layout.image)
        samples = counted(sum(checked.samples for checked in whole), "sample")
        say(f"wrote {place}: {counted(len(whole), 'tar')}, {samples}")
    elif write:
        say("wrote no index: move the broken tars elsewhere, or leave them out with --skip-broken")
    _write_json(json_file, "".join(json.dumps(checked.record()) + "\n" for checked in found))
    if any(checked.status != "ok" for checked in found):
        raise typer.Exit(1)


@app.command()
def stats(
    paths: Paths,
    samples: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Count only this many samples, spread evenly.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Entry of data/sources.yaml, which says where captions and scores are."),
    ] = None,
    decode: Annotated[bool, typer.Option("--decode", help="Also decode every image, to count damaged ones.")] = False,
    index: Index = None,
    picture: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the histograms.")] = None,
    json_file: Json = None,
    jobs: Jobs = None,
) -> None:
    """Count images, their sizes and shapes, tokens, captions, classes and scores, and draw them as bars.

    Also for a folder or a zip file of images. Reads only the images' headers, unless --decode is given.

    Example: ibq shards stats shards/photos --picture photos.png
    """
    from data.config import SourceConfig
    from data.errors import DataError
    from data.parallel import cores
    from data.prep.stats import count
    from data.sources import catalogue, open_source

    if source is not None and source not in catalogue():
        raise DataError(f"data/sources.yaml has no {source}: choose one of {', '.join(catalogue())}")
    if picture is not None and picture.suffix != ".png":
        raise typer.BadParameter(f"{picture} does not end in .png", param_hint="--picture")
    _check_output(json_file, _is_count)
    _check_output(picture, shards_text.is_drawn)
    root = paths[0] if len(paths) == 1 else paths
    config = SourceConfig(name=source or "images", root=root, index=str(index) if index else None)
    with progress("looking for samples", lines=False) as on_progress:
        opened = open_source(config, scan_all=True, progress=on_progress)
    with progress("counting", lines=False) as on_progress:
        found = count(opened, samples, jobs or cores(), on_progress, decode_images=decode)
    say = functools.partial(echo, err=json_file == STDOUT)
    title = shards_text.title(paths, len(opened.shards), opened.samples, found)
    besides = [f"  {opened.not_read}"] if opened.not_read else []
    for line in [title, *besides, *shards_text.summary(found, opened.layout.fields)]:
        say(line)
    drawn = found.histograms()
    for histogram in drawn:
        say("\n" + "\n".join(shards_text.histogram_lines(histogram)))
    if picture and drawn:
        shards_text.draw_histograms(drawn, title, picture)
        say(f"\ndrew {picture}")
    shards = {"shards": len(opened.shards), "samples_in_all": opened.samples}
    _write_json(json_file, json.dumps({**shards, **found.record()}, indent=2) + "\n")


def _index_place(urls: list[str], write: bool) -> Path | None:
    """The default place of the index, or None if there is none to compare with."""
    from data.addresses import is_remote
    from data.errors import DataError
    from data.index import INDEX_NAME, common_root

    if any(map(is_remote, urls)):
        if write:
            raise DataError("an index cannot be written beside remote tars; choose a place with --index FILE")
        return None
    place = Path(common_root(urls)) / INDEX_NAME
    return place if write or place.is_file() else None


def _check_output(place: str | Path | None, is_earlier: Callable[[Path], bool]) -> None:
    """Fails before all the work if a file cannot be written, or if there is one already that is not empty and that this
    command did not write. Raises DataError."""
    from data.errors import DataError

    if place is None or place == STDOUT:
        return
    place = Path(place)
    if place.is_dir() or not os.access(place.absolute().parent, os.W_OK):
        raise DataError(f"cannot write {place}: choose a file in an existing, writable folder")
    try:
        is_free = not place.is_file() or place.stat().st_size == 0 or is_earlier(place)
    except OSError as error:
        raise DataError(f"cannot read {place}, which exists: {error.strerror}; choose another file") from error
    if not is_free:
        raise DataError(f"{place} already exists and is of no earlier call: choose another file, or remove it")


def _is_check(file: Path) -> bool:
    """Whether the first line of a file is one of `ibq shards check --json`."""
    with file.open("rb") as lines:
        return _is_object(lines.readline(), {"shard", "status", "sha256"})


def _is_count(file: Path) -> bool:
    """Whether a file was written by `ibq shards stats --json`."""
    return _is_object(file.read_bytes(), {"shards", "samples_in_all"})


def _is_object(text: bytes, keys: set[str]) -> bool:
    try:
        return keys <= json.loads(text).keys()
    except (ValueError, AttributeError):
        return False


def _write_json(place: str | None, content: str) -> None:
    from data.errors import DataError

    if place == STDOUT:
        echo(content, nl=False)
    elif place is not None:
        try:
            Path(place).write_text(content, encoding="utf-8")
        except OSError as error:
            raise DataError(f"cannot write {place}: {error.strerror}; choose another file") from error


@app.command()
def sources(name: Annotated[str | None, typer.Argument(help="Print how to get this data set.")] = None) -> None:
    """List the data sets of the catalogue, or print how to get one of them.

    Example: ibq shards sources cc12m
    """
    from data.errors import DataError
    from data.sources import catalogue

    entries = catalogue()
    if name is None:
        width = max(map(len, entries))
        for one, entry in entries.items():
            echo(f"{one:{width}}  {entry['title']}")
        return
    if name not in entries:
        raise DataError(f"the catalogue has no {name}; choose one of {', '.join(entries)}")
    for key in ("title", "home", "license", "images", "bytes"):
        if key in entries[name]:
            echo(f"{key:8} {str(entries[name][key]).strip()}")
    echo(f"\n{entries[name]['how'].strip()}")


@app.command()
def audit(run: Annotated[Path, typer.Argument(help="A run trained with data.audit=true.")]) -> None:
    """Count a run's samples by source and epoch. Exit status 1 if a sample came twice in an epoch.

    Example: ibq shards audit runs/mine
    """
    from trainer.prefetch import read_audit

    seen: dict[tuple[str, int], Counter] = {}
    steps = set()
    found = read_audit(run)
    for one in found.delivered:
        steps.add(one.step)
        seen.setdefault((one.source, one.epoch), Counter())[one.shard, one.key] += 1
    total = sum(counts.total() for counts in seen.values())
    echo(f"{counted(len(steps), 'step')}, {counted(total, 'image')}")
    for source in sorted({source for source, _ in seen}):
        of_source = {epoch: counts for (name, epoch), counts in sorted(seen.items()) if name == source}
        images = sum(counts.total() for counts in of_source.values())
        echo(f"{source}: {counted(images, 'image')}, {images / total:.2%} of all")
        for epoch, counts in of_source.items():
            twice = [key for key, count in counts.items() if count > 1]
            more = f", {len(twice):,} of them more than once, first {twice[0][1]} in {twice[0][0]}" if twice else ""
            of = f" of {found.samples_of_sources[source]:,}" if found.samples_of_sources.get(source) else ""
            echo(f"  epoch {epoch}: {len(counts):,}{of} samples{more}")
    for missing in found.missing_steps:
        echo(f"steps {missing[0]} to {missing[-1]} were trained without an audit")
    if any(max(counts.values()) > 1 for counts in seen.values()):
        raise typer.Exit(1)


def _print_names(what: str, names: list[str]) -> None:
    """Prints number and names of images to stderr, if there are any."""
    if names:
        echo(what.format(f"{len(names):,}") + ":", err=True)
        for name in names[:NAMED]:
            echo(f"  {name}", err=True)
        if len(names) > NAMED:
            echo(f"  and {len(names) - NAMED:,} more", err=True)
