"""The checks of `ibq doctor`, each on a simulated machine."""

import hashlib
import inspect
import os
import re
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from packaging.requirements import Requirement

from model_zoo.eval_nets.weights import WEIGHTS_FILES
from model_zoo.ops.attention import FLASH_MODULES
from tools import doctor
from tools.doctor import OK, OPTIONAL, PROBLEM, Finding
from trainer.recipes import load_recipe


def test_our_own_packages_are_not_shadowed():
    assert doctor.shadowed_packages() == []


def make_package(folder, *files):
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()


@pytest.mark.parametrize(
    ("files", "status", "said"),
    [
        ([], OPTIONAL, "not installed"),
        (["apex/__init__.py", "apex/lib/__init__.py"], PROBLEM, "is not NVIDIA's"),
        (["apex.py"], PROBLEM, "is not NVIDIA's"),
        (["apex/__init__.py", "apex/optimizers/__init__.py"], OPTIONAL, "without its kernels"),
        (["apex/__init__.py", "apex/optimizers/__init__.py", "amp_C.py"], OK, "with its kernels"),
    ],
)
def test_apex(tmp_path, monkeypatch, files, status, said):
    make_package(tmp_path, *files)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    [finding] = doctor.check_apex()
    assert finding.status == status
    assert said in finding.found
    if status == OPTIONAL and not files:
        assert "another project" in finding.fix
    if status == PROBLEM:
        assert finding.fix == "pip uninstall apex"


def test_encoders(monkeypatch):
    ((_, status, *_),) = doctor.check_encoders()
    assert status == OK
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    ((name, status, found, fix),) = doctor.check_encoders()
    assert (name, status, found) == ("timm", OPTIONAL, "not installed") and "ibq[semantic]" in fix


def test_versions_are_held_against_the_ranges_of_the_metadata(monkeypatch):
    installed = {"ibq": "0.1.0", "torch": "2.12.1+cpu", "deepspeed": "0.20.0"}

    def version(name):
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    wanted = ["torch>=2.11", "deepspeed<0.20,>=0.19", "lpips>=0.1.4", 'pytest>=8; extra == "test"']
    monkeypatch.setattr(metadata, "requires", lambda name: wanted)
    monkeypatch.setattr(metadata, "version", version)
    findings = {finding.name: finding for finding in doctor.check_requirements()}
    assert {name: finding.status for name, finding in findings.items()} == {
        "ibq": OK,
        "torch": OK,
        "deepspeed": PROBLEM,
        "lpips": PROBLEM,
    }
    assert findings["deepspeed"].fix == "pip install 'deepspeed<0.20,>=0.19'"
    assert findings["lpips"].found == "not installed"


def test_each_requirement_has_a_lower_bound():
    """tests/lower_bounds.sh installs exactly these. torch decides which torchvision fits."""
    required = [one for one in map(Requirement, metadata.requires("ibq")) if one.marker is None]
    bounded = {one.name for one in required if any(part.operator in (">=", "==") for part in one.specifier)}
    assert {one.name for one in required} - bounded == {"torchvision"}


def test_ibq_that_is_not_installed_is_a_problem(monkeypatch):
    monkeypatch.setattr(metadata, "requires", Mock(side_effect=metadata.PackageNotFoundError))
    [finding] = doctor.check_requirements()
    assert (finding.status, finding.fix) == (PROBLEM, f"pip install -e {doctor.ROOT}")


