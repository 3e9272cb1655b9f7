"""VQGAN-LC: a frozen table of a pretrained encoder's features and a trained linear layer (arXiv 2406.11837), a
baseline."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from model_zoo.config import TokenizerConfig
from model_zoo.errors import ModelError
from model_zoo.ops.codebook_parallel import CodebookShard
from model_zoo.quantizers.projected import LinearCodebook


class LargeCodebookQuantizer(LinearCodebook):
    """Codes are a linear projection of cluster centres: k = argmin_j |z - P(c_j)|^2, straight-through, and both VQ
    losses, of which only the projector P and the encoder learn. The paper's centres are those of CLIP features, by
    k-means within each class of ImageNet.

    What the paper leaves open follows the released code: P has a bias, its weights start with standard deviation
    code_dim^-0.5, and beta = 0.33 weights the codebook's term (``loss.quantizer.form=reference``).

    A new run reads the table from the file ``model.codes`` (`read_codes`) and stores it in its checkpoints, so that the
    file is not needed again. A model that is built outside training has a random table until weights are loaded.
    ``model.codebook_init`` has no effect.
    """

    def __init__(self, config: TokenizerConfig, shard: CodebookShard | None = None):
        super().__init__(config, shard, row_dim=config.table_dim, row_std=config.table_dim**-0.5)
        self.file = config.codes
        nn.init.normal_(self.projector.weight, std=config.code_dim**-0.5)

    @torch.no_grad()
    def read_codes(self) -> None:
        """Replaces the table by the rows of the file. Raises ModelError if it is missing or does not fit."""
        self.embedding.weight.copy_(read_table(self.file, *self.embedding.weight.shape))


def read_table(file: str | None, rows: int, row_dim: int) -> Tensor:
    """Reads ``rows x row_dim`` numbers from a .npy file, or from a .safetensors file with one tensor; fp32. Raises
    ModelError."""
    wanted = f"a .npy or .safetensors file of {rows} rows of {row_dim} values"
    if file is None:
        raise ModelError(f"model.quantizer=vqgan_lc needs its table: give {wanted} with model.codes=FILE")
    path = Path(file)
    if path.suffix not in (".npy", ".safetensors"):
        raise ModelError(f"model.codes={file} must be {wanted}")
    if not path.is_file():
        raise ModelError(f"model.codes={file} does not exist: give {wanted}")
    table_kr = _read_npy(path) if path.suffix == ".npy" else _read_safetensors(path)
    if table_kr.ndim != 2 or table_kr.is_complex():
        raise ModelError(f"model.codes={file} holds a tensor of shape {list(table_kr.shape)}: give {wanted}")
    for key, found, expected in (
        ("codebook_size", table_kr.shape[0], rows),
        ("table_dim", table_kr.shape[1], row_dim),
    ):
        if found != expected:
            shape = " x ".join(map(str, table_kr.shape))
            raise ModelError(f"model.codes={file} holds {shape} values, but model.{key}={expected}: give {found}")
    table_kr = table_kr.float()
    if not table_kr.isfinite().all():
        raise ModelError(f"model.codes={file} holds values that are not finite")
    return table_kr


def _read_npy(path: Path) -> Tensor:
    import numpy as np  # slow to import, and only new runs need it

    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (ValueError, TypeError, AttributeError, OSError, EOFError) as error:
        raise ModelError(f"model.codes={path} cannot be read: {' '.join(str(error).split())}") from error


def _read_safetensors(path: Path) -> Tensor:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"model.codes={path} cannot be read: {' '.join(str(error).split())}") from error
    if len(tensors) != 1:
        raise ModelError(f"model.codes={path} holds {len(tensors)} tensors: give a file of one tensor")
    return next(iter(tensors.values()))
