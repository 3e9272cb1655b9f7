"""Folders of pictures with links, as shared disks have them (torchvision #1580, timm #334)."""

from pathlib import Path

from samples import picture


def write_linked_classes(folder: Path) -> Path:
    """FOLDER/set with the classes bird, cat (a link to a folder elsewhere, which has a link inside) and dog; each has
    two pictures. A link leads back to the set."""
    places = [folder / "set" / "bird", folder / "elsewhere" / "cats", folder / "set" / "dog"]
    for number, place in enumerate(places):
        place.mkdir(parents=True)
        for n in range(2):
            picture(2 * number + n).save(place / f"{n}.png")
    more = folder / "elsewhere" / "more"
    more.mkdir()
    (folder / "elsewhere" / "cats" / "1.png").rename(more / "1.png")
    (folder / "elsewhere" / "cats" / "more").symlink_to(more)
    (folder / "set" / "cat").symlink_to(folder / "elsewhere" / "cats")
    (folder / "set" / "dog" / "around").symlink_to(folder / "set")
    return folder / "set"
