"""Published checkpoints (PyTorch Lightning's ``.ckpt``) of tokenizers and generators, read and laid out without their
code.

A generator's keys begin with ``transformer.``; a tokenizer's are our names, alone in the file or, in that of a
generator, behind ``first_stage_model.``. What was trained beside a tokenizer lies behind ``loss.``. Averages of
parameters lie behind ``model_ema.``, their names without dots. The configuration is inferred from shapes. Every key is
accounted for: read, left out for a reason, or refused.
"""

import pickle
import re
import textwrap
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model_zoo.config import TokenizerConfig, TransformerConfig
from model_zoo.discriminator import PatchDiscriminator
from model_zoo.errors import ModelError
from model_zoo.io.weights import Average, Weights, check_names

FIRST_STAGE, EMA = "first_stage_model.", "model_ema."
HOMES = (  # keys -> the kind of model, and which field of `Part`; our name is what the group matches
    (r"((?:encoder|decoder|quantize\.embedding|quant_conv|post_quant_conv)\..+)", "tokenizer", "model"),
    (r"loss\.discriminator\.(.+)", "tokenizer", "discriminator"),
    (r"transformer\.(.+)", "generator", "model"),
)
LEFT_OUT = (  # keys that are not read -> why not
    (r"(first_stage_model\.)?loss\.perceptual_loss\..+", "LPIPS's network, frozen and no part of the model"),
    (r"first_stage_model\.loss\.discriminator\..+", "untrained: a generator's training loads no discriminator"),
    (r"(first_stage_model\.)?colorize", "colours for maps of segments"),
    (r"(transformer\.)?(freqs_cis|causal_mask)", "computed anew"),
    (r"transformer\.blocks\.\d+\.attention\.kv_cache\.[kv]_cache", "left by sampling"),
)
# What a file begins with in the format of before torch 1.6.
OLD_FORMAT = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=torch.serialization.DEFAULT_PROTOCOL)
OTHER_ENTRIES = "training's state, beside state_dict"
OUR_ENTRY = "ibq"  # beside state_dict, of files that were written here: configurations by kind
STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")  # of a discriminator: no parameters
DEFAULT_AVERAGE = Average(0.999)  # of published training
HEAD_DIM, GRID = 64, (16, 16)  # of all published generators, and to be seen in no shape


class Part(NamedTuple):
    """What a published file holds of one model, by our names. Averages are of parameters only, and there may be none;
    a tokenizer alone has a discriminator."""

    model: dict[str, Tensor]
    model_ema: dict[str, Tensor]
    discriminator: dict[str, Tensor]
    discriminator_ema: dict[str, Tensor]


class Published(NamedTuple):
    """A published file, every key in its place.

    keys: how many the state dict has. parts: by kind. left_out: why -> which keys. described: configurations by kind,
    of files that were written here.
    """

    path: Path
    keys: int
    parts: dict[str, Part]
    left_out: dict[str, list[str]]
    average: Average | None
    step: int | None
    described: dict[str, dict]


def is_published(source: Path) -> bool:
    """Whether it is to be read by `read_published`."""
    return source.suffix == ".ckpt" and not source.is_dir()


def read_published(path: Path, kind: str, weights: str) -> Weights:
    """One model of a published file, memory-mapped.

    kind: ``tokenizer`` or ``generator``. weights: ``ema`` are the averages where the file holds any, else its only
    weights; or ``raw``. Raises ModelError.
    """
    published = open_published(path)
    if kind not in published.parts:
        others = "".join(f": it is a {other}'s checkpoint" for other in published.parts)
        raise ModelError(f"{path} holds no {kind}{others}")
    part = published.parts[kind]
    tensors = part.model_ema if weights == "ema" and part.model_ema else part.model
    if missing := [name for name in part.model if name not in tensors]:
        raise ModelError(f"{path} holds no average of {missing[0]}, but of others: ask for the raw weights")
    infer = {"tokenizer": _tokenizer_config, "generator": _generator_config}[kind]
    try:
        config = published.described.get(kind) or infer(tensors)
    except ValueError as error:
        raise ModelError(f"{path} is no published {kind}: it {error}") from error
    if part.discriminator:
        _check_discriminator(path, part.discriminator)
    held = "ema" if tensors is part.model_ema else "raw"
    return Weights(
        config,
        tensors,
        part.discriminator or None,
        f"{path} ({held} weights)",
        f"a published {kind}",
        held,
        part.discriminator_ema or None,
        published.average,
        published.step,
    )


