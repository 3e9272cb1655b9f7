"""Reads and writes published checkpoints of tokenizers and generators, without their code: PyTorch Lightning's
``.ckpt``, and plain state dicts in any of SUFFIXES.

Keys of a generator start with ``transformer.``, or are our parameter names. Keys of a tokenizer are our parameter
names; in a generator's file they start with ``first_stage_model.``. The discriminator is stored under ``loss.``. EMA
weights are stored under ``model_ema.``, with parameter names without dots. The configuration is inferred from shapes.
Every key is accounted for: read, skipped for a stated reason, or rejected. A folder of Emu3.5's tokenizer holds such a
file, with one set of a tokenizer's weights and nothing else, beside a configuration (see `emu_folder`).
"""

import logging
import pickle
import re
import textwrap
import zipfile
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model_zoo.config import TokenizerConfig, TransformerConfig
from model_zoo.discriminator import PatchDiscriminator
from model_zoo.errors import ModelError
from model_zoo.io.emu_folder import CHECKPOINT, is_emu_folder, read_emu_config, unsupported
from model_zoo.io.export_format import CONFIG, MODEL, read_tensors
from model_zoo.io.weights import (
    COUNTERS,
    DTYPES,
    Average,
    Weights,
    check_weights,
    no_weight,
    read_codes_of,
    read_trained_classes,
)
from model_zoo.tokenizer import Tokenizer
from model_zoo.transformer import Transformer

logger = logging.getLogger(__name__)

SUFFIXES = (".ckpt", ".pt", ".pth", ".safetensors")
FIRST_STAGE, EMA = "first_stage_model.", "model_ema."
KEYS = (  # pattern of a key, whose group is our name -> the kind of model, and the field of `Part`
    (r"((?:encoder|decoder|quantize\.embedding|quant_conv|post_quant_conv)\..+)", "tokenizer", "model"),
    (r"loss\.discriminator\.(.+)", "tokenizer", "discriminator"),
    (r"transformer\.(.+)", "generator", "model"),
    (r"((?:tok_emb|class_emb|blocks|head_nm|head)\..+)", "generator", "model"),
)
# Parts of names that torch's wrappers add: DistributedDataParallel, torch.compile, FSDP, activation checkpointing.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
LEFT_OUT = (  # pattern of a key that is not read -> the reason
    (r"(first_stage_model\.)?loss\.perceptual_loss\..+", "LPIPS's network, which is frozen and not part of the model"),
    (
        r"first_stage_model\.loss\.discriminator\..+",
        "untrained: training of a generator does not load the discriminator",
    ),
    (r"(first_stage_model\.)?colorize", "colours for segmentation maps"),
    (r"(transformer\.)?(freqs_cis|causal_mask)", "recomputed when the model is built"),
    (r"transformer\.blocks\.\d+\.attention\.kv_cache\.[kv]_cache", "KV cache left by sampling"),
)
# First bytes of a file in the format that torch used before version 1.6.
OLD_FORMAT = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=torch.serialization.DEFAULT_PROTOCOL)
OTHER_ENTRIES = "training state beside state_dict"
OUR_ENTRY = "ibq"  # entry beside state_dict in files written by this project: configurations by kind
STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")  # buffers of a discriminator
DEFAULT_AVERAGE = Average(0.999)  # as in the published training
MAX_LEVELS, MAX_DEPTH = 16, 1000  # a code would stand for 65,536 x 65,536 pixels; published generators have 30 blocks
PLAIN_AUTOENCODER = {"patch_size": (1,), "local": (False,)}  # settings that published code has, by key
EMU_ONLY = {"quantizer": ("ibq",), "logit_scale": (1.0,), "learn_logit_scale": (False,), **PLAIN_AUTOENCODER}
HEAD_DIM, GRID = 64, (16, 16)  # of all published generators; not visible in any shape


class Part(NamedTuple):
    """One model of a published file, with our names. EMA weights cover parameters only and may be missing; only a
    tokenizer has a discriminator."""

    model: dict[str, Tensor]
    model_ema: dict[str, Tensor]
    discriminator: dict[str, Tensor]
    discriminator_ema: dict[str, Tensor]


class Published(NamedTuple):
    """Content of a published file.

    path: of the file, or of Emu3.5's folder. keys: number of keys of the state dict. parts: models by kind. left_out:
    skipped keys by reason. described: configurations by kind, in files written by this project and in Emu3.5's folder.
    """

    path: Path
    keys: int
    parts: dict[str, Part]
    left_out: dict[str, list[str]]
    average: Average | None
    step: int | None
    described: dict[str, dict]


