"""What `ibq tokenize` reads: the tokenizer, the images, and the settings that a job must have to continue another."""

import contextlib
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data.config import MOST_CODES, DataConfig, SourceConfig
from data.errors import ImageError
from data.loader import PROBED, image_suffixes
from data.prep.pack import mixed, unique_keys
from data.samples import CODES, Shard, is_image
from data.sources import Source, catalogue, classes_of, describe, digest, layout_of, open_source
from data.tar_reader import TarShard
from model_zoo.io.load import load_tokenizer
from model_zoo.tokenizer import Tokenizer
from trainer import TrainerError
from trainer.jobs.setup import data_config
from trainer.jobs.views import SizeOptions, Views, make_views, unused_buckets


class TokenizeInputs(NamedTuple):
    """settings: what a later job must have in common to continue. keys: a file's path -> its sample's key; empty for
    tars. classes: the number of each class, if it is known. notes: lines to print."""

    tokenizer: Tokenizer
    source: Source
    settings: dict
    views: Views
    keys: dict[str, str]
    classes: dict[str, int] | None
    notes: list[str]


def open_inputs(
    checkpoint: Path,
    images,
    kind: str,
    sizes: SizeOptions,
    weights: str,
    source: str,
    classes: str | Path | None,
    image: list[str] | None,
) -> TokenizeInputs:
    """Opens them; the parameters are those of `tokenize`. Raises TrainerError or DataError."""
    tokenizer = load_tokenizer(checkpoint, weights)
    if (codes := tokenizer.config.codebook_size) > MOST_CODES:
        raise TrainerError(
            f"{checkpoint} has {codes:,} codes, and token shards hold at most {MOST_CODES:,} (2^24): use a tokenizer "
            "of fewer codes"
        )
    config = data_config(checkpoint) or DataConfig()
    views = make_views(kind, sizes, config, tokenizer.downsampling_factor)
    notes = list(filter(None, [unused_buckets(sizes, config)]))
    if source != "images" and source not in catalogue():
        raise TrainerError(f"--source {source} is unknown: choose one of {', '.join(catalogue())}")
    if not catalogue().get(source, {}).get("layout", {}).get("image"):
        image = image_suffixes(config, images, image, "--images", "--image SUFFIX")
    described = SourceConfig(name=source, root=images, image=image)
    numbers = classes_of([described], None if classes is None else str(classes))
    opened = open_source(described, scan_all=True, classes=numbers)
    if _holds_tokens(opened.shards[0]):
        raise TrainerError(f"--images {images} holds tokens already: name images")
    if layout_of(described).label == "folder":
        _check_classes(opened)
    keys = _order_files(opened.shards[0])
    settings = {
        "tokenizer": tokenizer.fingerprint(),
        "codes": tokenizer.config.codebook_size,
        "views": kind,
        **views.settings(tokenizer.downsampling_factor),
        "resize": config.resize,
        "source": source,
        "input": {**opened.identity(), "files": digest(sorted(keys))},
    }
    if classes is not None:
        settings["classes"] = digest(sorted(numbers.items()))
    return TokenizeInputs(tokenizer, opened, settings, views, keys, numbers, notes)


def _check_classes(source: Source) -> None:
    """Raises TrainerError where a source has its classes by folders, and its first tar has none: the tokens would have
    none either, which would be noticed when a generator is trained on them."""
    shard = source.shards[0]
    if not isinstance(shard, TarShard):
        return
    window = next(iter(shard.windows(0, None, PROBED)), ())
    for n in range(len(window)):
        with contextlib.suppress(ImageError):  # a damaged sample is reported when it is tokenized
            if source.layout.label in window.read(n).members:
                return
    raise TrainerError(
        f"--source {source.name} has its classes by folders, which tars have as {source.layout.label} files, and the "
        f"first {len(window):,} samples of {shard.name} have none: name the folder of images, or pack it with `ibq "
        "shards pack --layout imagenet`; leave out --source if the tokens need no classes"
    )


def _holds_tokens(shard: Shard) -> bool:
    """Looks at the first sample, unless the shard is a remote tar without an index."""
    if not isinstance(shard, TarShard) or not shard.table:
        return False
    try:
        members = shard.read(0).members
    except ImageError:
        return False
    return CODES in members and not any(map(is_image, members))


def _order_files(shard: Shard) -> dict[str, str]:
    """Orders the images of a folder or a zip file so that classes mix within shards. Returns path -> key."""
    if isinstance(shard, TarShard):
        return {}
    paths = {PurePosixPath(shard.key(path)): path for path in shard.images}
    shard.images = [paths[name] for name in mixed(list(paths))]
    return {shard.key(paths[name]): key for name, key in unique_keys(list(paths)).items()}


def seen(inputs: TokenizeInputs) -> str:
    """What this rank finds, in a line, with a hash. A rank whose copy of a folder lacks captions or classes would write
    samples without them."""
    shard = inputs.source.shards[0]
    files = [] if isinstance(shard, TarShard) else [path.as_posix() for path in shard.own_files()]
    return f"{describe(inputs.source)} ({digest([inputs.settings, inputs.classes, files])})"
