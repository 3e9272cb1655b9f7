"""Process groups."""

import time

import pytest
from comparing import refusal
from torch.distributed import distributed_c10d
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from trainer import TrainerError
from trainer.parallel import row_groups, start_world, stop_world

CONNECTS_SECONDS = 0.5


def _seconds_to_join(seconds: float) -> float:
    """How long the group takes if the second rank is slow after its connections are made."""
    world = start_world("cpu", 60)
    gloo = distributed_c10d.ProcessGroupGloo

    def slow(*arguments, **options):
        made = gloo(*arguments, **options)
        time.sleep(seconds * world.rank)
        return made

    distributed_c10d.ProcessGroupGloo = slow
    start = time.monotonic()
    row_groups(world, "codebook_parallel", 2, 64)
    taken = time.monotonic() - start
    stop_world()
    return taken


def test_no_rank_leaves_a_group_that_another_still_joins(ranks):
    """A rank that then ends with an error would close the connections that the other waits for."""
    assert min(ranks.call(2, _seconds_to_join, CONNECTS_SECONDS, join=False)) >= CONNECTS_SECONDS


@pytest.mark.parametrize(
    ("variable", "said", "unsaid"),
    [
        (None, ["--rdzv-backend c10d", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"], "static"),
        # It is set, and the agents share a store all the same: the rendezvous is static.
        ("1", ["static rendezvous", "--rdzv-backend c10d", "--max-restarts 0"], "TORCH_DISABLE"),
    ],
)
def test_restarts_on_several_nodes_are_refused_with_what_helps(monkeypatch, variable, said, unsaid):
    for name, value in (
        ("TORCHELASTIC_USE_AGENT_STORE", "True"),
        ("TORCHELASTIC_MAX_RESTARTS", "3"),
        ("GROUP_WORLD_SIZE", "2"),
        ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", variable),
    ):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    line = refusal(TrainerError, start_world, "cpu")
    assert all(text in line for text in said) and unsaid not in line


def test_a_static_rendezvous_shares_its_store_whatever_is_set(monkeypatch):
    """What the advice above rests on."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    static = StaticTCPRendezvous("127.0.0.1", 1, 0, 2, "none", 1)
    assert static.use_agent_store and static.num_nodes_waiting() == 0
