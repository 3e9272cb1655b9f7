"""A server that fails under a run ends all ranks together, after a whole step that is saved."""

import re
import time
from collections import Counter

import pytest
from ranks import settings
from samples import index_of, write_tars
from serving import Server

from trainer.checkpoint import checkpoint_folders
from trainer.prefetch import read_audit

SHARDS, SAMPLES, STEPS = 4, 12, 12  # two epochs


@pytest.fixture
def folder(tmp_path):
    """Tars of generated pictures, and their index beside them under a name that is not looked for."""
    tars = write_tars(tmp_path / "tars", [SAMPLES] * SHARDS)
    index_of(tars, tars / "of.safetensors")
    return tars


def recipe(server, folder, **changes):
    root = server.url("/{00000..00003}.tar?signature=SECRET", user="me:SECRET")
    sources = f"[{{name: web, root: '{root}', index: {folder}/of.safetensors}}]"
    return settings(
        {
            **{"data.train": "null", "data.val": "null", "data.sources": sources, "data.audit": "true"},
            **{"data.shuffle_block": 4, "data.request_seconds": 0.5, "data.retry_seconds": 1.5},
            **{"trainer.max_steps": STEPS, "trainer.checkpoint_every_steps": 50, **changes},
        }
    )


@pytest.mark.parametrize(
    ("fault", "workers"),
    [({"silent": True}, 1), ({"status": 500}, 0), pytest.param({"cut_after_bytes": 9}, 0, marks=pytest.mark.full)],
)
def test_all_ranks_stop_together_and_go_on_once_the_server_is_well(ranks, folder, tmp_path, fault, workers):
    run = tmp_path / "run"
    with Server(folder=folder) as server:
        sick = "/00003.tar"
        server.fault(sick, times=3)  # is well for so long
        whole = recipe(server, folder, **{"data.workers": workers})
        server.fault(sick, **fault)
        began = time.monotonic()
        ended = ranks.start(2, "debug", f"run={run}", *whole).wait()
        assert time.monotonic() - began < 90
        assert ended.statuses == [2, 2]
        lines = ended.error_lines
        assert len(lines) == 2, ended.err
        assert len(set(lines)) == 1
        assert "/00003.tar" in lines[0]
        assert "SECRET" not in ended.out + ended.err
        saved = checkpoint_folders(run)
        if saved:  # where the shard was not among the very first
            step = int(saved[-1].name.split("_")[1])
            assert f"step {step} is saved: resume with `ibq resume {run}`" in lines[0]
        server.faults.clear()
        again = ("--resume", run) if saved else ("debug", f"run={run}", *whole)
        ended = ranks.start(2, *again).wait()
        assert ended.status == 0, ended.err
        assert "SECRET" not in ended.out + ended.err
        assert re.search(r"data web: 96 images, 0 skipped as unusable, 0 filtered out", ended.err)
    delivered = list(read_audit(run).delivered)
    assert len(delivered) == STEPS * 8
    counts = Counter((one.epoch, one.key) for one in delivered)
    assert set(counts.values()) == {1}
    assert len([key for epoch, key in counts if epoch == 0]) == SHARDS * SAMPLES
