"""`ibq checkpoint` from the command line."""

import json

import pytest
import torch
from emu_layout import SMALL, changed, state_of, write_emu
from model_checks import tokenizer_of

from model_zoo import load_tokenizer


@pytest.fixture
def published(tmp_path):
    path = tmp_path / "tiny.ckpt"
    torch.save({"state_dict": tokenizer_of(channels=32, patch_size=1).state_dict(), "global_step": 12}, path)
    return path


def test_in_out_and_information(published, tmp_path, ibq):
    out = ibq("checkpoint", "import", published, "--out", tmp_path / "in").succeeded().out
    assert f"keys: {len(load_tokenizer(published).state_dict())}: " in out
    assert "left out: 1 (global_step)" in out and f"written: {tmp_path / 'in'}" in out
    ibq("checkpoint", "export", tmp_path / "in", "--layout", "published", "--out", tmp_path / "out.ckpt").succeeded()
    found = json.loads(ibq("checkpoint", "info", tmp_path / "out.ckpt", "--json").succeeded().out)
    assert found["layout"] == "published"
    assert found["models"][0]["fingerprint"] == load_tokenizer(published).fingerprint()
    assert found["models"][0]["step"] == 12 and found["models"][0]["config"]["code_dim"] == 4
    out = ibq("checkpoint", "info", tmp_path / "in").succeeded().out
    assert "verified: every file's sha256" in out and f"made of: {published}" in out


def test_a_step_that_is_no_number_is_unknown(published, tmp_path, ibq):
    torch.save({**torch.load(published), "global_step": "abc"}, published)
    out = ibq("checkpoint", "info", published).succeeded().out
    assert "step: unknown" in out
    ibq("checkpoint", "import", published, "--out", tmp_path / "in").succeeded()
    assert "step: null" in (tmp_path / "in" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "{published}", "--out", "{folder}"], "already exists: choose another --out"),
        (["import", "{folder}/none.ckpt", "--out", "{folder}/new"], "none.ckpt does not exist"),
        (["export", "{published}", "--layout", "published", "--out", "{folder}/new"], "must end in .ckpt"),
        (["export", "{published}", "--weights", "ema", "--out", "{folder}/new"], "holds no ema weights"),
        (["info", "{folder}"], "is not a run folder"),
        (["info", "{folder}/none.ckpt"], "none.ckpt does not exist"),
    ],
)
def test_mistakes_are_one_line(published, tmp_path, refused_by_ibq, arguments, message):
    filled = [argument.format(published=published, folder=tmp_path) for argument in arguments]
    assert message in refused_by_ibq("checkpoint", *filled)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.ckpt"]


def test_emus_folder_in_and_out(tmp_path, ibq):
    folder = write_emu(tmp_path / "emu")
    out = ibq("checkpoint", "import", folder, "--out", tmp_path / "in").succeeded().out
    assert f"keys: {len(state_of(SMALL))}: tokenizer {len(state_of(SMALL))}" in out
    out = ibq("checkpoint", "export", tmp_path / "in", "--layout", "emu", "--out", tmp_path / "back").succeeded().out
    assert f"written: {tmp_path / 'back'}" in out
    found = json.loads(ibq("checkpoint", "info", tmp_path / "back", "--json").succeeded().out)
    assert found["models"][0]["fingerprint"] == load_tokenizer(folder).fingerprint()
    assert found["models"][0]["parameters"] == sum(tensor.numel() for tensor in state_of(SMALL).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cosine_similarity": True}, "cosine_similarity=true is not supported, only false"),
        ({"n_embed": 32}, "holds quantize.embedding.weight of shape [64, 8], expected [32, 8]"),
    ],
)
@pytest.mark.parametrize("command", ["import", "export", "info"])
def test_mistakes_in_emus_folder_are_one_line(tmp_path, refused_by_ibq, command, changes, message):
    folder = write_emu(tmp_path / "emu", changed(SMALL, **changes), state_of(SMALL))
    out = [] if command == "info" else ["--out", tmp_path / "new"]
    assert message in refused_by_ibq("checkpoint", command, folder, *out)
    assert [path.name for path in tmp_path.iterdir()] == ["emu"]


@pytest.mark.parametrize("command", ["import", "export", "info"])
def test_each_has_help_with_an_example(ibq, command):
    out = ibq("checkpoint", command, "--help").succeeded().out
    assert f"Example: ibq checkpoint {command} " in " ".join(out.split())
