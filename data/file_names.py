"""Names of files that are made from other names."""

import hashlib

MOST_BYTES = 255  # of a file's name, on nearly all file systems


def fitted(before: str, name: str, after: str) -> str:
    """BEFORE + NAME + AFTER as a file's name. Where that is too long, a hash replaces the end of NAME, which may itself
    have as many bytes as a file's name can have."""
    content = name.encode("utf-8", "surrogateescape")
    room = MOST_BYTES - len((before + after).encode("utf-8", "surrogateescape"))
    if len(content) <= room:
        return before + name + after
    kept = content[: room - 9].decode("utf-8", "ignore")
    return f"{before}{kept}-{hashlib.sha256(content).hexdigest()[:8]}{after}"
