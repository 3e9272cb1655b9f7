import hashlib
from pathlib import Path

import pytest
import torch
from model_checks import refused

from model_zoo.eval_nets import weights as metric_weights
from model_zoo.eval_nets.weights import WEIGHTS_FILES, checked_weights, weights_path

CONTENT = b"all that matters of it is its hash"


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch) -> dict[str, Path]:
    """The file of `inception` is one that holds CONTENT; the folders where it is looked for are not there."""
    monkeypatch.delenv("IBQ_WEIGHTS", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    digest = hashlib.sha256(CONTENT).hexdigest()
    monkeypatch.setitem(WEIGHTS_FILES, "inception", WEIGHTS_FILES["inception"]._replace(sha256=digest))
    return {"hub": tmp_path / "hub" / "checkpoints", "mine": tmp_path / "mine"}


def put(folder: Path, content: bytes = CONTENT, name: str = WEIGHTS_FILES["inception"].file) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def test_the_path_goes_before_the_variable_and_that_before_torch_hub(places, monkeypatch):
    in_hub = put(places["hub"])
    assert weights_path("inception") == checked_weights("inception") == in_hub
    monkeypatch.setenv("IBQ_WEIGHTS", str(places["mine"]))
    assert weights_path("inception") == places["mine"] / in_hub.name  # although it is not there
    assert f"{in_hub.name} does not exist" in refused(checked_weights, "inception")
    assert checked_weights("inception", in_hub) == in_hub
    assert checked_weights("inception", str(in_hub)) == in_hub


def test_pytorch_fids_name_of_the_same_file_will_do(places):
    other = put(places["hub"], name="pt_inception-2015-12-05-6726825d.pth")
    assert checked_weights("inception") == other
    assert checked_weights("inception") != put(places["hub"]) == checked_weights("inception")


@pytest.mark.parametrize("key", WEIGHTS_FILES)
def test_a_missing_file_is_one_line_that_names_file_place_variable_and_source(places, key):
    message = refused(checked_weights, key)
    for part in (WEIGHTS_FILES[key].file, str(places["hub"]), "IBQ_WEIGHTS", WEIGHTS_FILES[key].url):
        assert part in message


def test_another_file_is_one_line_with_both_hashes(places):
    path = put(places["hub"], b"half a download")
    message = refused(checked_weights, "inception")
    hashes = hashlib.sha256(b"half a download").hexdigest(), WEIGHTS_FILES["inception"].sha256
    for part in (str(path), *hashes, WEIGHTS_FILES["inception"].url):
        assert part in message


def test_a_file_is_hashed_once_until_it_changes(places, monkeypatch):
    hashed = []
    monkeypatch.setattr(
        metric_weights, "sha256_of", lambda path: hashed.append(path) or hashlib.sha256(path.read_bytes()).hexdigest()
    )
    path = put(places["hub"])
    for _ in range(3):
        checked_weights("inception")
    assert hashed == [path]
    put(places["hub"], b"half a download")
    assert "not the published" in refused(checked_weights, "inception")
    assert hashed == [path, path]


@pytest.mark.parametrize("key", ["vgg16", "alexnet", "convnext_small", "inception"])
def test_the_published_names_hold_the_first_digits_of_the_hash(key, monkeypatch):
    monkeypatch.undo()
    wanted = WEIGHTS_FILES[key]
    for name in (wanted.file, *wanted.other_names):
        assert name.endswith(f"-{wanted.sha256[:8]}.pth")
    assert wanted.url.endswith(f"/{wanted.file}")


def test_the_inception_file_is_torch_fidelitys():
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    assert WEIGHTS_FILES["inception"].url == URL_INCEPTION_V3


def test_frozen_weights_are_buffers_that_no_checkpoint_holds():
    module = metric_weights.frozen(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)))
    assert not list(module.parameters()) and not module.state_dict()
    assert len(list(module.buffers())) == 7
    assert module.double()(torch.zeros(4, 2, dtype=torch.float64)).dtype == torch.float64
