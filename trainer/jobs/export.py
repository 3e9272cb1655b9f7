"""`ibq checkpoint`: exports models of runs, published checkpoints and exports, as folders of safetensors or in a
published layout, and describes what such a source holds."""

import glob
import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError

from data.classes import CLASSES_NAME
from data.locks import file_lock
from data.unfinished import complete_file, remove_dead
from model_zoo.conditions import NONE, describe_classes, describe_grids, trained_grids
from model_zoo.config import TokenizerConfig, TransformerConfig
from model_zoo.errors import ModelError
from model_zoo.io.emu_folder import CHECKPOINT, write_emu_config
from model_zoo.io.export_format import (
    CONFIG,
    DISCRIMINATOR,
    DISCRIMINATOR_EMA,
    HEADS_ENCODER,
    MODEL,
    RAW,
    damaged_file,
    fill_export,
    is_export,
    new_folder,
    read_about,
)
from model_zoo.io.hashing import fingerprint_of, sha256_of
from model_zoo.io.load import (
    available_weights,
    build_model,
    find_checkpoint,
    is_standalone,
    read_newest,
    read_weights,
    run_settings,
)
from model_zoo.io.published_ckpt import (
    FIRST_STAGE,
    OTHER_ENTRIES,
    OUR_ENTRY,
    emu_state,
    is_publishable,
    is_published,
    open_published,
    published_state,
    weights_file,
)
from model_zoo.io.run_layout import run_folder
from model_zoo.io.weights import CODES_OF, TRAINED_CLASSES, TRAINED_GRIDS, Weights
from model_zoo.tokenizer import Tokenizer
from model_zoo.transformer import Transformer
from trainer import TrainerError
from trainer.checkpoint import damage
from trainer.files import json_text, writing
from trainer.init_from import saved_classes
from trainer.jobs.model_card import count_parameters, describe_model, model_card
from trainer.jobs.setup import sole_writer
from trainer.parallel import start_world, stop_world

MODELS = {"generator": (TransformerConfig, Transformer), "tokenizer": (TokenizerConfig, Tokenizer)}
# Names of the four groups of tensors of a published model, in the order of its fields.
GROUPS = "{}", "EMA of the {}", "discriminator of the {}", "EMA of the discriminator of the {}"
CHOICES = ("all", "ema", "raw")
SHOWN_NAMES = 8  # of classes


class SourceModel(NamedTuple):
    """A model to export. kind: ``tokenizer`` or ``generator``. checkpoint: as for `read_weights`. weights: ``ema`` or
    ``raw`` or both, ``ema`` first."""

    kind: str
    checkpoint: Path
    weights: list[str]


class Exported(NamedTuple):
    """summary: lines of text."""

    out: Path
    summary: list[str]


class ModelInfo(NamedTuple):
    """One model of a source. weights: the available ones of ``ema`` and ``raw``. fingerprint: of a tokenizer, that of
    its codes. discriminator: whether there is one. trained_classes: of a generator, as `describe_classes` writes them.
    class_numbers: of a generator, the number of each class by name. trained_grids: of a generator of several, as
    `describe_grids` writes them. None: unknown."""

    kind: str
    weights: list[str]
    step: int | None
    parameters: int
    fingerprint: str
    discriminator: bool
    config: dict
    trained_classes: str | None
    class_numbers: dict[str, int] | None
    trained_grids: str | None

    def trained_on(self) -> list[str]:
        """Lines that say which classes and grids a generator was trained on; none where that is unknown."""
        lines = []
        if self.trained_classes is not None:
            classes = ",".join(part for part in self.trained_classes.split(",") if part not in ("", NONE))
            has_none = self.trained_classes.endswith(NONE)
            without = " and without a class" if has_none else ", never without a class"
            what = f"on classes {classes} of {self.config['classes']:,}{without}" if classes else "without classes"
            lines.append(f"trained {what}")
        if self.trained_grids is not None:
            lines.append(f"trained on grids {self.trained_grids} of {','.join(self.config['grids'])}")
        if numbers := self.class_numbers:
            first = sorted(numbers, key=numbers.get)[:SHOWN_NAMES]
            lines.append(
                f"names of classes: {', '.join(first)}{', …' * (len(numbers) > SHOWN_NAMES)} ({len(numbers):,})"
            )
        return lines


class SourceInfo(NamedTuple):
    """layout: run, published or export. verified: what was compared with stored hashes; None for a published file,
    which has none. sha256: of a published file. made_of: the source of an export."""

    source: str
    checkpoint: str
    layout: str
    models: list[ModelInfo]
    verified: str | None
    sha256: str | None
    made_of: str | None


