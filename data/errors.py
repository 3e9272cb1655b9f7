"""The exceptions of the package."""


class DataError(Exception):
    """A mistake of the user: the data, or a setting, cannot be used. The message is one line and says how to fix it."""


class MissingError(DataError):
    """There is no such object."""


class ReplacedError(DataError):
    """An object is another one than before."""


class UnreadableError(DataError):
    """A server does not give an object."""


class DeniedError(UnreadableError):
    """An object may not be read. Some stores say so of a missing one, too."""


class NoTarsError(DataError):
    """A folder of a bucket that holds no tars, or does not exist; buckets do not tell these apart."""


class ImageError(Exception):
    """A sample that cannot be used: unreadable, truncated or too large. The message is the reason in one line.

    kind: what `ibq shards check` counts it as. key: the sample's, where the reader has no sample that tells it.
    """

    def __init__(self, message: str, kind: str = "undecodable", key: str | None = None):
        super().__init__(message)
        self.kind, self.key = kind, key


class Filtered(Exception):
    """A valid sample that a filter leaves out. The message is the filter's name."""