def is_published(source: Path) -> bool:
    """Whether the path is a file or folder for `read_published`."""
    return is_emu_folder(source) if source.is_dir() else source.suffix in SUFFIXES


def weights_file(source: Path) -> Path:
    """The file that holds the weights of a published checkpoint: in Emu3.5's folder, or the source itself."""
    return source / CHECKPOINT if source.is_dir() else source


def read_published(path: Path, kind: str, weights: str) -> Weights:
    """Reads one model of a published file or folder, memory-mapped.

    kind: ``tokenizer`` or ``generator``. weights: ``raw``, or ``ema``: the EMA weights if the file holds any, otherwise
    its only weights. Raises ModelError.
    """
    published = open_published(path)
    if kind not in published.parts:
        others = "".join(f": it is a {other}'s checkpoint" for other in published.parts)
        raise ModelError(f"{path} holds no {kind}{others}")
    part = published.parts[kind]
    tensors = part.model_ema if weights == "ema" and part.model_ema else part.model
    if missing := [name for name in part.model if name not in tensors]:
        raise ModelError(f"{path} holds no average of {missing[0]}, but of other parameters: use the raw weights")
    infer = {"tokenizer": _tokenizer_config, "generator": _generator_config}[kind]
    try:
        config = published.described.get(kind) or infer(tensors)
    except ValueError as error:
        raise ModelError(f"{path} is not a published {kind}: it {error}") from error
    if part.discriminator:
        _check_discriminator(path, part.discriminator)
    if kind == "tokenizer" and kind not in published.described:
        _say_once(
            f"{path} does not name its quantizer, and IBQ is assumed: codes of a VQ tokenizer would be wrong; for one, "
            "set model.quantizer to vq in the config.yaml that `ibq checkpoint import` writes"
        )
    found = "ema" if tensors is part.model_ema else "raw"
    return Weights(
        config,
        tensors,
        part.discriminator or None,
        f"{path} ({found} weights)",
        str(path / CONFIG) if path.is_dir() else f"a published {kind}",
        found,
        part.discriminator_ema or None,
        published.average,
        published.step,
        read_trained_classes(published.described, config, path) if kind == "generator" else None,
        read_codes_of(published.described, path) if kind == "generator" else None,
    )


def open_published(path: Path) -> Published:
    """Assigns every key without reading values. Raises ModelError for a damaged file and for unknown keys."""
    file, folder = weights_file(path), path if path.is_dir() else None
    if not folder and path.name in (CHECKPOINT, MODEL) and is_emu_folder(path.parent):
        raise ModelError(f"{path} is a part of Emu3.5's tokenizer: give its folder {path.parent}, with the {CONFIG}")
    checkpoint = _load(file)
    state = _without_wrappers(file, checkpoint["state_dict"])
    described = _emu_described(folder, state) if folder else checkpoint.get(OUR_ENTRY)
    others = [str(entry) for entry in checkpoint if entry not in ("state_dict", OUR_ENTRY)]
    left_out = {OTHER_ENTRIES: others} if others else {}
    first_stage = FIRST_STAGE if any(key.startswith(FIRST_STAGE) for key in state) else ""
    dotless = {key.replace(".", ""): key for key in state if not _is_average(key)}
    parts, averaging, unknown = {}, {}, []
    orphans = []  # parameters, without dots, of which there is only an average
    for key, tensor in state.items():
        prefix, is_average, name = key.rpartition(EMA) if _is_average(key) else ("", "", key)
        if is_average and name in Average._fields and not no_weight(tensor, DTYPES + COUNTERS) and tensor.numel() == 1:
            averaging[name] = tensor.item()
            continue
        of = dotless.get(prefix.replace(".", "") + name) if is_average else key
        if of and (why := _why_left_out(of)):
            left_out.setdefault(why, []).append(key)
        elif odd := no_weight(tensor, COUNTERS if key.endswith(STATISTICS[-1]) else DTYPES):
            fix = "save it as a plain tensor, or remove it if it is not part of the model"
            raise ModelError(f"{path} holds {key} {odd}, no weight: {fix}")
        elif of and (place := _place(of, first_stage)):
            kind, field, name = place
            part = parts.setdefault(kind, Part({}, {}, {}, {}))
            getattr(part, f"{field}_ema" if is_average else field)[name] = tensor
        else:
            unknown.append(f"{key} of shape {list(tensor.shape)}")
            orphans += [prefix.replace(".", "") + name] if is_average else []
    if orphans and (missing := _missing(path, orphans, parts, first_stage)):
        more = f" (and {len(missing) - 1} more such)" if len(missing) > 1 else ""
        raise ModelError(f"{path} lacks {missing[0]}{more}, of which it holds an average: download or save it again")
    if unknown:
        more = f" (and {len(unknown) - 1} more such)" if len(unknown) > 1 else ""
        raise ModelError(
            f"{path} holds {unknown[0]}{more}, which no published tokenizer or generator has: remove it from the "
            "state_dict if it is not part of the model"
        )
    average = Average(**averaging) if "decay" in averaging else None
    step = checkpoint.get("global_step")
    step, described = step if type(step) is int else None, described if isinstance(described, dict) else {}
    return Published(path, len(state), parts, left_out, average, step, described)


