"""Small copies of the eight sources of web images, in the layouts in which they are published or downloaded."""

import json
from collections.abc import Iterable
from pathlib import Path

from samples import encoded, index_of, picture, write_tar

NAMES = (
    *("cc3m", "cc12m", "laion-coco", "capfusion"),
    *("laion-aesthetics-12m", "laion-aesthetics-v2", "journeydb", "laion-hd"),
)
SIZES = (32, 24), (20, 40), (16, 16)  # width, height; the last is too small for a filter of 20 pixels


def make_web_sources(folder: Path, names: Iterable[str] = NAMES) -> Path:
    """Makes FOLDER/NAME with two tars of six pictures for each name; returns the folder. Some have an index, as
    `ibq shards check --write-index` writes it; FOLDER/laion-coco.json is one of its json members."""
    for place, name in enumerate(names):
        (folder / name).mkdir()
        for tar in range(2):
            write_tar(folder / name / f"{tar:05d}.tar", (_sample(name, tar, n, folder) for n in range(6)))
        if place % 2:
            index_of(folder / name, folder / name / "index.safetensors")
    return folder


def _sample(name: str, tar: int, number: int, folder: Path) -> dict[str, bytes]:
    size = SIZES[number % 3]
    key = f"{tar:05d}{number:04d}" + ("small" if size == SIZES[-1] else "")
    image, caption = picture(100 * tar + number, size), f"a caption of {name}"
    about = {"key": key, "status": "success", "caption": caption, "original_width": size[0], "original_height": size[1]}
    if name.startswith("laion"):
        about |= {"punsafe": 0.01, "pwatermark": 0.2, "similarity": 0.33}
    if name.startswith("laion-aesthetics"):
        about |= {"AESTHETIC_SCORE": 6.4}
    if name == "journeydb":  # PNG; prompts are packed as captions
        return {"__key__": key, "png": encoded(image, "PNG"), "txt": caption.encode()}
    if name == "laion-coco":  # the caption that BLIP wrote is in the json
        about |= {"top_caption": caption, "caption": "alternative text"}
        (folder / "laion-coco.json").write_text(json.dumps(about))
    text = about["caption"].encode()
    # The published configuration also looks for the doubled suffix, which some downloads have.
    suffix = "jpeg.jpg" if name == "laion-hd" else "jpg"
    return {"__key__": key, suffix: encoded(image), "txt": text, "json": json.dumps(about).encode()}