def import_published(source: str | Path, out: str | Path, weights: str = "all") -> Exported:
    """Exports a published checkpoint; a tokenizer in a generator's file goes to ``out/tokenizer``.

    source: a ``.ckpt``, the folder of Emu3.5's tokenizer or a name on the model hub. weights: of CHOICES. Raises
    TrainerError or ModelError.
    """
    checkpoint = find_checkpoint(Path(source))
    if not is_published(checkpoint):
        raise TrainerError(
            f"{source} is neither a published .ckpt nor Emu3.5's folder: use `ibq checkpoint export` for runs"
        )
    exported = export(source, out, weights)
    published = open_published(checkpoint)
    read = {
        group.format(kind): len(tensors)
        for kind, part in published.parts.items()
        for tensors, group in zip(part, GROUPS, strict=True)
    }
    left_out = {why: keys for why, keys in published.left_out.items() if why != OTHER_ENTRIES}
    read["settings of the EMA"] = published.keys - sum(read.values()) - sum(map(len, left_out.values()))
    summary = [f"keys: {published.keys:,}: " + ", ".join(f"{what} {count:,}" for what, count in read.items() if count)]
    summary += [f"left out: {_describe_keys(keys)}: {why}" for why, keys in published.left_out.items()]
    return Exported(exported.out, exported.summary + summary)


def export(source: str | Path, out: str | Path, weights: str = "all") -> Exported:
    """Exports a source's models as a folder of safetensors; see `model_zoo.io.export_format`.

    source: as for `read_weights`. out: a new or empty folder. weights: of CHOICES. A generator's tokenizer, of its run
    or in its file, goes to ``out/tokenizer``. Raises TrainerError, ModelError, and DataError while another process
    writes ``out``.
    """
    return read_newest(Path(source), lambda checkpoint: _export(source, checkpoint, Path(out), weights))


def _export(source: str | Path, checkpoint: Path, out: Path, weights: str) -> Exported:
    models, notes = _models(checkpoint, weights)
    summary = []
    # Without the lock a second export would take the unfinished folder for one that a killed job left.
    with _sole_writer(out), _writing(out, SafetensorError), new_folder(out) as folder:
        for i, model in enumerate(models):
            own = folder / model.kind if i else folder
            own.mkdir(exist_ok=True)
            summary.append(_export_one(model, own, out / model.kind if i else out, str(source)))
    return Exported(out, summary + notes)


def export_published(source: str | Path, out: str | Path, weights: str = "all") -> Exported:
    """Exports a source's models as one file in the published layout.

    out: a new ``.ckpt``. weights: of CHOICES; for a tokenizer, ``all`` writes raw weights and EMA; a generator's file
    has room for one of them, the EMA if there is one. Raises TrainerError or ModelError.
    """
    out = Path(out)
    if out.suffix != ".ckpt":
        raise TrainerError(f"--out {out} must end in .ckpt: published checkpoints are files")
    _check_is_new(out)

    def write(checkpoint: Path) -> Exported:
        models, notes = _models(checkpoint, weights)
        with _sole_writer(out):
            _check_is_new(out)  # again: another process may have written it meanwhile
            return _export_published(models, notes, out)

    return read_newest(Path(source), write)


def _check_is_new(out: Path) -> None:
    if out.exists():
        raise TrainerError(f"{out} already exists: name another path with --out, or remove it")


def _sole_writer(out: Path) -> AbstractContextManager[None]:
    return sole_writer(file_lock(out.resolve()), out)


def _export_published(models: list[SourceModel], notes: list[str], out: Path) -> Exported:
    state, configs, step, summary = {}, {}, None, []
    for model in models:
        first_stage = model is not models[0]  # the frozen tokenizer in a generator's file
        sets = model.weights if model.kind == "tokenizer" else model.weights[:1]
        found = [read_weights(model.checkpoint, model.kind, name) for name in sets]
        built = _build(found[0], model.kind)
        raw = found[-1]._replace(config=asdict(built.config))
        if first_stage:
            raw = raw._replace(discriminator=None)
        elif raw.discriminator and not is_publishable(raw.discriminator):
            notes.append("without its discriminator: the published layout only has PatchGAN with batch norm")
        of_model = published_state(model.kind, raw, found[0] if len(found) > 1 else None)
        state |= {(FIRST_STAGE if first_stage else "") + name: tensor for name, tensor in of_model.items()}
        configs[model.kind] = raw.config
        if raw.trained_c is not None:
            configs[TRAINED_CLASSES] = describe_classes(raw.trained_c)
        if raw.tokenizer is not None:
            configs[CODES_OF] = raw.tokenizer
        step = step if first_stage else raw.step
        summary.append(f"{model.kind}: {describe_model(built)}; weights: {' and '.join(sets)}")
    steps = {} if step is None else {"global_step": step}
    with _writing(out, RuntimeError):  # torch.save raises RuntimeError for an OSError
        place = out.resolve()
        remove_dead(place.parent, glob.escape(place.name))
        with complete_file(place) as temporary:
            torch.save({"state_dict": state, OUR_ENTRY: configs, **steps}, temporary)
    keys = f"keys: {len(state):,}; without the LPIPS network, which is not part of the model"
    return Exported(out, [*summary, keys, *notes])