def _emu_described(folder: Path, state: dict[str, Tensor]) -> dict[str, dict]:
    """The configuration of Emu3.5's folder, by kind. Raises ModelError, also for a key that its tokenizer cannot have:
    the published code loads strictly, and has no averages and no discriminator."""
    config, notes = read_emu_config(folder)
    strange = [key for key in state if (_place(key, "") or ())[:2] != ("tokenizer", "model")]
    if strange:
        more = f" (and {len(strange) - 1} more such)" if len(strange) > 1 else ""
        raise ModelError(
            f"{folder / CHECKPOINT} holds {strange[0]}{more}, which Emu3.5's tokenizer does not have: remove it from "
            "the state_dict"
        )
    for note in notes:
        _say_once(f"{folder / CONFIG}: {note}")
    return {"tokenizer": config}


def _load(path: Path) -> dict:
    """The entries of a file; ``state_dict`` has tensors by key. Raises ModelError."""
    if path.suffix == ".safetensors":
        return {"state_dict": _read_safetensors(path)}
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if part := _damaged_part(path):
            raise ModelError(f"{path} is damaged (the checksum of {part} differs): download it again")
        if "state_dict" not in checkpoint and all(isinstance(value, Tensor) for value in checkpoint.values()):
            checkpoint = {"state_dict": checkpoint}  # a plain one
        if "state_dict" not in checkpoint:
            raise ModelError(f"{path} is not a published checkpoint: {_how_to_save(path, checkpoint)}")
        state = {str(name): value for name, value in checkpoint["state_dict"].items()}
        if wrong := [name for name, value in state.items() if not isinstance(value, Tensor)]:
            raise ModelError(f"{path} is not a published checkpoint: {wrong[0]} in its state_dict is not a tensor")
        return {**checkpoint, "state_dict": state}
    except FileNotFoundError as error:
        raise ModelError(f"{path} does not exist") from error
    except pickle.UnpicklingError as error:
        if not (pickled := re.search(r"GLOBAL (\S+)", str(error))):
            raise ModelError(f"{path} is damaged: download it again") from error
        raise ModelError(
            f"{path} holds a pickled {pickled[1]}, and loading it could run code. If you trust the file, save its "
            f"tensors alone: import torch; file = torch.load('{path.name}', weights_only=False); "
            "torch.save(file['state_dict'], 'weights.pt'), with file.state_dict() if it is a whole model"
        ) from error
    except (OSError, EOFError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and _is_old_format(path):
            raise ModelError(
                f"{path} is in torch's old format, but only zip files are supported: save it again with a new torch: "
                "torch.save(torch.load(FILE), FILE)"
            ) from error
        if path.is_file() and not zipfile.is_zipfile(path):
            raise ModelError(f"{path} is damaged or not a checkpoint: download it again") from error
        detail = textwrap.shorten(str(error) or repr(error), 120, placeholder=" ...")
        raise ModelError(f"{path} cannot be read: {detail}") from error
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{path} is not a published checkpoint: it holds no state_dict of tensors") from error


def _damaged_part(path: Path) -> str | None:
    """A part of a torch file whose content is not what was written. torch.load does not compare checksums."""
    with zipfile.ZipFile(path) as file:
        for part in file.infolist():
            if not part.CRC:  # torch can be told to write none
                continue
            try:
                with file.open(part) as content:
                    while content.read(1 << 20):
                        pass
            except zipfile.BadZipFile:
                return part.filename
    return None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise ModelError(f"{path} does not exist")
    for beside, what in {"config.yaml": "an export", "manifest.json": "a checkpoint of a run"}.items():
        if (path.parent / beside).is_file():  # which knows more than the shapes tell
            raise ModelError(f"{path} is a part of {what}: give its folder {path.parent}")
    return read_tensors(path)


def _how_to_save(path: Path, checkpoint: dict) -> str:
    """What a file without ``state_dict`` holds, and what to do if the state dict is under another name."""
    named = [
        str(name)
        for name, value in checkpoint.items()
        if isinstance(value, dict) and value and all(isinstance(tensor, Tensor) for tensor in value.values())
    ]
    if not named:
        return "it holds no state_dict of tensors"
    return (
        f"it holds no state_dict, but {', '.join(named[:3])}: save the weights alone: "
        f"torch.save(torch.load('{path.name}')['{named[0]}'], 'weights.pt')"
    )


def _without_wrappers(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without what torch's wrappers add to its keys; a message says so. Raises ModelError if two keys
    are the same without it."""
    plain, changed = {}, 0
    for key, tensor in state.items():
        prefix, average, name = key.rpartition(EMA) if _is_average(key) else ("", "", key)
        if average:  # has no dots
            name = re.sub("|".join(WRAPPERS[::-1]), "", name)
        else:
            name = ".".join(part for part in key.split(".") if part not in WRAPPERS)
        name = prefix + average + name
        if name in plain:
            raise ModelError(f"{path} holds {name} twice, once as {key}: remove one of them")
        plain[name], changed = tensor, changed + (name != key)
    if changed:
        _say_once(f"{path}: the wrappers' names ({', '.join(WRAPPERS[:2])} ...) were removed from {changed:,} keys")
    return plain


@lru_cache(maxsize=64)  # a file is opened several times
def _say_once(message: str) -> None:
    logger.warning("%s", message)


def _is_old_format(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(OLD_FORMAT)) == OLD_FORMAT


def _missing(path: Path, orphans: list[str], parts: dict[str, Part], first_stage: str) -> list[str]:
    """Keys that the file's models should have, judging by their sizes, but of which the file holds only an average."""
    keys, orphans = [], set(orphans)
    for kind, part in parts.items():
        try:
            with torch.device("meta"):
                if kind == "generator":
                    model, prefix = Transformer(TransformerConfig(**_generator_config(part.model))), "transformer."
                else:
                    model, prefix = Tokenizer(TokenizerConfig(**_tokenizer_config(part.model))), first_stage
                beside = PatchDiscriminator(layers=_discriminator_layers(part.discriminator))
        except ValueError as error:
            raise ModelError(f"{path} is not a published {kind}: it {error}") from error
        keys += [prefix + name for name in model.state_dict()]
        keys += [f"loss.discriminator.{name}" for name in beside.state_dict() if part.discriminator]
    return [key for key in keys if key.replace(".", "") in orphans]


def _is_average(key: str) -> bool:
    return key.startswith((EMA, FIRST_STAGE + EMA))


def _why_left_out(key: str) -> str | None:
    return next((why for pattern, why in LEFT_OUT if re.fullmatch(pattern, key)), None)


def _place(key: str, first_stage: str) -> tuple[str, str, str] | None:
    """(kind of model, field of `Part`, our name) of a key. first_stage: prefix of the tokenizer's keys."""
    for pattern, kind, field in KEYS:
        if match := re.fullmatch((re.escape(first_stage) if kind == "tokenizer" else "") + pattern, key):
            return kind, field, match[1]
    return None


def _tokenizer_config(tensors: dict[str, Tensor]) -> dict:
    channels = _shape(tensors, "encoder.conv_in.weight", 4)[0]
    levels = _count(tensors, r"encoder\.down\.(\d+)\.")
    if levels > MAX_LEVELS:
        raise ValueError(f"has {levels:,} levels")
    widths = [_shape(tensors, f"encoder.down.{level}.block.0.conv1.weight", 4)[0] for level in range(levels)]
    if odd := [width for width in widths if width % channels]:
        raise ValueError(
            f"has a level of {odd[0]} channels, not a multiple of the {channels} of encoder.conv_in.weight"
        )
    codebook_size, code_dim = _shape(tensors, "quantize.embedding.weight", 2)
    return {
        "codebook_size": codebook_size,
        "code_dim": code_dim,
        "channels": channels,
        "channel_multipliers": [width // channels for width in widths],
        "num_res_blocks": _count(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        "attention_factors": [2**i for i in range(levels) if _count(tensors, rf"encoder\.down\.{i}\.attn\.(\d+)\.")],
        "latent_channels": _shape(tensors, "encoder.conv_out.weight", 4)[0],
    }


def _generator_config(tensors: dict[str, Tensor]) -> dict:
    vocabulary, width = _shape(tensors, "tok_emb.weight", 2)
    if width % HEAD_DIM:
        raise ValueError(f"has tok_emb.weight of width {width}, not a multiple of a head's {HEAD_DIM}")
    depth = _count(tensors, r"blocks\.(\d+)\.")
    if depth > MAX_DEPTH:
        raise ValueError(f"has {depth:,} blocks")
    return {
        "vocabulary": vocabulary,
        "classes": _shape(tensors, "class_emb.embedding_table.weight", 2)[0] - 1,
        "grid": list(GRID),
        "depth": depth,
        "heads": width // HEAD_DIM,
        "head_dim": HEAD_DIM,
    }


def _shape(tensors: dict[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(f"lacks {name}")
    shape = tuple(tensors[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise ValueError(f"holds {name} of shape {list(shape)}, expected {dimensions} dimensions")
    return shape


def _count(names: Iterable[str], pattern: str) -> int:
    """How many numbers ``pattern`` matches in the names. Raises ValueError unless they are 0, 1, 2 and so on."""
    numbers = dict.fromkeys(match[1] for name in names if (match := re.match(pattern, name)))
    expected = set(map(str, range(len(numbers))))
    if odd := [number for number in numbers if number not in expected]:
        name = next(name for name in names if (match := re.match(pattern, name)) and match[1] == odd[0])
        raise ValueError(f"holds {textwrap.shorten(name, 80)}, but only {len(numbers)} such parts")
    return len(numbers)


def _check_discriminator(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        channels = _shape(tensors, "main.0.weight", 4)[0]
    except ValueError as error:
        raise ModelError(f"{path}: its discriminator {error}") from error
    with torch.device("meta"):
        expected = PatchDiscriminator(channels=channels, layers=_discriminator_layers(tensors))
    check_weights(tensors, expected.state_dict(), f"{path}: its discriminator")


def _discriminator_layers(tensors: dict[str, Tensor]) -> int:
    # Numbering: two modules for the first layer, three for each further layer, one for the last.
    last = max((int(match[1]) for name in tensors if (match := re.match(r"main\.(\d{1,9})\.", name))), default=0)
    return min(max((last + 1) // 3 - 1, 1), len(tensors))


# ------------------------------------------------------------------------------------------------------- writing


def published_state(kind: str, raw: Weights, ema: Weights | None = None) -> dict[str, Tensor]:
    """State dict of a published checkpoint: the raw weights, and the discriminator and EMA weights if there are any.
    Raises ModelError for a model that the published code cannot build."""
    if wrong := _unsupported(kind, raw.config):
        raise ModelError(f"{raw.origin}: the published layout does not support {wrong}: export to safetensors instead")
    state = {("transformer." if kind == "generator" else "") + name: tensor for name, tensor in raw.tensors.items()}
    averages = {name: ema.tensors[name] for name in raw.tensors} if ema else {}
    if raw.discriminator and is_publishable(raw.discriminator):
        state |= {f"loss.discriminator.{name}": tensor for name, tensor in raw.discriminator.items()}
        # The published code also keeps an EMA of the discriminator but never uses it, so its raw weights can stand in.
        of_parameters = {n: t for n, t in raw.discriminator.items() if not n.endswith(STATISTICS)}
        averages |= {f"loss.discriminator.{n}": t for n, t in (raw.discriminator_ema or of_parameters).items()}
    if ema:
        state |= {EMA + name.replace(".", ""): tensor for name, tensor in averages.items()}
        decay, updates = raw.average or DEFAULT_AVERAGE
        state |= {f"{EMA}decay": torch.tensor(decay), f"{EMA}num_updates": torch.tensor(updates, dtype=torch.int)}
    return state


def emu_state(found: Weights) -> dict[str, Tensor]:
    """State dict of Emu3.5's folder: one set of a tokenizer's weights. Raises ModelError for a model that the published
    code cannot build."""
    if wrong := unsupported(found.config, EMU_ONLY):
        raise ModelError(f"{found.origin}: Emu3.5's layout does not support {wrong}: export to safetensors instead")
    return dict(found.tensors)


def is_publishable(discriminator: dict[str, Tensor]) -> bool:
    """Whether the published code can build this discriminator, which must have BatchNorm."""
    return any(name.endswith(STATISTICS) for name in discriminator)


def _unsupported(kind: str, config: dict) -> str | None:
    """A setting that the published code cannot build, or None."""
    if kind == "generator":
        (rows, columns), embedding = config.get("grid", GRID), config.get("embedding", "learned")
        if rows != columns:
            return f"model.grid=[{rows},{columns}], which is not square"
        if grids := config.get("grids"):
            return f"model.grids=[{','.join(grids)}], whose embeddings have no key there"
        return None if embedding == "learned" else f"model.embedding={embedding}"
    return unsupported(config, {"quantizer": ("ibq", "vq"), "normalize": (False,), **PLAIN_AUTOENCODER})
