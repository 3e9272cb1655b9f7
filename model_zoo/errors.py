"""The exception for user errors concerning models."""


class ModelError(Exception):
    """A request that a model cannot fulfil. The message is one line and says how to fix it."""
