"""Images from WebDataset tars: packing, decoding, the endless training stream and the ordered evaluation stream."""


class DataError(Exception):
    """A mistake in the data or in how it is asked for; one line that names the mistake and the mend."""


from data.loader import Batch, DataConfig, EvaluationImage, EvaluationImages, check, evaluation_images, train_batches  # noqa: E402
from data.shards import PackReport, Shard, Skipped, expand, pack, scan  # noqa: E402
from data.stream import merge_states  # noqa: E402
from data.transforms import ImageError, decode  # noqa: E402

__all__ = [
    "Batch",
    "DataConfig",
    "DataError",
    "EvaluationImage",
    "EvaluationImages",
    "ImageError",
    "PackReport",
    "Shard",
    "Skipped",
    "check",
    "decode",
    "evaluation_images",
    "expand",
    "merge_states",
    "pack",
    "scan",
    "train_batches",
]
