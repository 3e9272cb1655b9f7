"""A recipe's `data` section, as plain dataclasses: reading a recipe imports no code that reads data.

The metadata of a field hold the bounds of its number: ``at_least``, ``above`` and ``at_most``.
"""

import math
import operator
from dataclasses import dataclass, field, fields
from typing import Any

from data.errors import DataError

MOST_CODES = 2**24  # of a tokenizer: codes that a token shard can hold
COMPARISONS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le}


@dataclass
class FilterConfig:
    """Which samples are left out. Bounds are inclusive; None: no bound. A filter's number is read from the field of the
    sample's JSON that the catalogue names; a sample without the number is left out.

    min_side: pixels of the image's shorter side. max_aspect_ratio: longer side over shorter side.
    keys, not_keys: text files with one key per line: only these samples; none of these.
    """

    min_side: int | None = None
    max_aspect_ratio: float | None = None
    min_aesthetic: float | None = None
    max_nsfw: float | None = None
    max_watermark: float | None = None
    min_similarity: float | None = None
    keys: str | None = None
    not_keys: str | None = None


@dataclass
class SourceConfig:
    """One source of a mixture.

    name: an entry of the catalogue (`data/sources.yaml`), which says where images, captions and scores are in a sample,
        or a new name. root: tars, a folder or a zip file, as in `data.train`; None: the folder of that name in
        `data.root`. weight: its share of the samples, relative to the other sources. index: a file that `ibq shards
        check --write-index` wrote; None: index.safetensors beside the tars, if it exists.
    image, caption, class_from: suffixes of a sample's members (image: in order of preference), where the catalogue has
        none or another layout; class_from may be `folder`. caption_field: the caption is this field of the member
        `json`. fields: a filter's number (aesthetic, nsfw, watermark, similarity) -> the field of the member `json`.
        like: the entry of the catalogue to use for a source whose name is not in it.
    """

    name: str = "train"
    root: Any = None
    weight: float = 1.0
    index: str | None = None
    image: list[str] | None = None
    caption: str | None = None
    caption_field: str | None = None
    class_from: str | None = None
    fields: dict[str, str] = field(default_factory=dict)
    like: str | None = None
    filters: FilterConfig = field(default_factory=FilterConfig)


@dataclass
class DataConfig:
    """The recipe's `data` section. Sizes are in pixels, crop_scale in shares of the image's area."""

    train: Any = None
    val: Any = None
    # A mixture in place of `train`: a list of sources, see `SourceConfig`.
    sources: list[SourceConfig] = field(default_factory=list)
    # A folder or bucket that holds a folder for each source without a root, called as the source.
    root: str | None = None
    # What to do about sources that are not in `root`: `refuse` to start, or `skip` them.
    missing: str = "refuse"
    # A classes.json, as packing writes it: the numbers of class folders, which tars must agree with. None: the folders
    # are numbered in sorted order.
    classes: str | None = None
    # What a sample holds: `images`, or `tokens` as written by `ibq tokenize`.
    content: str = "images"
    image_size: int = field(default=256, metadata={"at_least": 1})
    # Buckets, for pictures of any shape: sizes as HEIGHTxWIDTH; or the sides of squares, around which sizes of about as
    # many pixels are made, from 1:max_aspect to max_aspect:1. They replace image_size in training and validation.
    buckets: list[str] = field(default_factory=list)
    pixels: list[int] = field(default_factory=list)
    max_aspect: float = field(default=2.0, metadata={"at_least": 1})
    # How far a picture may be enlarged to cover its bucket. Smaller ones are left out.
    max_enlargement: float = field(default=1.0, metadata={"at_least": 1})
    # Suffixes of the pictures in tars of `val`, as of a source's `image`. None: those of the source with the same root.
    val_image: list[str] | None = None
    # Side of validation crops; None: that of training. Convolutional models also accept other sizes.
    val_image_size: int | None = field(default=None, metadata={"at_least": 1})
    workers: int = field(default=4, metadata={"at_least": 0})
    # Number of independent sample streams. None: the global batch size or a multiple of it.
    lanes: int | None = field(default=None, metadata={"at_least": 1})
    crop: str = "random"
    crop_scale: list[float] = field(default_factory=lambda: [0.2, 1.0])
    resize: str = "pil_antialias"
    flip: bool = True
    # Strength of random changes of contrast, saturation, hue and brightness, 0 to 1: for small data sets.
    color_jitter: float = field(default=0.0, metadata={"at_least": 0, "at_most": 1})
    # Each lane shuffles blocks of this many samples of a shard, or of fewer samples that have this many megabytes.
    shuffle_block: int = field(default=64, metadata={"at_least": 1})
    shuffle_megabytes: float = field(default=16.0, metadata={"above": 0})
    # Shards to skip: paths, URLs or the ends of them.
    quarantine: list[str] = field(default_factory=list)
    # Training ends after more unusable samples in a row than this, or if more than this fraction of a source's last
    # 2,000 samples in a process are unusable.
    max_bad_in_a_row: int = field(default=100, metadata={"at_least": 1})
    max_bad_fraction: float = field(default=0.1, metadata={"at_least": 0, "at_most": 1})
    # Allows `pipe:COMMAND` as a shard, which runs a shell command.
    allow_pipes: bool = False
    # Folder for local copies of remote shards. None: no copies; byte ranges are read over the network.
    cache: str | None = None
    cache_gigabytes: float = field(default=100.0, metadata={"above": 0})
    # Time limits for remote reads: of one request, and of all its retries together.
    request_seconds: float = field(default=30.0, metadata={"above": 0})
    retry_seconds: float = field(default=300.0, metadata={"above": 0})
    # Writes the key of every delivered sample to RUN/audit/.
    audit: bool = False


def check_numbers(config: DataConfig) -> None:
    """Raises DataError for a number that is not finite or outside the bounds in its field's metadata."""
    for each in fields(config):
        value = getattr(config, each.name)
        for rule, bound in each.metadata.items():
            if value is not None and not (COMPARISONS[rule](value, bound) and value < math.inf):
                finite = " and finite" if isinstance(value, float) else ""
                raise DataError(f"data.{each.name}={value} must be {rule.replace('_', ' ')} {bound}{finite}")
