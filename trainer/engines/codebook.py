"""The codebook's own engine: rows, gradient and optimiser state are on the ranks that own them, and nowhere else."""

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from model_zoo.tokenizer import codebook_rows, codebook_rows_file, codebook_rows_files
from trainer.engines.replicated import Replicated
from trainer.parallel import CodebookGroups, sum_over_ranks


class Codebook(Replicated):
    """A quantizer whose codebook is spread over ``groups.shard``, with copies among ``groups.replicas``.

    The gradients that a sharded quantizer gives are those of the sum of its group's losses; so a sum over the replicas,
    divided by the number of all ranks, is the gradient of the mean loss. Backward is the generator's.

    codes: how many the whole codebook has. The optimiser must be of Adam's kind, with one parameter: its moments are
    saved by rows, and any number of ranks can go on from them.
    """

    def __init__(self, quantizer, optimizer, codes: int, groups: CodebookGroups, **batch):
        super().__init__(quantizer, optimizer, **batch)
        self.codes, self.groups, self.replicas = codes, groups, groups.replicas
        self.weight = quantizer.embedding.weight

    @property
    def start(self) -> int:
        """The first code that is here."""
        return self.groups.shard.start if self.groups.shard else 0

    @property
    def rows(self) -> tuple[int, int]:
        """The codes that are here, as ``[start, stop)``."""
        return self.start, self.start + len(self.weight)

    def grad_norm(self) -> Tensor:
        norm = super().grad_norm()
        if self.groups.shard is None:
            return norm
        return sum_over_ranks(norm.square(), self.groups.shard.group).sqrt()

    def save_rows(self, folder: Path, name: str, tensors: dict[str, Tensor]) -> None:
        """Writes tensors with a row for each code that is here, once among the replicas."""
        if self.groups.is_first_replica:
            tensors = {key: value.contiguous() for key, value in tensors.items()}
            save_file(tensors, codebook_rows_file(folder, name, *self.rows))

    def save(self, folder: Path) -> None:
        self.save_rows(folder, "optimizer", self.optimizer.state.get(self.weight, {}))

    def load(self, folder: Path) -> None:
        state = {}
        with safe_open(codebook_rows_files(folder, "optimizer")[0][2], framework="pt") as first:
            for key in first.keys():  # noqa: SIM118 (it is no dict)
                if first.get_slice(key).get_shape():  # the moments, with a row for each code
                    state[key] = codebook_rows(folder, "optimizer", key, *self.rows, self.codes)
                else:  # the step, one number
                    state[key] = first.get_tensor(key)
        packed = self.optimizer.state_dict()
        packed["state"] = {0: state} if state else {}
        self.optimizer.load_state_dict(packed)
