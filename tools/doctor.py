"""`ibq doctor`: checks this machine's setup and suggests fixes.

Checks import what they need: `tools.cli` calls `shadowed_packages` at every start, which must be quick.
"""

import contextlib
import importlib.util
import os
import platform
import shlex
import shutil
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import typer

PACKAGES = ("trainer", "model_zoo", "data", "tools", "ds_configs")
ROOT = Path(__file__).resolve().parent.parent
STALE_LOCK_SECONDS = 15 * 60
LOOK_UP_SECONDS = 5.0
GIB = 2**30

OK, OPTIONAL, PROBLEM = "ok", "optional", "problem"


class Finding(NamedTuple):
    """One line of the report. status: OK, OPTIONAL (not needed) or PROBLEM (something will fail)."""

    name: str
    status: str
    found: str
    fix: str = ""


def condition(name: str, holds: bool, found: str, fix: str, otherwise: str = PROBLEM) -> Finding:
    """OK if the condition holds, and otherwise the status of that name with the fix."""
    return Finding(name, OK, found) if holds else Finding(name, otherwise, found, fix)


class Shadow(NamedTuple):
    """One of ibq's packages whose name Python resolves to something else."""

    package: str
    file: str
    fix: str


# --- packages of the same name ----------------------------------------------------------------------------------------


def shadowed_packages() -> list[Shadow]:
    """ibq's packages for which Python would import something else. Imports nothing."""
    shadows = []
    for package in PACKAGES:
        location = _location(package)
        if location is None:
            shadows.append(Shadow(package, "nothing", f"reinstall ibq: {ROOT / package} is missing"))
        elif not location.is_relative_to(ROOT / package):
            shadows.append(Shadow(package, str(location), _shadow_fix(package, location)))
    return shadows


def _location(package: str) -> Path | None:
    """The file, or for a package without `__init__.py` the folder, that `import package` would load."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return None
    return Path(spec.origin or next(iter(spec.submodule_search_locations))).resolve()


def _shadow_fix(package: str, location: Path) -> str:
    culprit = location.parent if location.name == "__init__.py" else location
    folder = culprit.parent
    if folder == Path.cwd():
        return f"rename {culprit}, or run from another folder"
    if folder in [Path(entry).resolve() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]:
        return f"remove {folder} from PYTHONPATH"
    owners = _owners(package)
    if owners:
        return f"pip uninstall {' '.join(owners)}, or install ibq in a separate virtual environment"
    return f"rename {culprit}, or remove {folder} from sys.path"


def _owners(package: str) -> list[str]:
    """Installed distributions other than ibq that provide the top-level name ``package``."""
    return sorted(set(metadata.packages_distributions().get(package, [])) - {"ibq"})


def check_package_names() -> Iterator[Finding]:
    shadows = {shadow.package: shadow for shadow in shadowed_packages()}
    ours = []
    for package in PACKAGES:
        if shadow := shadows.get(package):
            yield Finding(f"package {package}", PROBLEM, f"Python imports {shadow.file}", shadow.fix)
        elif owners := _owners(package):  # pip silently lets a second distribution write into the folder
            names = " ".join(owners)
            fix = f"pip uninstall {names}, then reinstall ibq with --force-reinstall --no-deps"
            yield Finding(f"package {package}", PROBLEM, f"also installed by {names}", fix)
        else:
            ours.append(package)
    if ours:
        yield Finding("own packages", OK, f"{', '.join(ours)} from {ROOT}")


# --- the machine ------------------------------------------------------------------------------------------------------


def check_python() -> Iterator[Finding]:
    fix = "use Python 3.10 or newer: make PYTHON=python3.12 install"
    yield condition("Python", sys.version_info >= (3, 10), f"{platform.python_version()} at {sys.executable}", fix)


def check_machine() -> Iterator[Finding]:
    yield Finding("platform", OK, platform.platform())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("CPU cores", OK, str(cores))
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("memory", OK, f"{memory_bytes / GIB:.1f} GiB")
    free_bytes = shutil.disk_usage(Path.cwd()).free
    fix = "free some space, or write runs to another disk: run=/other/disk/my_run"
    yield condition("disk", free_bytes > 2 * GIB, f"{free_bytes / GIB:.1f} GiB free here ({Path.cwd()})", fix)
    shared = Path("/dev/shm")
    if shared.is_dir():
        free_bytes = shutil.disk_usage(shared).free
        found = f"{free_bytes / GIB:.1f} GiB free in {shared}"
        fix = "data workers pass batches through it: use docker run --shm-size=8g, or data.workers=0"
        yield condition("shared memory", free_bytes > GIB, found, fix, otherwise=OPTIONAL)


def check_host_name() -> Iterator[Finding]:
    """torchrun looks up the machine's own name and waits for minutes if it has no address, even on one machine."""
    name, found = socket.gethostname(), []

    def look_up() -> None:
        with contextlib.suppress(OSError):
            found.append(socket.getaddrinfo(name, None)[0][4][0])

    thread = threading.Thread(target=look_up, daemon=True)  # a name server that does not answer takes long
    thread.start()
    thread.join(LOOK_UP_SECONDS)
    fix = (
        f"torchrun would wait for minutes: use torchrun --local-addr 127.0.0.1, or add '127.0.0.1 {name}' to /etc/hosts"
    )
    yield condition("host name", bool(found), f"{name} is {found[0] if found else 'not resolved to an address'}", fix)