def open_published(path: Path) -> Published:
    """Reads no values. Raises ModelError for a damaged file, and for keys that are no part of a published model."""
    checkpoint = _load(path)
    state = checkpoint["state_dict"]
    others = [str(entry) for entry in checkpoint if entry not in ("state_dict", OUR_ENTRY)]
    left_out = {OTHER_ENTRIES: others} if others else {}
    first_stage = FIRST_STAGE if any(key.startswith(FIRST_STAGE) for key in state) else ""
    dotless = {key.replace(".", ""): key for key in state if not _is_average(key)}
    parts, averaging, unknown, orphans = {}, {}, [], []  # orphans: what averages are of, without dots
    for key, tensor in state.items():
        prefix, is_average, name = key.rpartition(EMA) if _is_average(key) else ("", "", key)
        if is_average and name in Average._fields and tensor.numel() == 1:
            averaging[name] = tensor.item()
            continue
        of = dotless.get(prefix.replace(".", "") + name) if is_average else key
        if of and (why := _why_left_out(of)):
            left_out.setdefault(why, []).append(key)
        elif of and (home := _home(of, first_stage)):
            kind, field, name = home
            part = parts.setdefault(kind, Part({}, {}, {}, {}))
            getattr(part, f"{field}_ema" if is_average else field)[name] = tensor
        else:
            unknown.append(f"{key} of shape {list(tensor.shape)}")
            orphans += [prefix.replace(".", "") + name] if is_average else []
    if orphans and (lacking := _lacking(path, orphans, parts, first_stage)):
        more = f" (and {len(lacking) - 1} more such)" if len(lacking) > 1 else ""
        raise ModelError(f"{path} lacks {lacking[0]}{more}, of which it holds an average: download or save it again")
    if unknown:
        more = f" (and {len(unknown) - 1} more such)" if len(unknown) > 1 else ""
        raise ModelError(
            f"{path} holds {unknown[0]}{more}, which no published tokenizer or generator has: take it out of its "
            "state_dict if it is no part of the model"
        )
    average = Average(**averaging) if "decay" in averaging else None
    step, described = checkpoint.get("global_step"), checkpoint.get(OUR_ENTRY)
    step, described = step if type(step) is int else None, described if isinstance(described, dict) else {}
    return Published(path, len(state), parts, left_out, average, step, described)


