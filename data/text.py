"""Names of files and samples in messages: whatever they hold, a terminal shows it and obeys none of it."""

import io
import re
import sys

# Control characters of ASCII and Latin-1, separators of lines, marks that reorder text, and bytes that are no UTF-8.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    """The text with what a terminal would act on as an escape, such as ``\\x1b``. keep: characters to leave, such as a
    newline; by default the result is one line."""
    return UNPRINTABLE.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def accept_all_names() -> None:
    """From now on what the terminal's encoding does not have is written as an escape, and raises nothing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