def check_compiler() -> Iterator[Finding]:
    """DeepSpeed on CPU compiles its shared-memory all-reduce at first use, and needs all three. It calls CXX or c++,
    torch.compile CXX or g++."""
    import torch

    missing = OPTIONAL if torch.cuda.is_available() else PROBLEM
    without = "DeepSpeed on CPU and torch.compile need it"

    for command in [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++"]:
        compiler = shutil.which(command)
        fix = f"{without}: install a C++ compiler (Debian: apt install g++), or set CXX to one"
        yield condition("C++ compiler", bool(compiler), compiler or f"{command} is not on PATH", fix, missing)

    header = Path(sysconfig.get_path("include"), "Python.h")
    present = header.is_file()
    fix = f"{without}: install Python's headers (Debian: apt install python3-dev)"
    yield condition("Python headers", present, f"{'' if present else 'no '}{header}", fix, missing)

    beside_python = Path(sysconfig.get_path("scripts"), "ninja")
    ninja = shutil.which("ninja")
    if ninja:
        yield Finding("ninja", OK, ninja)
    elif beside_python.is_file():
        fix = f"DeepSpeed on CPU needs it on PATH: . {beside_python.parent / 'activate'}"
        yield Finding("ninja", OPTIONAL, f"{beside_python} is not on PATH", fix)
    else:
        yield Finding("ninja", missing, "not installed", "DeepSpeed on CPU needs it: pip install ninja")


# --- libraries --------------------------------------------------------------------------------------------------------


def check_requirements() -> Iterator[Finding]:
    """Compares installed versions with the ranges in ibq's metadata."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("ibq")
    except metadata.PackageNotFoundError:
        yield Finding("ibq", PROBLEM, f"not installed; running from {ROOT}", f"pip install -e {shlex.quote(str(ROOT))}")
        return
    yield Finding("ibq", OK, f"{metadata.version('ibq')} from {ROOT}")
    for requirement in map(Requirement, lines):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        wanted = f"{requirement.name}{requirement.specifier}"
        fix = f"pip install {shlex.quote(wanted)}"
        version = _version(requirement.name)
        if version is None:
            yield Finding(requirement.name, PROBLEM, "not installed", fix)
        elif requirement.specifier.contains(version, prereleases=True):
            yield Finding(requirement.name, OK, f"{version}  {requirement.specifier}".rstrip())
        else:
            yield Finding(requirement.name, PROBLEM, f"{version}, ibq needs {requirement.specifier}", fix)


def _version(package: str) -> str | None:
    """None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_torch() -> Iterator[Finding]:
    import torch
    import torchvision  # noqa: F401  (raises if it was built for another torch)

    if torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(device)
            capability = f"compute capability {properties.major}.{properties.minor}"
            found = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, {capability}"
            yield Finding(f"CUDA device {device}", OK, found)
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        fix = "train with trainer.precision=fp32"
        yield condition("bf16", native, "native" if native else "emulated, slow", fix, otherwise=OPTIONAL)
    else:
        for_gpu = "check `nvidia-smi`" if torch.version.cuda else "install a CUDA build of torch"
        yield Finding("CUDA devices", OPTIONAL, "none", f"training runs on CPU; for a GPU {for_gpu}")
        yield Finding("bf16", OK, "on CPU; slow if the processor emulates it")

    if not torch.distributed.is_available():
        fix = "install a torch built with it; one process can train without, with engine.kind=ddp"
        yield Finding("torch.distributed", PROBLEM, "not in this torch", fix)
        return
    gloo = torch.distributed.is_gloo_available()
    found = "for several processes on CPU" if gloo else "not in this torch"
    yield condition("gloo", gloo, found, "install a torch built with gloo to train on CPU in several processes")
    if torch.distributed.is_nccl_available():
        yield Finding("NCCL", OK, ".".join(map(str, torch.cuda.nccl.version())))
    elif torch.cuda.is_available():
        fix = "install a torch built with it to train on several GPUs"
        yield Finding("NCCL", PROBLEM, "not in this torch", fix)
    else:
        yield Finding("NCCL", OPTIONAL, "not in this torch", "only needed on several GPUs")


def check_deepspeed() -> Iterator[Finding]:
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    yield Finding("DeepSpeed runs on", OK, f"{accelerator.device_name()} by {accelerator.communication_backend_name()}")


APEX = "on NVIDIA GPUs the optimizer is apex's FusedAdam if it has its kernels, otherwise PyTorch's fused AdamW"


def check_apex() -> Iterator[Finding]:
    """NVIDIA's apex has `apex/optimizers` and, if built with its kernels, the module `amp_C`; PyPI's has neither."""
    warning = "`pip install apex` is another project, a toolkit for the Pyramid web framework"
    spec = importlib.util.find_spec("apex")
    if spec is None:
        fix = f"{APEX}. {warning}; NVIDIA's is built from github.com/NVIDIA/apex"
        yield Finding("apex", OPTIONAL, "not installed", fix)
    elif not any(Path(folder, "optimizers").is_dir() for folder in spec.submodule_search_locations or []):
        yield Finding("apex", PROBLEM, f"{spec.origin} is not NVIDIA's: {warning}", "pip uninstall apex")
    elif importlib.util.find_spec("amp_C") is None:
        yield Finding("apex", OPTIONAL, "NVIDIA's, without its kernels (no module amp_C)", APEX)
    else:
        yield Finding("apex", OK, f"NVIDIA's, with its kernels, at {Path(spec.origin).parent}")


def check_generator_kernels() -> Iterator[Finding]:
    """The packages that generators use on NVIDIA GPUs; any release of FlashAttention will do."""
    attention = {"flash_attn_interface": "flash-attn-3", "flash_attn": "flash-attn"}
    loss = {"liger_kernel": "liger-kernel"}
    for releases, instead in ((attention, "torch's attention"), (loss, "loss.impl=chunked")):
        found = [name for module, name in releases.items() if importlib.util.find_spec(module) is not None]
        for name in found:
            yield Finding(name, OK, _version(name) or "installed")
        if not found:
            name = list(releases.values())[-1]
            fix = f"for generators on NVIDIA GPUs: pip install {name}; otherwise {instead} is used"
            yield Finding(name, OPTIONAL, "not installed", fix)


def check_encoders() -> Iterator[Finding]:
    """The package that builds the frozen encoders of tokenizer recipes."""
    if importlib.util.find_spec("timm") is None:
        fix = "for loss.semantic and discriminator.kind=dino: pip install 'ibq[semantic]'"
        yield Finding("timm", OPTIONAL, "not installed", fix)
    else:
        yield Finding("timm", OK, _version("timm") or "installed")


# --- files ------------------------------------------------------------------------------------------------------------


def check_weights_files() -> Iterator[Finding]:
    """The weights of frozen networks, where `model_zoo.eval_nets.weights` looks for them."""
    from model_zoo.eval_nets.patch_encoder import encoder_file
    from model_zoo.eval_nets.weights import WEIGHTS_FILES, WEIGHTS_FOLDER, file_sha256, location, weights_path

    for key, wanted in WEIGHTS_FILES.items():
        name, path = f"{key} weights", weights_path(key)
        if not path.is_file():
            fix = f"for {wanted.purpose}: put {wanted.url} there, or set {WEIGHTS_FOLDER} to its folder"
            yield Finding(name, OPTIONAL, f"no {path}", fix)
        elif file_sha256(path) != wanted.sha256:
            fix = f"for {wanted.purpose}: download {wanted.url} again"
            yield Finding(name, PROBLEM, f"{path} is damaged or the wrong file", fix)
        else:
            yield Finding(name, OK, f"{path}, for {wanted.purpose}")
    wanted = encoder_file("vit_small_patch16_224.dino", "discriminator")
    path = location(wanted)
    if path.is_file():
        found = f"{path}, for {wanted.purpose}; its published hash is not known here, its sha256 is {file_sha256(path)}"
        yield Finding("dino weights", OK, found)
    else:
        fix = f"for {wanted.purpose}: put {wanted.url} there, or set {WEIGHTS_FOLDER} to its folder"
        yield Finding("dino weights", OPTIONAL, f"no {path}", fix)


def check_caches() -> Iterator[Finding]:
    import torch
    from torch.utils import cpp_extension

    from data import cache_folder

    extensions = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    for name, folder, variable in (
        ("ibq's cache", cache_folder(), "IBQ_CACHE"),
        ("torch's cache", Path(torch.hub.get_dir()), "TORCH_HOME"),
        ("torch's extensions", extensions, "TORCH_EXTENSIONS_DIR"),
    ):
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        writable = os.access(existing, os.W_OK | os.X_OK)
        found = str(folder) if writable else f"{existing} is not writable"
        yield condition(name, writable, found, f"set {variable} to a writable folder")
    # Newer torch uses kernel locks, which a killed build releases; its lock file remains and means nothing.
    if hasattr(cpp_extension, "FileBaton"):
        yield from stale_locks(extensions)


def stale_locks(extensions: Path) -> Iterator[Finding]:
    """Up to about torch 2.13, a killed build leaves its lock file behind and later builds wait for it forever."""
    for lock in sorted(extensions.rglob("lock")):
        age_seconds = time.time() - lock.stat().st_mtime
        found = f"{lock} is {age_seconds / 60:.0f} minutes old"
        if age_seconds > STALE_LOCK_SECONDS:
            fix = f"a build was killed and later ones wait forever: rm {shlex.quote(str(lock))}"
            yield Finding("extension lock", PROBLEM, found, fix)
        else:
            yield Finding("extension lock", OPTIONAL, found, "a build is running; if not, remove the file")


# --- the report -------------------------------------------------------------------------------------------------------

CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python,
    check_machine,
    check_host_name,
    check_package_names,
    check_requirements,
    check_torch,
    check_compiler,
    check_deepspeed,
    check_apex,
    check_generator_kernels,
    check_encoders,
    check_weights_files,
    check_caches,
)