def _load(path: Path) -> dict:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state = {str(name): value for name, value in checkpoint["state_dict"].items()}
        if wrong := [name for name, value in state.items() if not isinstance(value, Tensor)]:
            raise ModelError(f"{path} is no published checkpoint: {wrong[0]} in its state_dict is no tensor")
        return {**checkpoint, "state_dict": state}
    except FileNotFoundError as error:
        raise ModelError(f"{path} does not exist") from error
    except pickle.UnpicklingError as error:
        raise ModelError(f"{path} holds more than tensors, or is damaged: save its state_dict alone") from error
    except (OSError, EOFError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and _is_old_format(path):
            raise ModelError(
                f"{path} is in torch's old format, and only the zip format is read: save it anew with a current torch, "
                "torch.save(torch.load(FILE), FILE)"
            ) from error
        if path.is_file() and not zipfile.is_zipfile(path):
            raise ModelError(f"{path} is damaged or no checkpoint: download it again") from error
        detail = textwrap.shorten(str(error) or repr(error), 120, placeholder=" ...")
        raise ModelError(f"{path} cannot be read: {detail}") from error
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{path} is no published checkpoint: it holds no state_dict of tensors") from error


def _is_old_format(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(OLD_FORMAT)) == OLD_FORMAT


def _lacking(path: Path, orphans: list[str], parts: dict[str, Part], first_stage: str) -> list[str]:
    """Those keys that the models of the file have by their sizes, and that only averages are of."""
    from model_zoo.tokenizer import Tokenizer  # these two import this module
    from model_zoo.transformer import Transformer

    keys = []
    for kind, part in parts.items():
        try:
            with torch.device("meta"):
                if kind == "generator":
                    model, prefix = Transformer(TransformerConfig(**_generator_config(part.model))), "transformer."
                else:
                    model, prefix = Tokenizer(TokenizerConfig(**_tokenizer_config(part.model))), first_stage
                beside = PatchDiscriminator(layers=_discriminator_layers(part.discriminator))
        except ValueError as error:
            raise ModelError(f"{path} is no published {kind}: it {error}") from error
        keys += [prefix + name for name in model.state_dict()]
        keys += [f"loss.discriminator.{name}" for name in beside.state_dict() if part.discriminator]
    return [key for key in keys if key.replace(".", "") in orphans]


def _is_average(key: str) -> bool:
    return key.startswith((EMA, FIRST_STAGE + EMA))


def _why_left_out(key: str) -> str | None:
    return next((why for pattern, why in LEFT_OUT if re.fullmatch(pattern, key)), None)


def _home(key: str, first_stage: str) -> tuple[str, str, str] | None:
    """(kind of model, field of `Part`, our name) of a key; first_stage: what tokenizers' keys begin with."""
    for pattern, kind, field in HOMES:
        if match := re.fullmatch((re.escape(first_stage) if kind == "tokenizer" else "") + pattern, key):
            return kind, field, match[1]
    return None


def _tokenizer_config(tensors: dict[str, Tensor]) -> dict:
    channels = _shape(tensors, "encoder.conv_in.weight", 4)[0]
    levels = _count(tensors, r"encoder\.down\.(\d+)\.")
    widths = [_shape(tensors, f"encoder.down.{level}.block.0.conv1.weight", 4)[0] for level in range(levels)]
    if odd := [width for width in widths if width % channels]:
        raise ValueError(f"has a level of {odd[0]} channels, no multiple of the {channels} of encoder.conv_in.weight")
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
        raise ValueError(f"has tok_emb.weight of width {width}, no multiple of a head's {HEAD_DIM}")
    return {
        "vocabulary": vocabulary,
        "classes": _shape(tensors, "class_emb.embedding_table.weight", 2)[0] - 1,
        "grid": list(GRID),
        "depth": _count(tensors, r"blocks\.(\d+)\."),
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
    """One more than the largest number in names that match; 0 where none does."""
    return 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1)


def _check_discriminator(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        channels = _shape(tensors, "main.0.weight", 4)[0]
    except ValueError as error:
        raise ModelError(f"{path}: its discriminator {error}") from error
    with torch.device("meta"):
        expected = PatchDiscriminator(channels=channels, layers=_discriminator_layers(tensors))
    check_names(tensors, expected.state_dict(), f"{path}: its discriminator")


def _discriminator_layers(tensors: dict[str, Tensor]) -> int:
    # Numbered: two of the first, three of each layer, the last.
    return max(_count(tensors, r"main\.(\d+)\.") // 3 - 1, 1)


# ------------------------------------------------------------------------------------------------------- laying it out


def published_state(kind: str, raw: Weights, ema: Weights | None = None) -> dict[str, Tensor]:
    """The state dict of a published checkpoint: the raw weights under their names, what was trained beside them, and
    averages where there are any. Raises ModelError for a model that the published code cannot build."""
    if wrong := _foreign(kind, raw.config):
        raise ModelError(f"{raw.origin}: the published layout has no place for {wrong}; export to safetensors instead")
    state = {("transformer." if kind == "generator" else "") + name: tensor for name, tensor in raw.tensors.items()}
    averages = {name: ema.tensors[name] for name in raw.tensors} if ema else {}
    if raw.discriminator and is_publishable(raw.discriminator):
        state |= {f"loss.discriminator.{name}": tensor for name, tensor in raw.discriminator.items()}
        # The published code averages the discriminator too, and uses that nowhere: its own weights will do.
        of_parameters = {n: t for n, t in raw.discriminator.items() if not n.endswith(STATISTICS)}
        averages |= {f"loss.discriminator.{n}": t for n, t in (raw.discriminator_ema or of_parameters).items()}
    if ema:
        state |= {EMA + name.replace(".", ""): tensor for name, tensor in averages.items()}
        decay, updates = raw.average or DEFAULT_AVERAGE
        state |= {f"{EMA}decay": torch.tensor(decay), f"{EMA}num_updates": torch.tensor(updates, dtype=torch.int)}
    return state


def is_publishable(discriminator: dict[str, Tensor]) -> bool:
    """Whether the published code can build it: with BatchNorm."""
    return any(name.endswith(STATISTICS) for name in discriminator)


def _foreign(kind: str, config: dict) -> str | None:
    """What the published code cannot build, if anything."""
    if kind == "generator":
        (rows, columns), embedding = config.get("grid", GRID), config.get("embedding", "learned")
        if rows != columns:
            return f"model.grid=[{rows},{columns}], which is no square"
        return None if embedding == "learned" else f"model.embedding={embedding}"
    for key, published in (("quantizer", ("ibq", "vq")), ("patch_size", (1,)), ("local", (False,))):
        if (value := config.get(key, published[0])) not in published:
            return f"model.{key}={str(value).lower()}"
    channels = config["channels"]
    narrow = [channels * multiplier for multiplier in (1, *config["channel_multipliers"])]
    return next((f"{width} channels, no multiple of its norms' 32 groups" for width in narrow if width % 32), None)
