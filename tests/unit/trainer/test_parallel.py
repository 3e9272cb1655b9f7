"""Process groups."""

import time

from torch.distributed import distributed_c10d

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
