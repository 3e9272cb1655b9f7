"""Models from the Hugging Face hub by name. Needs the optional package `huggingface_hub`."""

import re
from pathlib import Path

from model_zoo.errors import ModelError
from model_zoo.io.export_format import CONFIG, MODEL, is_export


def is_hub_name(source: Path) -> bool:
    """Whether the source is a name ``owner/name`` or ``owner/name@revision`` on the hub: neither this path nor a folder
    ``owner`` exists."""
    looks_so = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?", str(source), re.ASCII)
    return bool(looks_so) and source.suffix != ".ckpt" and not source.exists() and not Path(source.parts[0]).exists()


def download(name: Path) -> Path:
    """Downloads a model and returns its path in the Hugging Face cache: the repository's first ``.ckpt``, or the folder
    of an export. Cached files are not downloaded again and work offline. Raises ModelError."""
    repository, _, revision = str(name).partition("@")
    try:
        import huggingface_hub
    except ImportError as error:
        raise ModelError(
            f"{name} does not exist; names on the model hub need a package: pip install huggingface_hub"
        ) from error
    where = {"repo_id": repository, "revision": revision or None}
    # The classes of exceptions depend on the HTTP library that a version of the package uses, so catch all.
    try:
        checkpoints = sorted(file for file in huggingface_hub.list_repo_files(**where) if file.endswith(".ckpt"))
        wanted = checkpoints[:1] or ["*.safetensors", f"*{CONFIG}"]
        folder = Path(huggingface_hub.snapshot_download(**where, allow_patterns=wanted))
    except Exception as error:
        try:
            folder = Path(huggingface_hub.snapshot_download(**where, local_files_only=True))
        except Exception:
            detail = (str(error).split("\n")[0] or type(error).__name__)[:200]
            raise ModelError(
                f"{name} is neither a path nor available on the model hub ({detail}): give the path of a file"
            ) from error
    checkpoints = sorted(folder.rglob("*.ckpt"))
    if not checkpoints and not is_export(folder):
        raise ModelError(f"{name} on the model hub holds neither a .ckpt nor {MODEL} with {CONFIG}: choose another")
    return checkpoints[0] if checkpoints else folder
