"""What a file that is no tar is, by its first bytes, and what to do with it."""

IMAGE = "pictures are read as JPEG, PNG or WebP, from a folder, a zip file or a tar"
OTHER_IMAGE = f"convert it to PNG; {IMAGE}"
FILES_BY_START = {
    b"\x1f\x8b": "it is compressed with gzip: unpack it",
    b"BZh": "it is compressed with bzip2: unpack it",
    b"\xfd7zXZ": "it is compressed with xz: unpack it",
    b"\x28\xb5\x2f\xfd": "it is compressed with zstd: unpack it",
    b"PK\x03\x04": "it is a zip file: unpack it, and pack what is in it",
    b"Rar!": "it is a RAR archive: unpack it, and pack what is in it",
    b"7z\xbc\xaf\x27\x1c": "it is a 7z archive: unpack it, and pack what is in it",
    b"PAR1": "it is a Parquet file: write its images to a folder, and pack them",
    b"\x89HDF": "it is an HDF5 file: write its images to a folder, and pack them",
    b"version https://git-lfs": "it is a Git LFS pointer: `git lfs pull` gets the file",
    b"<svg": f"it is an SVG drawing: {OTHER_IMAGE}",
    b"<": "it is a web page, such as a server's error message: download it again",
    b"\xff\xd8\xff": f"it is a JPEG image: name the folder that it is in; {IMAGE}",
    b"\x89PNG": f"it is a PNG image: name the folder that it is in; {IMAGE}",
    b"GIF8": f"it is a GIF image: {OTHER_IMAGE}",
    b"II*\0": f"it is a TIFF image: {OTHER_IMAGE}",
    b"MM\0*": f"it is a TIFF image: {OTHER_IMAGE}",
    b"\xff\x0a": f"it is a JPEG XL image: {OTHER_IMAGE}",
}
START_BYTES = 32
PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")  # ends of names


def kind_of(start: bytes) -> str | None:
    """What a file is that begins with these START_BYTES bytes and is no tar, and what to do; None if unknown."""
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return f"it is a WebP image: name the folder that it is in; {IMAGE}"
    if start[4:12] in (b"ftypavif", b"ftypheic", b"ftypheix", b"ftypmif1"):
        return f"it is a HEIC or AVIF image: {OTHER_IMAGE}"
    if start[:2] == b"BM" and start[6:10] == bytes(4) and start[14:15] in (b"\x0c", b"\x28", b"\x6c", b"\x7c"):
        return f"it is a BMP image: {OTHER_IMAGE}"
    return next((what for known, what in FILES_BY_START.items() if start.startswith(known)), None)
