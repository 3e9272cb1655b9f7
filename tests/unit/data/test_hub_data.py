"""Tars in a data set on the Hugging Face hub, by a stand-in of its API."""

from unittest.mock import Mock

import fsspec
import pytest
from comparing import refusal
from field.hub import hub_files
from samples import write_tars
from serving import Server

import data
from data import object_store
from data.errors import DataError
from data.storage import Timeouts, list_tars

TIMEOUTS = Timeouts(5.0, 5.0)
ROOT = "hf://datasets/me/photos"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    tars = write_tars(tmp_path / "tars", [4, 4])
    files = {f"train/{path.name}": path.read_bytes() for path in sorted(tars.glob("*.tar"))}
    with Server(hub_files("me/photos", files) | hub_files("me/photos", files, "v1.0")) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url())
        monkeypatch.setenv("HF_TOKEN", "hf_SECRET")
        monkeypatch.setattr(object_store, "_clients", {})
        server.tars = tars
        yield server


def keys(root: str) -> list[str]:
    config = data.DataConfig(train=root, image_size=8, workers=0, lanes=2)
    options = dict(global_batch_size=2, micro_batch_size=2, rank=0, world_size=1, seed=0)
    stream = data.train_batches(config, **options)
    return [key for _ in range(4) for key in next(stream).keys]


@pytest.mark.parametrize("root", [f"{ROOT}/train", f"{ROOT}@v1.0/train", f"{ROOT}/train/{{00000..00001}}.tar"])
def test_training_reads_a_data_set_as_it_reads_local_tars(hub, root):
    assert sorted(keys(root)) == sorted(keys(str(hub.tars)))
    ranges = [request for request in hub.requests if "/resolve/" in request.path]
    assert ranges and all(one.range and one.headers["authorization"] == "Bearer hf_SECRET" for one in ranges)


def test_what_is_not_there_or_may_not_be_read_is_one_line(hub):
    message = refusal(DataError, list_tars, "hf://datasets/me/nothing", TIMEOUTS)
    assert "there is no hf://datasets/me/nothing (HTTP 404)" in message
    hub.fault("/api/datasets/me/gated", status=403)
    message = refusal(DataError, list_tars, "hf://datasets/me/gated", TIMEOUTS)
    assert "may not be read (HTTP 403)" in message and "set HF_TOKEN, and accept the terms" in message
    hub.fault("/datasets/me/photos/resolve/main/train/00000.tar", status=401)
    assert "set HF_TOKEN" in refusal(DataError, keys, f"{ROOT}/train")


def test_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(object_store, "_clients", {})
    monkeypatch.setattr(fsspec, "filesystem", Mock(side_effect=ImportError))
    message = refusal(DataError, list_tars, f"{ROOT}/train", TIMEOUTS)
    assert message == "hf:// needs huggingface_hub: pip install huggingface_hub"
