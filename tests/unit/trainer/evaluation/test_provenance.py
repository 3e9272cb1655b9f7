import hashlib
import platform

import torch
from comparing import refusal

from model_zoo import ModelError
from model_zoo.eval_nets.weights import WEIGHTS_FILES
from trainer.evaluation.provenance import environment, image_list_hash, weights_files


def test_environment_names_the_device_and_all_versions():
    found = environment("cpu")
    assert found["device"].startswith("CPU") and found["torch"] == torch.__version__
    assert found["python"] == platform.python_version()
    wanted = {"ibq", "torch", "torchvision", "torch-fidelity", "lpips", "numpy", "pillow", "opencv-python-headless"}
    assert found.keys() == {"device", "python"} | wanted
    assert all(found.values())


def test_weights_files_are_those_that_were_used(tmp_path, monkeypatch):
    monkeypatch.setenv("IBQ_WEIGHTS", str(tmp_path))
    digest = hashlib.sha256(b"weights").hexdigest()
    for key in ("vgg16", "inception"):
        monkeypatch.setitem(WEIGHTS_FILES, key, WEIGHTS_FILES[key]._replace(sha256=digest))
        (tmp_path / WEIGHTS_FILES[key].file).write_bytes(b"weights")
    paths = {key: str(tmp_path / WEIGHTS_FILES[key].file) for key in ("vgg16", "inception")}
    assert weights_files(list(paths)) == {key: {"file": path, "sha256": digest} for key, path in paths.items()}
    assert "alexnet" in refusal(ModelError, weights_files, ["alexnet"])


def test_image_list_hash_depends_on_names_and_their_order():
    assert image_list_hash(["a", "b"]) == hashlib.sha256(b"a\nb\n").hexdigest()
    assert len({image_list_hash(keys) for keys in (["a", "b"], ["b", "a"], ["ab"], ["a"], [])}) == 5
