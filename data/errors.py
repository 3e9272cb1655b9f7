"""The exception for mistakes of the user in data."""


class DataError(Exception):
    """The data, or how it was asked for, cannot be used. The message is one line and says how to fix it."""
