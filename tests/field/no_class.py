"""Pictures whose NAME.cls says that they have no class, or says nothing that is a class."""

from pathlib import Path

from samples import encoded, picture, write_tar

NO_CLASS = ["-1", "", " \n"]
CLASS_7, NO_NUMBER = "7", "cat"


def write_tar_without_classes(path: Path) -> str:
    """A tar of s0, s1 and s2 without a class, s3 of class 7, and s4 whose class is no number."""
    contents = [*NO_CLASS, CLASS_7, NO_NUMBER]
    samples = [{"__key__": f"s{n}", "jpg": encoded(picture(n)), "cls": c.encode()} for n, c in enumerate(contents)]
    return write_tar(path, samples)


def write_folder_without_classes(folder: Path) -> Path:
    """s0.png, s1.png and s2.png without a class, and s3.png of class 7."""
    folder.mkdir()
    for n, content in enumerate([*NO_CLASS, CLASS_7]):
        picture(n).save(folder / f"s{n}.png")
        (folder / f"s{n}.cls").write_text(content)
    return folder
