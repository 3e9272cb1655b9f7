"""Models by their name on the Hugging Face hub, through `huggingface_hub` where it is installed."""

import re
from collections.abc import Iterable
from pathlib import Path

from model_zoo.errors import ModelError
from model_zoo.io.export_format import CONFIG, MODEL, is_export


def is_hub_name(source: Path) -> bool:
    """Whether it can only be meant as ``owner/name`` or ``owner/name@revision``: there is no such path, nor a folder
    ``owner`` in which it could be missing."""
    looks_so = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?", str(source), re.ASCII)
    return bool(looks_so) and source.suffix != ".ckpt" and not source.exists() and not Path(source.parts[0]).exists()


def download(name: Path) -> Path:
    """Where the hub's cache holds it: the first ``.ckpt`` of the repository, or the folder of an export. Fetches what
    the cache lacks; without a network the cache is all there is. Raises ModelError."""
    repository, _, revision = str(name).partition("@")
    try:
        import huggingface_hub
    except ImportError as error:
        raise ModelError(
            f"there is no path {name}; names on the model hub need a package: pip install huggingface_hub"
        ) from error
    where = {"repo_id": repository, "revision": revision or None}
    # Their exceptions' classes are those of whichever HTTP library a version uses: all are told alike.
    try:
        wanted = _wanted(huggingface_hub.list_repo_files(**where))
        folder = Path(huggingface_hub.snapshot_download(**where, allow_patterns=wanted))
    except Exception as error:
        try:
            folder = Path(huggingface_hub.snapshot_download(**where, local_files_only=True))
        except Exception:
            detail = (str(error).split("\n")[0] or type(error).__name__)[:200]
            raise ModelError(
                f"{name} is no path here, and the model hub does not give it ({detail}): give the path of a file"
            ) from error
    checkpoints = sorted(folder.rglob("*.ckpt"))
    if not checkpoints and not is_export(folder):
        raise ModelError(f"{name} on the model hub holds neither a .ckpt nor {MODEL} with {CONFIG}: name another")
    return checkpoints[0] if checkpoints else folder


def _wanted(files: Iterable[str]) -> list[str]:
    """The first checkpoint; or all of an export, where there is none."""
    checkpoints = sorted(file for file in files if file.endswith(".ckpt"))
    return checkpoints[:1] or ["*.safetensors", f"*{CONFIG}"]
