"""Which module imports which: no cycles, one direction between packages, and nothing heavy where training starts."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest
from ranks import ROOT, Launch

# Each package and those that it may import.
MAY_IMPORT = {
    "data": set(),
    "model_zoo": set(),
    "trainer": {"data", "model_zoo"},
    "tools": {"data", "model_zoo", "trainer"},
}
# Packages that take long to import. Each is imported where it is first used.
HEAVY = [
    "IPython", "cv2", "deepspeed", "einops", "fsspec", "huggingface_hub", "lpips", "matplotlib", "pandas", "rich",
    "scipy", "skimage", "sympy", "tensorboard", "timm", "torch._dynamo", "torch._inductor",
    "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.utils.tensorboard",
    "torch_fidelity", "torchvision", "transformers", "triton", "typer", "webdataset",
]  # fmt: skip
# Beyond these, models need no reader of configurations, which `model_zoo.io.load` alone imports.
MODELS = [
    "model_zoo.discriminator", "model_zoo.io.sharded_tensors", "model_zoo.losses", "model_zoo.ops",
    "model_zoo.sampler", "model_zoo.tokenizer", "model_zoo.transformer",
]  # fmt: skip


def modules_of(root: Path, package: str) -> dict[str, Path]:
    """Dotted name -> file of all modules of a package."""
    files = {file: file.relative_to(root).with_suffix("").parts for file in sorted((root / package).rglob("*.py"))}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): file for file, parts in files.items()}


def imported_names(name: str, file: Path) -> Iterator[str]:
    """Dotted names that a module imports anywhere, also inside functions, but not under ``if TYPE_CHECKING``.

    ``from a import b`` gives ``a.b``. Literal arguments of ``import_module`` and, in an ``__init__.py``, dotted
    names in strings count as imports too: this is how names are exported lazily.
    """
    is_init = file.name == "__init__.py"
    package = name.split(".") if is_init else name.split(".")[:-1]
    left = [ast.parse(file.read_text(encoding="utf-8"))]
    while left:
        node = left.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            left += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = [*above, *([node.module] if node.module else [])]
            yield from (".".join([*source, alias.name]) for alias in node.names)
        elif is_init and isinstance(node, ast.Constant) and re.fullmatch(r"\w+(\.\w+)+", str(node.value)):
            yield node.value
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))
        left += ast.iter_child_nodes(node)


def import_graph(root: Path, packages: list[str]) -> dict[str, set[str]]:
    """Module -> modules of these packages that it imports. An import of ``a.b.c`` counts for the longest name that is a
    module, and not for the packages above it."""
    files = {name: file for package in packages for name, file in modules_of(root, package).items()}
    graph = {name: set() for name in files}
    for name, file in files.items():
        for imported in imported_names(name, file):
            parts = imported.split(".")
            prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
            if (module := next((prefix for prefix in prefixes if prefix in files), name)) != name:
                graph[name].add(module)
    return graph


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others."""
    groups = networkx.strongly_connected_components(networkx.DiGraph(graph))
    return sorted(sorted(group) for group in groups if len(group) > 1)


@pytest.fixture(scope="module")
def graph():
    return import_graph(ROOT, list(MAY_IMPORT))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_import_cycles(graph, package):
    found = [group for group in cycles(graph) if any(name.split(".")[0] == package for name in group)]
    assert not found, "modules that import each other:\n" + "\n".join(" <-> ".join(group) for group in found)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_in_one_direction(graph, package):
    wrong = [
        f"{name} imports {imported}"
        for name, targets in graph.items()
        for imported in sorted(targets)
        if name.split(".")[0] == package and imported.split(".")[0] not in {package, *MAY_IMPORT[package]}
    ]
    assert not wrong, "\n".join(wrong)


def test_every_kind_of_cycle_is_found(tmp_path):
    files = {
        "p/__init__.py": "LAZY = {'p.one': 'name'}",
        "p/one.py": "def f():\n    from p.two import g",  # inside a function
        "p/two.py": "import p.one as one",
        "p/three.py": "if TYPE_CHECKING:\n    from p.four import h",  # for the type checker only
        "p/four.py": "from p import three\nimport os",
        "p/five.py": "from p import name",  # through the lazy export below
        "p/six/__init__.py": "def __getattr__(name):\n    return import_module('p.six.seven')",
        "p/six/seven.py": "from . import eight",
        "p/six/eight.py": "from p.six import name",
    }
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    found = import_graph(tmp_path, ["p"])
    assert found["p.four"] == {"p.three"} and found["p.three"] == set()
    assert cycles(found) == [["p.one", "p.two"], ["p.six", "p.six.eight", "p.six.seven"]]
    (tmp_path / "p/one.py").write_text("from p import two, name")
    assert ["p", "p.one", "p.two"] in cycles(import_graph(tmp_path, ["p"]))


def newly_imported(launch: Launch, modules: list[str], watched: list[str]) -> list[str]:
    """Which of the watched modules a fresh process has imported after these, and had not after ``import torch``."""
    code = (
        "import sys, importlib, torch\nbefore = set(sys.modules)\n"
        f"for name in {modules}: importlib.import_module(name)\n"
        f"print(*(name for name in {watched} if name in set(sys.modules) - before))"
    )
    return launch.python("-c", code).succeeded().out.split()


def test_training_starts_without_heavy_packages(launch):
    assert newly_imported(launch, ["trainer.loop"], HEAVY) == []


def test_models_import_little_beyond_torch(launch):
    assert newly_imported(launch, MODELS, [*HEAVY, "omegaconf", "yaml", "PIL"]) == []
