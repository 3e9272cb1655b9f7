"""The exception for mistakes of the user in models."""


class ModelError(Exception):
    """A model cannot do what was asked of it. The message is one line and says how to fix it."""