def examine(checks: tuple[Callable[[], Iterator[Finding]], ...] = CHECKS) -> list[Finding]:
    """The findings of every check. A check that raises is a finding too: the report must work on a broken machine."""
    findings = []
    for check in checks:
        try:
            findings.extend(check())
        except Exception as error:
            name = check.__name__.removeprefix("check_").replace("_", " ")
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            findings.append(Finding(name, PROBLEM, f"could not be checked: {reason}", "fix the other problems first"))
    return findings


def doctor() -> None:
    """Check this machine's setup and suggest fixes. Exit status 1 if something is a problem.

    Example: ibq doctor
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    with Console(stderr=True).status("checking this machine ..."):
        findings = examine()

    def as_text(text: str, **options) -> Text:
        # Not `data.text.printable`: the report must work where Python finds another package called `data`.
        return Text("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text), **options)

    colours = {OK: "green", OPTIONAL: "yellow", PROBLEM: "bold red"}
    table = Table(box=None, pad_edge=False)
    for column in ("status", "what", "found"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(Text(finding.status, style=colours[finding.status]), *map(as_text, (finding.name, finding.found)))
    console = Console()
    console.print(table)
    console.print()
    for status in (OPTIONAL, PROBLEM):
        for finding in findings:
            if finding.status == status:
                line = as_text(f"{status}: {finding.name}: {finding.fix}", style=colours[status])
                console.print(line, soft_wrap=True)
    problems = sum(finding.status == PROBLEM for finding in findings)
    console.print(f"{problems} problem{'' if problems == 1 else 's'}" if problems else "no problems")
    if problems:
        raise typer.Exit(1)