def export_emu(source: str | Path, out: str | Path, weights: str = "all") -> Exported:
    """Exports a tokenizer as a folder for Emu3.5's published code.

    out: a new or empty folder. weights: of CHOICES; the folder has room for one set, and ``all`` writes the EMA if
    there is one. Raises TrainerError or ModelError.
    """
    return read_newest(Path(source), lambda checkpoint: _export_emu(checkpoint, Path(out), weights))


def _export_emu(checkpoint: Path, out: Path, weights: str) -> Exported:
    (model, *_), notes = _models(checkpoint, weights)
    if model.kind != "tokenizer":
        raise TrainerError(f"{checkpoint} holds a {model.kind}, but Emu3.5's layout is a tokenizer's: choose another")
    found = read_weights(model.checkpoint, model.kind, model.weights[0])
    built = _build(found, model.kind)
    found = found._replace(config=asdict(built.config))
    entries = {"state_dict": emu_state(found)} | ({} if found.step is None else {"global_step": found.step})
    # torch.save raises RuntimeError for an OSError
    with _sole_writer(out), _writing(out, RuntimeError), new_folder(out) as folder:
        torch.save(entries, folder / CHECKPOINT)
        write_emu_config(folder / CONFIG, found.config)
    if len(model.weights) > 1:
        notes.append("without its raw weights: the layout has one set")
    if found.discriminator:
        notes.append("without its discriminator: the layout has none")
    if built.config.normalize:
        notes.append("with l2_normalize: true, which the published loader does not pass to its quantizer: do so there")
    summary = f"{model.kind}: {describe_model(built)}; weights: {model.weights[0]}; keys: {len(found.tensors):,}"
    return Exported(out, [summary, *notes])


def info(source: str | Path) -> SourceInfo:
    """Describes a source after comparing its hashes. Raises TrainerError or ModelError, also for damage."""
    return read_newest(Path(source), lambda checkpoint: _info(source, checkpoint))


def _info(source: str | Path, checkpoint: Path) -> SourceInfo:
    made_of = None
    if is_published(checkpoint):
        layout, verified, wrong = "published", None, None
    elif is_export(checkpoint):
        layout, verified, wrong = "export", "every file's sha256, by config.yaml", damaged_file(checkpoint)
        made_of = read_about(checkpoint).get("source")
    else:
        layout, verified = "run", "every file's sha256, by manifest.json"
        try:
            wrong = damage(checkpoint, start_world("cpu"))  # reading weights does not read the files again for it
        finally:
            stop_world()
    if wrong:
        raise TrainerError(f"{checkpoint} is damaged: {wrong}; copy or write it again")
    models = []
    for kind, sets in available_weights(checkpoint).items():
        found = read_weights(checkpoint, kind, sets[0])
        built = _build(found, kind)
        for other in sets[1:]:
            _build(read_weights(checkpoint, kind, other), kind)
        parameters, discriminator = count_parameters(built), found.discriminator is not None
        fingerprint, config = _fingerprint(built), asdict(built.config)
        trained = None if found.trained_c is None else describe_classes(found.trained_c)
        classes = None if trained is None else saved_classes(checkpoint)
        grids = None if found.trained_g is None else describe_grids(trained_grids(built.config, found.trained_g))
        models.append(
            ModelInfo(kind, sets, found.step, parameters, fingerprint, discriminator, config, trained, classes, grids)
        )
    if not models:
        raise TrainerError(f"{checkpoint} holds neither a tokenizer nor a generator")
    sha256 = sha256_of(weights_file(checkpoint)) if layout == "published" else None  # once it is known to be complete
    return SourceInfo(str(source), str(checkpoint), layout, models, verified, sha256, made_of)


# ------------------------------------------------------------------------------------------------------------ a source


