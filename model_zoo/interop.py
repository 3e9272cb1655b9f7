"""Published checkpoints (PyTorch Lightning's ``.ckpt``) of tokenizers and generators, read without their code.

A generator's names begin with ``transformer.``; a tokenizer's are ours, alone in the file or, in that of a generator,
behind ``first_stage_model.``. Averages lie behind ``model_ema.``, their names without dots. The configuration is
inferred from shapes.
"""

import pickle
import re
import textwrap
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from model_zoo import ModelError

TOKENIZER_PARTS = ("encoder.", "decoder.", "quantize.embedding.", "quant_conv.", "post_quant_conv.")
NO_WEIGHTS = {"freqs_cis"}  # of a published generator: what is computed, as we do
HEAD_DIM, GRID = 64, (16, 16)  # of all published generators, and to be seen in no shape


def is_published(source: Path) -> bool:
    """Whether it is to be read by `read_published`; else it is a run's folder or a checkpoint's in it."""
    return source.suffix == ".ckpt" and not source.is_dir()


def read_published(path: Path, kind: str, weights: str) -> tuple[dict, dict[str, Tensor]]:
    """Fields of `TokenizerConfig` or `TransformerConfig` and the state dict, memory-mapped, of a published checkpoint.

    kind: ``tokenizer`` or ``generator``. weights: ``ema`` are the averages where the file holds any, else its only
    weights; or ``raw``. Raises ModelError.
    """
    state = _state_dict(path)
    tokenizer = _behind(state, "first_stage_model.") or state
    tokenizer_names = [name for name in tokenizer if name.startswith(TOKENIZER_PARTS)]
    generator_names = [name for name in state if name.startswith("transformer.")]
    if not (tokenizer_names if kind == "tokenizer" else generator_names):
        others = {"tokenizer": generator_names, "generator": tokenizer_names}[kind]
        other = "generator" if kind == "tokenizer" else "tokenizer"
        raise ModelError(f"{path} holds no {kind}" + (f": it is a {other}'s checkpoint" if others else ""))
    try:
        if kind == "tokenizer":
            tensors = _chosen(path, tokenizer, tokenizer_names, weights)
            return _tokenizer_shape(tensors), tensors
        tensors = _behind(_chosen(path, state, generator_names, weights), "transformer.")
        tensors = {name: tensor for name, tensor in tensors.items() if name not in NO_WEIGHTS}
        return _generator_shape(tensors), tensors
    except (KeyError, ValueError) as error:
        raise ModelError(f"{path} is no published {kind}: it lacks {error.args[0]}") from error


def _state_dict(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    except FileNotFoundError as error:
        raise ModelError(f"{path} does not exist") from error
    except pickle.UnpicklingError as error:
        raise ModelError(f"{path} holds more than tensors, or is damaged: save its state_dict alone") from error
    except (OSError, EOFError, RuntimeError) as error:
        if path.is_file() and not zipfile.is_zipfile(path):
            raise ModelError(f"{path} is damaged or no checkpoint: download it again") from error
        detail = textwrap.shorten(str(error) or repr(error), 120, placeholder=" ...")
        raise ModelError(f"{path} cannot be read: {detail}") from error
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{path} is no published checkpoint: it holds no state_dict of tensors") from error


def _behind(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _chosen(path: Path, state: dict[str, Tensor], names: list[str], weights: str) -> dict[str, Tensor]:
    dotless = {name: "model_ema." + name.replace(".", "") for name in names}
    if weights == "raw" or not any(name in state for name in dotless.values()):
        return {name: state[name] for name in names}
    # What is no parameter has no average.
    missing = [name for name in names if dotless[name] not in state and not name.endswith(tuple(NO_WEIGHTS))]
    if missing:
        raise ModelError(f"{path} holds no average of {missing[0]}, but of others: ask for the raw weights")
    return {name: state[dotless[name]] for name in names if dotless[name] in state}


def _tokenizer_shape(tensors: dict[str, Tensor]) -> dict:
    channels = tensors["encoder.conv_in.weight"].shape[0]
    levels = _count(tensors, r"encoder\.down\.(\d+)\.")
    widths = [tensors[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
    codebook_size, code_dim = tensors["quantize.embedding.weight"].shape
    return {
        "codebook_size": codebook_size,
        "code_dim": code_dim,
        "channels": channels,
        "channel_multipliers": [width // channels for width in widths],
        "num_res_blocks": _count(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        "attention_factors": [2**i for i in range(levels) if _count(tensors, rf"encoder\.down\.{i}\.attn\.(\d+)\.")],
        "latent_channels": tensors["encoder.conv_out.weight"].shape[0],
    }


def _generator_shape(tensors: dict[str, Tensor]) -> dict:
    vocabulary, width = tensors["tok_emb.weight"].shape
    return {
        "vocabulary": vocabulary,
        "classes": tensors["class_emb.embedding_table.weight"].shape[0] - 1,
        "grid": list(GRID),
        "depth": _count(tensors, r"blocks\.(\d+)\."),
        "heads": width // HEAD_DIM,
        "head_dim": HEAD_DIM,
    }


def _count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number in names that match; 0 where none does."""
    return 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1)
