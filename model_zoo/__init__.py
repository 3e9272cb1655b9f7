"""Models of `ibq`: quantizers, tokenizers, generators, discriminator, losses. Independent of ranks and of the trainer.

Names carry shapes: b batch, c channels, h and w height and width, n tokens, k codes, d code dimension
(``z_nd`` is tokens x code dimension).
"""

from importlib import import_module

from model_zoo.errors import ModelError

# Where each public name is defined. Names are imported at first use, so that importing one part of the package does
# not import all of it.
_DEFINED_IN = {
    "model_zoo.config": ("Sampling", "TokenizerConfig", "TransformerConfig"),
    "model_zoo.io.load": ("load_generator", "load_tokenizer"),
    "model_zoo.sampler": ("Sampler",),
    "model_zoo.tokenizer": ("Tokenizer",),
    "model_zoo.transformer": ("Transformer",),
}
_MODULE_OF = {name: module for module, names in _DEFINED_IN.items() for name in names}

__all__ = ["ModelError", "ops", *_MODULE_OF]


def __getattr__(name: str):
    if name == "ops":
        return import_module("model_zoo.ops")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
