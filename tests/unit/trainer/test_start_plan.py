import pytest
import torch
from comparing import refusal
from support import tokenizer_run

from model_zoo.io.sharded_tensors import ShardedTensors, save_shards
from trainer import TrainerError
from trainer.config import TokenizerRun, TokenizerTrainerConfig
from trainer.parallel import World
from trainer.recipes import save_config
from trainer.start_plan import (
    Inputs,
    Source,
    check_inputs,
    plan_batch,
    plan_start,
    random_state,
    restore_random_state,
    seed_everything,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def leave_the_generator_as_it_was():
    with torch.random.fork_rng():
        yield


def planned(total, micro, processes) -> tuple[int, int]:
    config = TokenizerRun(trainer=TokenizerTrainerConfig(max_steps=1, global_batch_size=total, micro_batch_size=micro))
    return plan_batch(config, World(0, processes, CPU))


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


def test_a_folder_with_another_run_is_refused_before_data_and_models_are_looked_at(world, tmp_path):
    """Also where the launcher may restart the command, in which case the same settings resume."""
    config = tokenizer_run(run=str(tmp_path), trainer__max_steps=7, data__train=str(tmp_path / "no such tar"))
    save_config(tokenizer_run(run=str(tmp_path)), tmp_path / "config.yaml")
    said = f"{tmp_path} already holds a run: resume it (`ibq resume {tmp_path}`) or choose another run=FOLDER"
    assert refusal(TrainerError, check_inputs, config, Source()) == said
    restart = Source(tmp_path, restart=True)
    assert refusal(TrainerError, plan_start, config, restart, world, Inputs(None, None, {})) == said
    save_config(config, tmp_path / "config.yaml")
    assert plan_start(config, restart, world, Inputs(None, None, {})).reuses_folder


def drawn(seed, step, rank):
    seed_everything(seed, step, World(rank, 4, CPU))
    return tuple(torch.rand(3).tolist())


def test_every_seed_step_and_rank_has_a_stream_of_its_own():
    places = [(seed, step, rank) for seed in (0, 1, 2) for step in (0, 1, 1000) for rank in (0, 1, 3)]
    streams = {place: drawn(*place) for place in places}
    assert len(set(streams.values())) == len(places)
    assert all(drawn(*place) == stream for place, stream in streams.items())


def test_the_largest_seed_is_taken():
    assert drawn(2**63 - 1, 10**6, 1) != drawn(2**63 - 1, 10**6, 0)


def test_restored_each_rank_goes_on_where_it_was(tmp_path):
    ranks = [World(rank, 2, CPU) for rank in range(2)]
    expected = []
    for world in ranks:
        seed_everything(0, 0, world)
        torch.rand(5)
        save_shards(tmp_path / f"rank_{world.rank}.safetensors", random_state(world))
        expected.append(torch.rand(3))
    assert not torch.equal(*expected)
    files = ShardedTensors(tmp_path)
    for world, numbers in zip(ranks, expected, strict=True):
        torch.manual_seed(9)
        restore_random_state(files, world)
        assert torch.equal(torch.rand(3), numbers)


def test_a_rank_that_was_not_there_keeps_its_stream(tmp_path):
    save_shards(tmp_path / "all.safetensors", random_state(World(0, 1, CPU)))
    torch.manual_seed(9)
    restore_random_state(ShardedTensors(tmp_path), World(1, 2, CPU))
    kept = torch.rand(3)
    torch.manual_seed(9)
    assert torch.equal(torch.rand(3), kept)
