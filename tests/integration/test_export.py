"""Models exported from runs of several processes."""

import pytest
import torch

import model_zoo


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_a_codebook_spread_over_two_processes_is_exported_whole(sharded, weights):
    run, out = sharded
    trained, exported = (model_zoo.load_tokenizer(source, weights) for source in (run, out))
    assert exported.config == trained.config
    assert exported.state_dict()["quantize.embedding.weight"].shape == (256, 16)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(exported.state_dict()[name], tensor)


@pytest.fixture(scope="module")
def sharded(ranks, tmp_path_factory):
    """A run of two processes that hold half of the codebook each, and what was exported of it."""
    folder = tmp_path_factory.mktemp("sharded")
    changes = {"codebook_parallel": 2, "trainer.max_steps": 2, "trainer.checkpoint_every_steps": 2}
    ranks.train(2, "debug", folder / "run", changes).succeeded()
    ranks.ibq("checkpoint", "export", folder / "run", "--out", folder / "out").succeeded()
    return folder / "run", folder / "out"
