"""The manifest of a run's checkpoint: the size and the SHA-256 of each of its files."""

import json
import re
from pathlib import Path

from model_zoo.errors import ModelError
from model_zoo.io.hashing import is_known_sha256, remember_sha256, sha256_of
from model_zoo.io.run_layout import checkpoint_step

STATE, MANIFEST = "state.json", "manifest.json"

COPY_AGAIN = "copy it again, or name another checkpoint of the run"


def read_manifest(folder: Path) -> dict[str, dict]:
    """File name -> its ``bytes`` and ``sha256``. Raises ModelError, without the folder's path."""
    if not folder.is_dir():
        raise ModelError(f"{folder.name} does not exist")
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        files = {name: {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])} for name, entry in files.items()}
        # Every checkpoint has the state and a part of a rank; a tensor file that the manifest does not name is foreign.
        if not {path.name for path in folder.glob("*.safetensors")} <= files.keys():
            raise ValueError("a file that the manifest does not name")
        if STATE not in files or not any(re.fullmatch(r"rank_\d+\.safetensors", name) for name in files):
            raise ValueError("no part of any rank")
    except FileNotFoundError as error:
        raise ModelError(
            f"{MANIFEST} is missing (it was never finished, or an older version of ibq wrote it)"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{MANIFEST} is damaged") from error
    _check_step(folder, files)
    return files


def _check_step(folder: Path, files: dict[str, dict]) -> None:
    """Raises ModelError where the folder of a run's checkpoint is called after another step than that of its state. A
    damaged state is left to the comparison of hashes."""
    path = folder / STATE
    try:
        saved = json.loads(path.read_bytes())["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if checkpoint_step(folder) not in (None, saved) and not wrong_file(path, files[STATE]):
        raise ModelError(f"its {STATE} is of step {saved}: the folder was renamed")


def entry_of(file: Path) -> dict:
    """A file's entry in the manifest."""
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def wrong_file(file: Path, entry: dict) -> str | None:
    """How a file differs from its entry, or None."""
    try:
        size = file.stat().st_size
        found = {"bytes": size} if file.is_file() and size != entry["bytes"] else entry_of(file)
    except FileNotFoundError:
        return f"{file.name} is missing"
    except OSError as error:
        return f"{file.name} cannot be read ({error.strerror})"
    if found["bytes"] != entry["bytes"]:
        return f"{file.name} has {found['bytes']} bytes instead of {entry['bytes']}"
    return None if found == entry else f"{file.name} is not what was written (its sha256 differs)"


def check(folder: Path) -> None:
    """Raises ModelError if a file of a checkpoint is not what was written. A checkpoint without a manifest is accepted.
    Reads each file once per process, unless it changes, and none that `remember` recorded."""
    if not (folder / MANIFEST).exists():
        return
    try:
        files = read_manifest(folder)
    except ModelError as error:
        raise ModelError(f"{folder} is damaged: {error}; {COPY_AGAIN}") from error
    for name, entry in files.items():
        if not is_known_sha256(folder / name, entry["sha256"]):
            if said := wrong_file(folder / name, entry):
                raise ModelError(f"{folder} is damaged: {said}; {COPY_AGAIN}")
            remember_sha256(folder / name, entry["sha256"])


def remember(folder: Path, files: dict[str, dict]) -> None:
    """Records that the files of a checkpoint match their entries, as this or another process has found."""
    for name, entry in files.items():
        remember_sha256(folder / name, entry["sha256"])