@pytest.mark.parametrize(("native", "status"), [(True, OK), (False, OPTIONAL)])
def test_cuda_devices(monkeypatch, native, status):
    """Simulated: most machines that run the tests have none."""
    properties = SimpleNamespace(name="NVIDIA H200", total_memory=140 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    findings = {finding.name: finding for finding in doctor.check_torch()}
    assert findings["CUDA device 0"].found == "NVIDIA H200, 140 GiB, compute capability 9.0"
    assert findings["bf16"].status == status


def test_weights_files(tmp_path, monkeypatch):
    monkeypatch.setenv("IBQ_WEIGHTS", str(tmp_path))
    missing = {finding.name: finding for finding in doctor.check_weights_files()}
    dino = missing.pop("dino weights")
    assert dino.status == OPTIONAL and "discriminator.kind=dino" in dino.fix and "dino_deitsmall16" in dino.fix
    assert list(missing) == ["vgg16 weights", "alexnet weights", "convnext_small weights", "inception weights"]
    for key, finding in zip(WEIGHTS_FILES, missing.values(), strict=True):
        assert finding.status == OPTIONAL
        assert str(tmp_path / WEIGHTS_FILES[key].file) in finding.found
        for part in (WEIGHTS_FILES[key].purpose, WEIGHTS_FILES[key].url, "IBQ_WEIGHTS"):
            assert part in finding.fix

    for key in ("vgg16", "inception"):
        (tmp_path / WEIGHTS_FILES[key].file).write_bytes(b"half a download")
    digest = hashlib.sha256(b"half a download").hexdigest()
    monkeypatch.setitem(WEIGHTS_FILES, "inception", WEIGHTS_FILES["inception"]._replace(sha256=digest))
    (tmp_path / "dino_deitsmall16_pretrain.pth").write_bytes(b"half a download")
    *others, dino = doctor.check_weights_files()
    assert [finding.status for finding in others] == [PROBLEM, OPTIONAL, OPTIONAL, OK]
    assert dino.status == OK and digest in dino.found and "not known" in dino.found


def test_a_lock_left_by_a_killed_build_is_a_problem(tmp_path):
    assert list(doctor.stale_locks(tmp_path / "none")) == []
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    make_package(lock.parent, "lock")
    [finding] = doctor.stale_locks(tmp_path)
    assert finding.status == OPTIONAL

    an_hour_ago = time.time() - 3600
    os.utime(lock, (an_hour_ago, an_hour_ago))
    [finding] = doctor.stale_locks(tmp_path)
    assert finding.status == PROBLEM
    assert f"rm {lock}" in finding.fix


def test_a_check_that_breaks_is_a_problem():
    def check_torch():
        raise ImportError("libtorch.so: cannot open\nand more")
        yield

    [finding] = doctor.examine((check_torch,))
    assert (finding.name, finding.status) == ("torch", PROBLEM)
    assert finding.found == "could not be checked: ImportError: libtorch.so: cannot open"


@pytest.mark.parametrize("status", [OK, OPTIONAL, PROBLEM])
def test_the_report(monkeypatch, ibq, status):
    fix = "" if status == OK else f"rename /{'a_folder_whose_name_no_table_has_room_for' * 3}/data"
    monkeypatch.setattr(doctor, "examine", lambda: [Finding("package data", status, "Python imports another", fix)])
    ended = ibq("doctor")
    assert ended.status == (status == PROBLEM)
    assert fix in ended.out
    assert ("1 problem" in ended.out) == (status == PROBLEM)


def test_a_host_name_without_an_address_is_a_problem(monkeypatch):
    """torchrun waits for it. A name server that does not answer is one, too."""

    def never(name, port):
        time.sleep(0.5)
        raise OSError

    monkeypatch.setattr(doctor, "LOOK_UP_SECONDS", 0.2)
    monkeypatch.setattr("socket.gethostname", lambda: "node-7")
    assert [finding.status for finding in doctor.check_host_name()] == [PROBLEM]
    monkeypatch.setattr("socket.getaddrinfo", never)
    [finding] = doctor.check_host_name()
    assert (finding.status, finding.found) == (PROBLEM, "node-7 is not resolved to an address")
    assert "torchrun --local-addr 127.0.0.1" in finding.fix and "'127.0.0.1 node-7' to /etc/hosts" in finding.fix
    monkeypatch.setattr("socket.getaddrinfo", lambda name, port: [(2, 1, 6, "", ("127.0.1.1", 0))])
    assert [finding.found for finding in doctor.check_host_name()] == ["node-7 is 127.0.1.1"]


def test_compilers_of_deepspeed_and_of_torch_are_both_looked_for(monkeypatch, tmp_path):
    """c++ and g++, unless CXX names one."""
    (tmp_path / "c++").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for set_to, status in ((None, [OK, PROBLEM]), (str(tmp_path / "c++"), [OK]), ("nowhere", [PROBLEM])):
        monkeypatch.delenv("CXX", raising=False)
        if set_to:
            monkeypatch.setenv("CXX", set_to)
        found = [finding.status for finding in doctor.check_compiler() if finding.name == "C++ compiler"]
        assert found == [one if one == OK or not torch.cuda.is_available() else OPTIONAL for one in status]


# ------------------------------------------------------------------------------ what it says, held against the code


SOURCE = inspect.getsource(doctor)


def test_settings_that_it_names_exist_and_take_the_values():
    named = set(re.findall(r"\b((?:trainer|engine|data|loss|model)\.[\w.]+)=([\w.]+)", SOURCE))
    assert {"trainer.precision", "data.workers", "loss.impl", "engine.kind"} == {key for key, _ in named}
    for key, value in named:
        load_recipe("ar_debug" if key.startswith("loss.impl") else "debug", [f"{key}={value}"])


def test_packages_that_it_names_are_those_of_the_code():
    code = {path: path.read_text() for package in ("trainer", "model_zoo") for path in Path(package).rglob("*.py")}
    uses = [path.name for path, text in code.items() if "from apex.optimizers import FusedAdam" in text]
    assert uses == ["optim.py"] and "the optimizer is apex's FusedAdam" in doctor.APEX
    assert "import amp_C" in code[Path("trainer/optim.py")] and '"amp_C"' in SOURCE
    modules = {name.partition(".")[0] for names in FLASH_MODULES.values() for name in names}
    assert all(f'"{module}":' in SOURCE for module in (*modules, "liger_kernel"))
    extras = " ".join(metadata.requires("ibq"))
    for package in re.findall(r'"[a-z_]+": "([a-z-]+\d?)"', SOURCE):
        assert package in extras or package == "flash-attn-3", package  # which has no wheel


def test_environment_variables_that_it_names_are_read(monkeypatch, tmp_path):
    for variable in re.findall(r'"((?:IBQ|TORCH)_[A-Z_]+)"\),', SOURCE):
        monkeypatch.setenv(variable, str(tmp_path / variable))
        assert f"{tmp_path / variable}" in " ".join(finding.found for finding in doctor.check_caches())
