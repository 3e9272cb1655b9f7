"""Packaging: an installed wheel works outside the checkout, and other packages named like ours are reported."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from ranks import ROOT

# Every test starts pip or an interpreter outside the checkout.
pytestmark = [pytest.mark.process, pytest.mark.full]

PACKAGES = ["trainer", "model_zoo", "data", "tools", "ds_configs"]


def run(*command, cwd, **environment):
    """The finished process, which can reach neither this checkout nor an index."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"PIP_NO_INDEX": "1", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([str(part) for part in command], cwd=cwd, env=variables, capture_output=True, text=True)


def pip(*arguments, cwd):
    result = run(sys.executable, "-m", "pip", *arguments, cwd=cwd)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the source, since pip leaves build folders behind."""
    copy = tmp_path_factory.mktemp("packaging") / "checkout"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(checkout):
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", checkout.parent, checkout, cwd=checkout.parent)
    [path] = checkout.parent.glob("ibq-*.whl")
    return path


@pytest.fixture
def site(wheel, tmp_path):
    """A folder for PYTHONPATH with the wheel installed."""
    pip("install", "--no-deps", "--no-compile", "--target", tmp_path / "site", wheel, cwd=tmp_path)
    return tmp_path / "site"


@pytest.fixture
def elsewhere(tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


def test_the_wheel_holds_ours_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {*PACKAGES, "ibq-0.1.0.dist-info"}

    data_files = {"model_zoo": "recipes/**/*.yaml", "ds_configs": "*.json", "data": "sources.yaml", "tools": "*.sbatch"}
    for package, pattern in data_files.items():
        there = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).glob(pattern)}
        assert there and there <= set(names)
    assert all(name.startswith("ibq-") for name in names if not name.endswith((".py", ".yaml", ".json", ".sbatch")))

    [entry_points] = [name for name in names if name.endswith("entry_points.txt")]
    assert b"ibq = tools.cli:main" in zipfile.ZipFile(wheel).read(entry_points)


def test_an_installed_wheel_works_outside_the_checkout(site, elsewhere):
    script = f"""
import importlib, json
from importlib import resources
origins = {{name: importlib.import_module(name).__file__ for name in {PACKAGES}}}
recipes = [path.name for path in (resources.files("model_zoo") / "recipes" / "tokenizer").iterdir()]
stages = [json.loads((resources.files("ds_configs") / f"zero{{stage}}.json").read_text())["zero_optimization"]["stage"]
          for stage in range(3)]
catalogue = (resources.files("data") / "sources.yaml").read_text()
print(json.dumps([origins, recipes, stages, catalogue]))
"""
    result = run(sys.executable, "-c", script, cwd=elsewhere, PYTHONPATH=str(site))
    assert result.returncode == 0, result.stderr
    origins, recipes, stages, catalogue = json.loads(result.stdout)
    assert origins == {name: str(site / name / "__init__.py") for name in PACKAGES}
    assert {"quickstart.yaml", "debug.yaml", "ibq_16384.yaml"} <= set(recipes)
    assert stages == [0, 1, 2]
    assert "astronaut.png" in catalogue

    result = run(sys.executable, "-m", "tools.cli", "--help", cwd=elsewhere, PYTHONPATH=str(site))
    assert result.returncode == 0, result.stderr
    assert "quickstart" in result.stdout


def test_a_plain_folder_of_our_name_is_harmless(site, elsewhere):
    (elsewhere / "data").mkdir()
    result = run(sys.executable, "-m", "tools.cli", "recipes", cwd=elsewhere, PYTHONPATH=str(site))
    assert result.returncode == 0, result.stderr


def test_a_package_that_shadows_ours_is_named(site, elsewhere):
    (elsewhere / "data").mkdir()
    culprit = elsewhere / "data" / "__init__.py"
    culprit.touch()
    fix = f"rename {elsewhere / 'data'}, or run from another folder"

    result = run(sys.executable, "-m", "tools.cli", "doctor", cwd=elsewhere, PYTHONPATH=str(site))
    assert result.returncode == 1, result.stderr
    assert f"problem: package data: {fix}" in result.stdout

    result = run(sys.executable, "-m", "tools.cli", "train", "debug", cwd=elsewhere, PYTHONPATH=str(site))
    said = f"ibq: error: Python imports {culprit} as `data` instead of ibq's package: {fix}\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", said)


def test_a_distribution_that_writes_into_our_folder_is_named(site, elsewhere):
    record = site / "generic_data-1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: generic-data\nVersion: 1.0\n")
    (record / "top_level.txt").write_text("data\n")
    script = "from tools.doctor import check_package_names; print(*check_package_names())"
    result = run(sys.executable, "-c", script, cwd=elsewhere, PYTHONPATH=str(site))
    assert "also installed by generic-data" in result.stdout, result.stderr


def test_an_editable_install_is_a_plain_path_entry(checkout, tmp_path):
    """Import hooks come last: with one, a folder called `data` in the working directory would win."""
    # Without --ignore-installed pip would uninstall the ibq of the environment that runs the tests.
    elsewhere = "--ignore-installed", "--prefix", tmp_path
    pip("install", "--no-deps", "--no-build-isolation", *elsewhere, "--editable", checkout, cwd=tmp_path)
    [entry] = tmp_path.rglob("__editable__*.pth")
    assert entry.read_text().strip() == str(checkout)
