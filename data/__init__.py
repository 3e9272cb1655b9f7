"""Images or their tokens from WebDataset tars: packing, decoding, the infinite training stream and the ordered
evaluation stream."""

from importlib import import_module

from data.errors import DataError

# Where each public name is defined. A name is imported when it is first used, so that importing one part of the
# package does not import all of it.
_DEFINED_IN = {
    "data.config": ("DataConfig", "FilterConfig", "SourceConfig"),
    "data.addresses": ("redacted",),
    "data.buckets": ("check_batches", "grid_sizes", "image_sizes"),
    "data.cache": ("cache_folder",),
    "data.classes": ("CLASSES_NAME",),
    "data.errors": ("ImageError",),
    "data.evaluation": (
        "EvaluationImage",
        "EvaluationImages",
        "EvaluationToken",
        "EvaluationTokens",
        "evaluation_images",
        "evaluation_tokens",
        "in_batches",
    ),
    "data.loader": (
        *(
            "Batch",
            "TrainStream",
            "access_of",
            "check",
            "check_remote_data",
            "class_numbers",
            "token_header",
            "train_batches",
        ),
        "validation_options",
        "validation_sizes",
    ),
    "data.prep.pack": ("PackReport", "pack"),
    "data.samples": ("Skipped",),
    "data.shards": ("expand",),
    "data.sources": ("catalogue",),
    "data.stream_state": ("add_totals", "merge_states"),
    "data.tar_reader": ("scan",),
    "data.tokens": ("TokenHeader", "TokenSpec", "pack_codes", "unpack_codes"),
    "data.transforms": ("Size", "decode"),
}
_MODULE_OF = {name: module for module, names in _DEFINED_IN.items() for name in names}

__all__ = ["DataError", *_MODULE_OF]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
