"""Folders and zip files in which more lies than one would expect."""

import json
import zipfile
from pathlib import Path

from samples import encoded, picture, write_tar


def write_class_zip(path: Path, *others: str) -> Path:
    """set/cat/0.png, set/dog/0.png, and these other files, which are no pictures."""
    with zipfile.ZipFile(path, "w") as file:
        for number, name in enumerate(("cat", "dog")):
            file.writestr(f"set/{name}/0.png", encoded(picture(number), "PNG"))
        for name in others:
            file.writestr(name, "text")
    return path


def write_capitals(folder: Path) -> Path:
    """0.JPG with a caption and a class in files whose suffixes are in capitals."""
    folder.mkdir()
    for name, content in (("0.JPG", encoded(picture(0))), ("0.TXT", b"a wave"), ("0.CLS", b"5")):
        (folder / name).write_bytes(content)
    return folder


def write_images_and_tars(folder: Path, image: str, tar: str) -> Path:
    """One picture and one tar at these paths in the folder."""
    for name in (image, tar):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / image).write_bytes(encoded(picture(0)))
    write_tar(folder / tar, [{"__key__": "a", "jpg": encoded(picture(1))}])
    return folder


def write_coco(folder: Path, paths: list[str], file_names: list[str]) -> tuple[Path, Path]:
    """Pictures at these paths, and annotations of files with these names; the caption of each is its name."""
    for number, path in enumerate(paths):
        (folder / "photos" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "photos" / path).write_bytes(encoded(picture(number)))
    images = [{"id": 10 + number, "file_name": name} for number, name in enumerate(file_names)]
    captions = [{"image_id": 10 + number, "caption": name} for number, name in enumerate(file_names)]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    return folder / "photos", folder / "captions.json"
