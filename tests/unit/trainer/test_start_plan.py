import pytest
import torch
from comparing import refusal

from trainer import TrainerError
from trainer.config import TokenizerRun, TokenizerTrainerConfig
from trainer.parallel import World
from trainer.start_plan import plan_batch


def planned(total, micro, processes) -> tuple[int, int]:
    config = TokenizerRun(trainer=TokenizerTrainerConfig(max_steps=1, global_batch_size=total, micro_batch_size=micro))
    return plan_batch(config, World(0, processes, torch.device("cpu")))


@pytest.mark.parametrize(
    ("total", "micro", "processes", "expected"),
    [(24, None, 1, (24, 1)), (24, None, 4, (6, 1)), (24, 2, 4, (2, 3)), (24, 6, 4, (6, 1)), (24, 1, 1, (1, 24))],
)
def test_the_global_batch_is_what_all_processes_take_in_a_step(total, micro, processes, expected):
    assert planned(total, micro, processes) == expected


def test_batches_that_do_not_divide_are_refused():
    assert "global_batch_size=24 must be a multiple of the 5 processes" in refusal(TrainerError, planned, 24, None, 5)
    with pytest.raises(TrainerError, match=r"micro_batch_size=4 must divide the 6 images that each of 4 processes"):
        planned(24, 4, 4)
