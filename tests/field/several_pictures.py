"""Pictures of one name in two formats, as conversion leaves them."""

from pathlib import Path

from samples import encoded, picture, write_tar


def write_two_of_one_name(path: Path) -> str:
    """A tar of a.jpg and a.png, which are different pictures, and b.jpg."""
    both = {"jpg": encoded(picture(1)), "png": encoded(picture(2), "PNG")}
    return write_tar(path, [{"__key__": "a", **both}, {"__key__": "b", "jpg": encoded(picture(3))}])
