"""What the processes of a job must have alike before they start: the code of ibq, and the settings.

Each process reads its own command line, recipe and files. Where one of them got others, each would train its part of
the weights in another way, and the checkpoints would be mixtures.
"""

import functools
import hashlib
import json
import os
from importlib import metadata, resources

from trainer import TrainerError
from trainer.changes import settings_of
from trainer.config import RunConfig
from trainer.parallel import World, gather_objects, listed, run_on_main

# What may differ: the machine's resources, and paths of what the ranks compare by its content.
LOCAL = frozenset(
    {
        *("trainer.device", "data.workers", "data.cache", "data.cache_gigabytes"),
        *("data.train", "data.val", "data.root", "data.classes", "tokenizer.source", "init_from.source"),
        *("loss.semantic.weights", "discriminator.weights"),
        *("loss.perceptual.vgg16_weights", "loss.perceptual.convnext_weights"),
    }
)
LOCAL_OF_SOURCES = frozenset({"root", "index", "filters.keys", "filters.not_keys"})
PACKAGES = "data", "ds_configs", "model_zoo", "trainer"
SUFFIXES = ".py", ".yaml", ".json"  # of the files that decide what training does
SHOWN_KEYS = 5  # in a message
SHOWN_CHARACTERS = 80  # of a value in a message
MISSING = "not set"


@functools.cache
def code_version() -> str:
    """The version of ibq, and a hash of the files of its packages: a checkout may be of another commit."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        root = str(resources.files(package))
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(name for name in folders if not name.startswith((".", "__pycache__")))
            for name in sorted(name for name in names if name.endswith(SUFFIXES) and not name.startswith(".")):
                with open(os.path.join(folder, name), "rb") as file:
                    content = file.read()
                digest.update(f"{package} {os.path.relpath(folder, root)} {name} {len(content)} ".encode() + content)
    try:
        version = metadata.version("ibq")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        version = "not installed"
    return f"{version} (code {digest.hexdigest()[:12]})"


def common_settings(config: RunConfig, contents: dict[str, str], run_is_named: bool) -> dict[str, object]:
    """What must be equal on all ranks of a training run. contents: of `trainer.changes.contents_of`. run_is_named:
    whether the user gave the run's folder, whose name has the time otherwise."""
    left_out = LOCAL if run_is_named else LOCAL | {"run"}
    # data.train takes the place of the recipe's sources.
    left_out = left_out if config.data.train is None else left_out | {"data.sources"}
    settings = {key: value for key, value in settings_of(config).items() if key not in left_out}
    sources = _of_sources(settings.pop("data.sources", ()))
    return {**settings, **sources, **contents}


def _of_sources(sources) -> dict[str, object]:
    found = {}
    for number, source in enumerate(sources):
        flat = _flat(source)
        found |= {f"data.sources[{number}].{key}": flat[key] for key in flat if key not in LOCAL_OF_SOURCES}
    return found


def _flat(values: dict, prefix: str = "") -> dict[str, object]:
    """Nested dictionaries by dotted key."""
    found = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def check_same_start(world: World, settings: dict[str, object]) -> None:
    """Raises TrainerError on every rank where the settings, or the code of ibq, are not equal on all ranks. It names
    the keys that differ, with the values of the ranks. All ranks call together. settings: JSON-able values."""
    if world.size == 1:
        return
    mine = {"ibq": _text(code_version()), **{key: _text(value) for key, value in settings.items()}}
    main = run_on_main(world, lambda: mine)
    keys = [key for key in {**main, **mine} if main.get(key, MISSING) != mine.get(key, MISSING)]
    # Only what differs is gathered, so that a start of many ranks stays cheap.
    others = gather_objects({key: mine.get(key, MISSING) for key in keys})
    if not (differ := list(dict.fromkeys(key for of_rank in others for key in of_rank))):
        return
    parts = []
    for key in differ[:SHOWN_KEYS]:
        ranks: dict[str, list[int]] = {}
        for rank, of_rank in enumerate(others):
            ranks.setdefault(of_rank.get(key, main.get(key, MISSING)), []).append(rank)
        values = " and ".join(f"{_shown(value)} on rank {listed(of_one)}" for value, of_one in ranks.items())
        parts.append(f"{key} is {values}")
    more = f"; and {len(differ) - SHOWN_KEYS} more" if len(differ) > SHOWN_KEYS else ""
    raise TrainerError(
        f"the processes were started with different settings: {'; '.join(parts)}{more}; give all of them the same "
        "command, the same files and the same ibq"
    )


def _text(value: object) -> str:
    return json.dumps(value, default=str, sort_keys=True)


def _shown(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
