"""``config.yaml`` of Emu3.5's vision tokenizer (arXiv 2510.26583), a folder with ``config.yaml`` and ``model.ckpt``.

``model.ckpt`` is read by `published_ckpt`: its module names are those of IBQ's published checkpoints. Settings of
``config.yaml`` that change what the model computes are read, or rejected if this project does not have them. The
settings of the published training (``beta``, ``use_entropy_loss`` and others) do not belong to the model.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from model_zoo.errors import ModelError
from model_zoo.io.export_format import CONFIG

CHECKPOINT = "model.ckpt"
# Keys that the published code requires, and the smallest and largest value. The largest ones only keep a damaged file
# from taking time or memory: the weights have to fit the values anyway.
SIZES = {"n_embed": (2, 2**31), "embed_dim": (1, 2**20)}
AUTOENCODER_SIZES = {"ch": (1, 2**20), "num_res_blocks": (1, 1000), "z_channels": (1, 2**20), "resolution": (1, 2**20)}
# Keys with only one supported value. The second one is what the published code takes when the key is missing.
ONLY = {"cosine_similarity": (False, False), "remap": (None, None)}
AUTOENCODER_ONLY = {
    "double_z": (False, True),
    "in_channels": (3, None),
    "out_ch": (3, None),
    "resamp_with_conv": (True, True),
    "give_pre_end": (False, False),
}
# Settings of training, beside the model.
TRAINING = (
    "beta",
    "use_entropy_loss",
    "entropy_temperature",
    "sample_minimization_weight",
    "batch_maximization_weight",
)
RESOLUTION = 256  # written to config.yaml: the published one, of which attn_resolutions are fractions
GROUPS = 32  # of every norm in the published code


def is_emu_folder(source: Path) -> bool:
    """Whether the path is a folder whose ``config.yaml`` describes Emu3.5's tokenizer."""
    path = source / CONFIG
    try:
        return path.is_file() and bool(re.search(r"^ddconfig\s*:", path.read_text(errors="replace"), re.MULTILINE))
    except OSError:  # of a run or an export, whose readers report it
        return False


def read_emu_config(folder: Path) -> tuple[dict, list[str]]:
    """Fields of `TokenizerConfig` from ``config.yaml``, and notes on settings without effect. Raises ModelError."""
    path = folder / CONFIG
    try:
        about = yaml.safe_load(path.read_text())
        if not isinstance(about, dict):
            raise ValueError("it holds no keys")
        return _read(about)
    except (OSError, yaml.YAMLError, ValueError) as error:
        detail = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{path} does not describe Emu3.5's tokenizer: {detail}") from error


def _read(about: dict) -> tuple[dict, list[str]]:
    """`read_emu_config` of parsed content. Raises ValueError."""
    autoencoder = about.get("ddconfig")
    if not isinstance(autoencoder, dict):
        raise ValueError(f"ddconfig is {autoencoder!r}, not a group of keys")
    sizes = {key: _whole(about, key, key, *bounds) for key, bounds in SIZES.items()}
    sizes |= {key: _whole(autoencoder, key, f"ddconfig.{key}", *bounds) for key, bounds in AUTOENCODER_SIZES.items()}
    multipliers = _list(autoencoder, "ch_mult")
    attended = _list(autoencoder, "attn_resolutions")
    _check_only(about, ONLY, "")
    _check_only(autoencoder, AUTOENCODER_ONLY, "ddconfig.")
    if not multipliers:
        raise ValueError("ddconfig.ch_mult=[] has no level")
    if wrong := wrong_width(sizes["ch"], multipliers):
        raise ValueError(f"ddconfig.ch and ch_mult give {wrong}")
    coarsest = 2 ** (len(multipliers) - 1)
    if sizes["resolution"] % coarsest:  # encoder and decoder would count other resolutions
        raise ValueError(f"ddconfig.resolution={sizes['resolution']} is not a multiple of {coarsest}")
    normalize = about.get("l2_normalize", False)
    if not isinstance(normalize, bool):
        raise ValueError(f"l2_normalize={normalize!r} is neither true nor false")
    config = {
        "quantizer": "ibq",
        "codebook_size": sizes["n_embed"],
        "code_dim": sizes["embed_dim"],
        "channels": sizes["ch"],
        "channel_multipliers": multipliers,
        "num_res_blocks": sizes["num_res_blocks"],
        "attention_factors": [2**i for i in range(len(multipliers)) if sizes["resolution"] // 2**i in attended],
        "latent_channels": sizes["z_channels"],
        "normalize": normalize,
    }
    return config, _notes(about, autoencoder)


def _whole(keys: dict, key: str, named: str, least: int, most: int) -> int:
    if key not in keys:
        raise ValueError(f"it lacks {named}")
    value = keys[key]
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{named}={value!r} is not a whole number of {least} to {most}")
    return value


def _list(keys: dict, key: str) -> list[int]:
    """A list of whole numbers."""
    if key not in keys:
        raise ValueError(f"it lacks ddconfig.{key}")
    value = keys[key]
    if not isinstance(value, list) or not all(type(each) is int and 1 <= each <= 2**20 for each in value):
        raise ValueError(f"ddconfig.{key}={value!r} is not a list of whole numbers above 0")
    return value


def _check_only(keys: dict, only: dict[str, tuple[Any, Any]], prefix: str) -> None:
    for key, (supported, default) in only.items():
        value = keys.get(key, default)
        if value == supported and type(value) is type(supported):
            continue
        fix = "" if prefix else ", and so the published loader computes, which ignores the key: write that"
        if key not in keys:
            raise ValueError(
                f"it lacks {prefix}{key}, and only {_yaml(supported)} is supported, which is not the default"
            )
        raise ValueError(f"{prefix}{key}={_yaml(value)} is not supported, only {_yaml(supported)}{fix}")


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).splitlines()[0]


