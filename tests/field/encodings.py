"""Captions, classes and fields beside pictures, in the encodings that editors and older data sets have."""

import codecs
import json
from pathlib import Path

from samples import picture

CAPTION = "Café naïve, 猫"
READABLE = {
    "utf8": CAPTION.encode(),
    "bom": CAPTION.encode("utf-8-sig"),
    "utf16": codecs.BOM_UTF16_LE + CAPTION.encode("utf-16-le"),
    "utf16big": codecs.BOM_UTF16_BE + CAPTION.encode("utf-16-be"),
}
UNREADABLE = {"latin": "Café naïve".encode("latin-1"), "japanese": "猫です".encode("shift-jis")}
# These are valid UTF-8, or UTF-16 with its mark, by accident.
ACCIDENTAL = {
    "utf16_without_mark": "a cat".encode("utf-16-le"),
    "utf16big_without_mark": "a cat".encode("utf-16-be"),
    "utf32": codecs.BOM_UTF32_LE + "a cat".encode("utf-32-le"),
    "utf32_without_mark": "a cat".encode("utf-32-be"),
    "iso2022": "猫の写真".encode("iso-2022-jp"),
    "padded": b"a cat\0\0",
}
UNREADABLE |= ACCIDENTAL


def write_captions(folder: Path, captions: dict[str, bytes]) -> Path:
    """NAME.png and NAME.txt for each caption, and class 7 with a byte order mark in NAME.cls; returns the folder."""
    folder.mkdir()
    for number, (name, content) in enumerate(captions.items()):
        picture(number).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_bytes(content)
        (folder / f"{name}.cls").write_bytes("7\r\n".encode("utf-8-sig"))
    return folder


def write_fields(folder: Path, fields: dict[str, object]) -> Path:
    """NAME.png and NAME.json for each name; returns the folder."""
    folder.mkdir()
    for number, (name, content) in enumerate(fields.items()):
        picture(number).save(folder / f"{name}.png")
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder
