"""Images or their tokens from WebDataset tars: packing, decoding, the endless training stream and the ordered
evaluation stream."""


class DataError(Exception):
    """A mistake in the data or in how it is asked for; one line that names the mistake and the mend."""


from data.evaluation import (  # noqa: E402
    EvaluationImage,
    EvaluationImages,
    EvaluationToken,
    EvaluationTokens,
    evaluation_images,
    evaluation_tokens,
)
from data.loader import (  # noqa: E402
    Batch,
    DataConfig,
    TrainStream,
    access_of,
    check,
    token_header,
    train_batches,
)
from data.pack import PackReport, pack  # noqa: E402
from data.photographs import cache_folder  # noqa: E402
from data.shards import Skipped, expand, scan  # noqa: E402
from data.sources import FilterConfig, SourceConfig, catalogue  # noqa: E402
from data.storage import redacted  # noqa: E402
from data.stream import add_totals, merge_states  # noqa: E402
from data.tokens import TokenHeader, TokenSpec, pack_codes, unpack_codes  # noqa: E402
from data.transforms import ImageError, decode  # noqa: E402

__all__ = [
    "Batch",
    "DataConfig",
    "DataError",
    "EvaluationImage",
    "EvaluationImages",
    "EvaluationToken",
    "EvaluationTokens",
    "FilterConfig",
    "ImageError",
    "PackReport",
    "Skipped",
    "SourceConfig",
    "TokenHeader",
    "TokenSpec",
    "TrainStream",
    "access_of",
    "add_totals",
    "cache_folder",
    "catalogue",
    "check",
    "decode",
    "evaluation_images",
    "evaluation_tokens",
    "expand",
    "merge_states",
    "pack",
    "pack_codes",
    "redacted",
    "scan",
    "token_header",
    "train_batches",
    "unpack_codes",
]