def _models(checkpoint: Path, weights: str) -> tuple[list[SourceModel], list[str]]:
    """The models of a path from `find_checkpoint`, a generator before its tokenizer, and notes on what is missing."""
    if weights not in CHOICES:
        raise TrainerError(f"--weights {weights} is unknown: choose one of {', '.join(CHOICES)}")
    notes = []
    models = [SourceModel(kind, checkpoint, sets) for kind, sets in available_weights(checkpoint).items()]
    models.sort(key=lambda model: list(MODELS).index(model.kind))
    if not models:
        raise TrainerError(f"{checkpoint} holds neither a tokenizer nor a generator")
    first, *rest = models
    if weights not in ("all", *first.weights):
        raise ModelError(f"{checkpoint} holds no {weights} weights of a {first.kind}: choose another --weights")
    if first.kind == "generator" and not is_standalone(checkpoint):
        try:
            rest = _tokenizer_of_run(checkpoint)
        except ModelError as error:
            notes.append(f"without its tokenizer: {error}")
    # A generator was trained on codes of its tokenizer's EMA, if there is one.
    rest = [model._replace(weights=model.weights[:1]) for model in rest]
    return [first if weights == "all" else first._replace(weights=[weights]), *rest], notes


def _tokenizer_of_run(checkpoint: Path) -> list[SourceModel]:
    """The tokenizer that a generator's run names, if any. Raises ModelError."""
    # config.yaml may name the place to which the tokenizer was moved, but not another tokenizer.
    source = OmegaConf.select(OmegaConf.load(run_folder(checkpoint) / "config.yaml"), "tokenizer.source")
    expected = (run_settings(checkpoint).recipe.get("tokenizer") or {}).get("fingerprint")
    if source is None:
        return []
    path = find_checkpoint(Path(source))
    sets = available_weights(path).get("tokenizer", ["ema"])
    found = _fingerprint(_build(read_weights(path, "tokenizer", sets[0]), "tokenizer"))
    if expected not in (None, found):
        raise ModelError(f"{source} ({found}) is not the tokenizer that it was trained with ({expected})")
    return [SourceModel("tokenizer", path, sets)]


def _build(found: Weights, kind: str) -> Tokenizer | Transformer:
    """The model with these tensors as weights. Raises ModelError for wrong names or shapes."""
    schema, build = MODELS[kind]
    with torch.device("meta"):  # skips the initialization
        return build_model(found, kind, schema, build, assign=True)


def _fingerprint(model: Tokenizer | Transformer) -> str:
    return model.fingerprint() if isinstance(model, Tokenizer) else fingerprint_of(model.state_dict())


# ------------------------------------------------------------------------------------------------------------ an export


def _export_one(model: SourceModel, folder: Path, out: Path, source: str) -> str:
    """Fills a folder, which will be renamed to ``out``; returns a line of summary."""
    found = read_weights(model.checkpoint, model.kind, model.weights[0])
    built = _build(found, model.kind)
    files = {MODEL: found.tensors}
    if len(model.weights) > 1:
        raw = read_weights(model.checkpoint, model.kind, "raw")
        _build(raw, model.kind)
        files[RAW] = raw.tensors
    optional = {DISCRIMINATOR: found.discriminator, DISCRIMINATOR_EMA: found.discriminator_ema}
    files |= {name: tensors for name, tensors in optional.items() if tensors}
    about = {
        "kind": model.kind,
        "weights": found.weights,
        "parameters": count_parameters(built),
        "fingerprint": _fingerprint(built),
        "source": source,
        "step": found.step,
        "average": found.average._asdict() if found.average else None,
        "model": asdict(built.config),
    }
    if model.kind == "tokenizer":
        about["downsampling_factor"] = built.downsampling_factor
    if found.trained_c is not None:
        about[TRAINED_CLASSES] = describe_classes(found.trained_c)
    if found.trained_g is not None:
        about[TRAINED_GRIDS] = describe_grids(trained_grids(built.config, found.trained_g))
    if found.discriminator and found.heads_encoder:
        about[HEADS_ENCODER] = found.heads_encoder
    if found.tokenizer is not None:
        about[CODES_OF] = found.tokenizer
    numbers = saved_classes(model.checkpoint) if model.kind == "generator" else None
    texts = {CLASSES_NAME: json_text(numbers)} if numbers else {}
    fill_export(folder, about, files, texts, model_card(model.kind, built, about, out.name, model.checkpoint))
    return f"{model.kind}: {describe_model(built)}; weights: {' and '.join(model.weights)}; in {out}"


@contextmanager
def _writing(out: Path, wrapper: type[Exception]) -> Iterator[None]:
    """Like `writing`, for a library that wraps OSErrors in another exception."""
    with writing(out):
        try:
            yield
        except wrapper as error:
            raise OSError(" ".join(str(error).split())) from error


def _describe_keys(keys: list[str]) -> str:
    """The number of keys, and their common prefix or the first of them."""
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*(key.split(".") for key in keys), strict=False))
    common = ".".join(parts[0] for parts in same)
    which = f"{common}.*" if common and len(keys) > 1 else ", ".join(keys[:6]) + ", ..." * (len(keys) > 6)
    return f"{len(keys):,} ({which})"