def _notes(about: dict, autoencoder: dict) -> list[str]:
    notes = []
    if about.get("l2_normalize"):
        notes.append(
            "l2_normalize is true: features and codes are divided by their norms, as in the published quantizer; the "
            "published loader does not pass the key to it, and computes without it"
        )
    if autoencoder.get("dropout"):
        notes.append(f"ddconfig.dropout={autoencoder['dropout']} has no effect here: training uses no dropout")
    known = {"ddconfig", "l2_normalize", *SIZES, *ONLY, *TRAINING}
    known_there = {"ch_mult", "attn_resolutions", "dropout", *AUTOENCODER_SIZES, *AUTOENCODER_ONLY}
    unknown = [str(key) for key in about if key not in known]
    unknown += [f"ddconfig.{key}" for key in autoencoder if key not in known_there]
    if unknown:
        notes.append(f"ignored, as in the published code: {', '.join(unknown)}")
    return notes


# ------------------------------------------------------------------------------------------------------- writing


def write_emu_config(path: Path, config: dict) -> None:
    """Writes the ``config.yaml`` of a tokenizer. config: all fields of a `TokenizerConfig` that `unsupported` by the
    layout are not."""
    levels = len(config["channel_multipliers"])
    resolution = max(RESOLUTION, 2 ** (levels - 1))
    about = {
        "ddconfig": {
            "double_z": False,
            "z_channels": config["latent_channels"],
            "resolution": resolution,
            "in_channels": 3,
            "out_ch": 3,
            "ch": config["channels"],
            "ch_mult": list(config["channel_multipliers"]),
            "num_res_blocks": config["num_res_blocks"],
            "attn_resolutions": [resolution // factor for factor in config["attention_factors"]],
            "dropout": 0.0,
        },
        "n_embed": config["codebook_size"],
        "embed_dim": config["code_dim"],
        "use_entropy_loss": False,  # with true, the published code fails outside training
        "cosine_similarity": False,
        "l2_normalize": config["normalize"],
    }
    path.write_text(yaml.safe_dump(about, sort_keys=False), encoding="utf-8")


def unsupported(config: dict, only: dict[str, tuple]) -> str | None:
    """A setting of a tokenizer that a published layout has no place for, or None. only: supported values by key, of
    which the first is the default."""
    for key, supported in only.items():
        if (value := config.get(key, supported[0])) not in supported:
            return f"model.{key}={str(value).lower()}"
    return wrong_width(config["channels"], config["channel_multipliers"])


def wrong_width(channels: int, multipliers: list[int]) -> str | None:
    """A width that the published norms cannot have, or None."""
    for multiplier in (1, *multipliers):
        if (width := channels * multiplier) % GROUPS:
            return f"{width} channels, not a multiple of the {GROUPS} groups of its norms"
    return None
