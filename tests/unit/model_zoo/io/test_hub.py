"""Names on the model hub, with a stand-in for `huggingface_hub`."""

import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from emu_layout import SMALL, changed, write_emu
from model_checks import refused, tokenizer_of

from model_zoo import ModelError, load_tokenizer
from model_zoo.io.load import is_hub_name

tiny = partial(tokenizer_of, channels=32, patch_size=1)  # as published


class Hub(types.ModuleType):
    """Repositories by name and revision, as folders; with or without a network. Remembers what was fetched."""

    def __init__(self, repositories: dict[tuple[str, str | None], Path]):
        super().__init__("huggingface_hub")
        self.repositories, self.network, self.fetched, self.cached = repositories, True, [], set()

    def list_repo_files(self, repo_id, revision=None):
        if not self.network:
            raise RuntimeError("no route\nto host")
        if (repo_id, revision) not in self.repositories:
            raise RuntimeError(f"404: {repo_id}")
        folder = self.repositories[repo_id, revision]
        return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]

    def snapshot_download(self, repo_id, revision=None, allow_patterns=None, local_files_only=False):
        if local_files_only:
            if (repo_id, revision) not in self.cached:
                raise FileNotFoundError("not in the cache")
        else:
            self.fetched.append(allow_patterns)
            self.cached.add((repo_id, revision))
        return str(self.repositories[repo_id, revision])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    states = {None: 1, "v2": 2}
    repositories = {("owner/name", revision): tmp_path / f"name {revision}" for revision in states}
    for (_, revision), folder in repositories.items():
        folder.mkdir()
        torch.save({"state_dict": tiny(states[revision]).state_dict()}, folder / "model.ckpt")
    (tmp_path / "empty").mkdir()
    hub = Hub({**repositories, ("owner/empty", None): tmp_path / "empty"})
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return hub


@pytest.mark.parametrize(("name", "seed"), [("owner/name", 1), ("owner/name@v2", 2)])
def test_a_name_gives_the_checkpoint_of_that_revision(hub, name, seed):
    assert load_tokenizer(name).fingerprint() == tiny(seed).fingerprint()
    assert hub.fetched == [["model.ckpt"]]


def test_a_name_of_emus_tokenizer_gives_its_weights_and_its_configuration(hub, tmp_path):
    folder = write_emu(tmp_path / "emu", changed(SMALL, l2_normalize=True))
    for other in ("model.safetensors", "config.json", "modeling.py"):
        (folder / other).touch()
    hub.repositories["owner/emu", None] = folder
    tokenizer = load_tokenizer("owner/emu")
    assert tokenizer.config.normalize and hub.fetched == [["model.ckpt", "config.yaml"]]
    hub.network = False
    assert load_tokenizer("owner/emu").fingerprint() == tokenizer.fingerprint()


def test_without_a_network_the_cache_serves(hub):
    load_tokenizer("owner/name")
    hub.network = False
    assert load_tokenizer("owner/name").fingerprint() == tiny(1).fingerprint()
    message = refused(load_tokenizer, "owner/name@v2")
    assert "nor available on the model hub (no route): give the path of a file" in message


def test_what_the_hub_has_not_is_refused(hub):
    with pytest.raises(ModelError, match=r"owner/other is neither a path nor available.*404"):
        load_tokenizer("owner/other")
    assert "holds neither a .ckpt nor model.safetensors with config.yaml" in refused(load_tokenizer, "owner/empty")


def test_without_the_package_its_name_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"owner/name does not exist.*pip install huggingface_hub"):
        load_tokenizer("owner/name")


def test_paths_are_no_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(Path("TencentARC/IBQ-Tokenizer-16384")) and is_hub_name(Path("a/b-1.0@refs/pr/3"))
    for path in ("name", "/owner/name", "./", "a/b/c", "owner/name.ckpt", "../owner", ".hidden/name", "~/name"):
        assert not is_hub_name(Path(path))
    (tmp_path / "runs").mkdir()  # a run that is missing in a folder of runs
    assert not is_hub_name(Path("runs/mine"))
    assert "runs/mine is not a run folder" in refused(load_tokenizer, "runs/mine")
