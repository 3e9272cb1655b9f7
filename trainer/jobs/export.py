"""Models out of runs, published checkpoints and exports: as folders of safetensors, or in the published layout; and an
account of what such a source holds."""

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from torch import nn

from model_zoo import ModelError, Tokenizer, TokenizerConfig, Transformer, TransformerConfig
from model_zoo.io.export_format import (
    DISCRIMINATOR,
    DISCRIMINATOR_EMA,
    MODEL,
    RAW,
    damaged_file,
    fill_export,
    is_export,
    new_folder,
    read_about,
)
from model_zoo.io.hashing import fingerprint_of, sha256_of
from model_zoo.io.load import available_weights, build_model, find_checkpoint, is_standalone, read_weights
from model_zoo.io.published_ckpt import (
    FIRST_STAGE,
    OTHER_ENTRIES,
    OUR_ENTRY,
    is_publishable,
    is_published,
    open_published,
    published_state,
)
from model_zoo.io.run_layout import run_folder
from model_zoo.io.weights import Weights
from trainer import TrainerError
from trainer.checkpoint import damage
from trainer.evaluation.reference_results import crop_of
from trainer.jobs.resumable import writing
from trainer.parallel import start_world, stop_world

MODELS = {"generator": (TransformerConfig, Transformer), "tokenizer": (TokenizerConfig, Tokenizer)}
# Of the fields of `Part`, in order.
WHAT = ("of the", "averages of the", "of the", "averages of the"), ("", "", "'s discriminator", "'s discriminator")
CHOICES = ("all", "ema", "raw")
FIGURES = {  # of a run's report.json -> as a model card calls them
    "rfid": "rFID",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "lpips_vgg": "LPIPS (VGG)",
    "lpips_alex": "LPIPS (AlexNet)",
    "l1": "L1, of pictures in [-1, 1]",
    "usage": "share of the codes that are used",
    "perplexity": "perplexity of the codes",
}


class Model(NamedTuple):
    """One model of a source. kind: ``tokenizer`` or ``generator``. place: what `read_weights` reads. sets: of ``ema``
    and ``raw`` weights those that are wanted, the better first."""

    kind: str
    place: Path
    sets: list[str]


class Made(NamedTuple):
    """What was written, and an account of it in lines."""

    out: Path
    account: list[str]


class Held(NamedTuple):
    """What a source holds of one model. weights: of ``ema`` and ``raw`` those that are there. fingerprint: of a
    tokenizer, that of its codes. discriminator: whether one is beside it."""

    kind: str
    weights: list[str]
    step: int | None
    parameters: int
    fingerprint: str
    discriminator: bool
    config: dict


class Info(NamedTuple):
    """What a source holds. layout: run, published or export. verified: what was compared with the hashes that were
    written with it; a published file carries none. sha256: of a published file. source: what an export was made of."""

    source: str
    checkpoint: str
    layout: str
    models: list[Held]
    verified: str | None
    sha256: str | None
    made_of: str | None


def import_published(source: str | Path, out: str | Path, weights: str = "all") -> Made:
    """A published checkpoint as an export; a generator's tokenizer, where it is in the file, in ``out/tokenizer``.

    source: a ``.ckpt`` or a name on the model hub. weights: of CHOICES. Raises TrainerError or ModelError.
    """
    checkpoint = find_checkpoint(Path(source))
    if not is_published(checkpoint):
        raise TrainerError(f"{source} is no published .ckpt: `ibq checkpoint export` takes runs")
    made = export(source, out, weights)
    published = open_published(checkpoint)
    read = {
        f"{what} {kind}{beside}": len(tensors)
        for kind, part in published.parts.items()
        for tensors, what, beside in zip(part, *WHAT, strict=True)
    }
    left_out = {why: keys for why, keys in published.left_out.items() if why != OTHER_ENTRIES}
    rest = published.keys - sum(read.values()) - sum(map(len, left_out.values()))
    read["of how averages are taken"] = rest
    account = [f"keys: {published.keys:,}: " + ", ".join(f"{count:,} {what}" for what, count in read.items() if count)]
    account += [f"left out: {_named(keys)}: {why}" for why, keys in published.left_out.items()]
    return Made(made.out, made.account + account)


def export(source: str | Path, out: str | Path, weights: str = "all") -> Made:
    """What a source holds as a folder of safetensors; see `model_zoo.io.export_format`.

    source: as `read_weights` takes it. out: a folder that is not there, or empty. weights: of CHOICES. A generator's
    tokenizer, of its run or in its file, comes to lie in ``out/tokenizer``. Raises TrainerError or ModelError.
    """
    out = Path(out)
    models, notes = _models(source, weights)
    account = []
    with _writing(out, SafetensorError), new_folder(out) as folder:
        for i, model in enumerate(models):
            place = folder / model.kind if i else folder
            place.mkdir(exist_ok=True)
            account.append(_export_one(model, place, out / model.kind if i else out, str(source)))
    return Made(out, account + notes)


def export_published(source: str | Path, out: str | Path, weights: str = "all") -> Made:
    """What a source holds as one file in the published layout.

    out: a ``.ckpt`` that is not there. weights: of CHOICES; ``all`` of a tokenizer are its raw weights under their
    names and averages beside them; a generator's file has room for one set, the averages where there are any. Raises
    TrainerError or ModelError.
    """
    out = Path(out)
    if out.suffix != ".ckpt":
        raise TrainerError(f"--out {out} must end in .ckpt: published checkpoints are files")
    if out.exists():
        raise TrainerError(f"{out} is there already: name another place with --out, or remove it")
    models, notes = _models(source, weights)
    state, described, step, account = {}, {}, None, []
    for model in models:
        first_stage = model is not models[0]  # of a generator's file: frozen, with nothing beside it
        sets = model.sets if model.kind == "tokenizer" else model.sets[:1]
        found = [read_weights(model.place, model.kind, name) for name in sets]
        made = _made(found[0], model.kind)
        raw = found[-1]._replace(config=asdict(made.config))
        if first_stage:
            raw = raw._replace(discriminator=None)
        elif raw.discriminator and not is_publishable(raw.discriminator):
            notes.append("without its discriminator: the published layout has no place for its group norm")
        of_model = published_state(model.kind, raw, found[0] if len(found) > 1 else None)
        state |= {(FIRST_STAGE if first_stage else "") + name: tensor for name, tensor in of_model.items()}
        described[model.kind] = raw.config
        step = step if first_stage else raw.step
        account.append(f"{_said(model.kind, made)}; weights: {' and '.join(sets)}")
    beside = {} if step is None else {"global_step": step}
    unfinished = out.resolve().with_name(f".{out.name}.unfinished")
    with _writing(out, RuntimeError):  # torch's writer has no other
        try:
            unfinished.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"state_dict": state, OUR_ENTRY: described, **beside}, unfinished)
            unfinished.replace(out)
        finally:
            unfinished.unlink(missing_ok=True)
    return Made(
        out, [*account, f"keys: {len(state):,}; LPIPS's network, which is no part of the model, is not written", *notes]
    )


def info(source: str | Path) -> Info:
    """What a source holds, after its hashes were compared. Raises TrainerError or ModelError, also for damage."""
    checkpoint = find_checkpoint(Path(source))
    made_of = None
    if is_published(checkpoint):
        layout, verified, wrong = "published", None, None
    elif is_export(checkpoint):
        layout, verified, wrong = "export", "every file's sha256, by config.yaml", damaged_file(checkpoint)
        made_of = read_about(checkpoint).get("source")
    else:
        layout, verified = "run", "every file's sha256, by manifest.json"
        try:
            wrong = damage(checkpoint, start_world("cpu"))
        finally:
            stop_world()
    if wrong:
        raise TrainerError(f"{checkpoint} is damaged: {wrong}; copy or make it again")
    models = []
    for kind, sets in available_weights(checkpoint).items():
        found = read_weights(checkpoint, kind, sets[0])
        made = _made(found, kind)
        for other in sets[1:]:
            _made(read_weights(checkpoint, kind, other), kind)
        parameters, discriminator = count_parameters(made), found.discriminator is not None
        models.append(Held(kind, sets, found.step, parameters, _fingerprint(made), discriminator, asdict(made.config)))
    if not models:
        raise TrainerError(f"{checkpoint} holds neither a tokenizer nor a generator")
    sha256 = sha256_of(checkpoint) if layout == "published" else None  # after it was found to be there, and whole
    return Info(str(source), str(checkpoint), layout, models, verified, sha256, made_of)


def count_parameters(model: nn.Module) -> int:
    """Numbers in a model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------------------ a source


def _models(source: str | Path, weights: str) -> tuple[list[Model], list[str]]:
    """(a source's models, a generator before its tokenizer; notes on what is missing)."""
    if weights not in CHOICES:
        raise TrainerError(f"--weights {weights} is unknown: choose one of {', '.join(CHOICES)}")
    checkpoint, notes = find_checkpoint(Path(source)), []
    models = [Model(kind, checkpoint, sets) for kind, sets in available_weights(checkpoint).items()]
    models.sort(key=lambda model: list(MODELS).index(model.kind))
    if not models:
        raise TrainerError(f"{checkpoint} holds neither a tokenizer nor a generator")
    first, *rest = models
    if weights not in ("all", *first.sets):
        raise ModelError(f"{checkpoint} holds no {weights} weights of a {first.kind}: take another --weights")
    if first.kind == "generator" and not is_standalone(checkpoint):
        try:
            rest = _tokenizer_of_run(checkpoint)
        except ModelError as error:
            notes.append(f"without its tokenizer: {error}")
    # A generator's tokenizer is that whose codes it learned, averages where there are any.
    rest = [model._replace(sets=model.sets[:1]) for model in rest]
    return [first if weights == "all" else first._replace(sets=[weights]), *rest], notes


def _tokenizer_of_run(checkpoint: Path) -> list[Model]:
    """What a generator's run names, if anything."""
    recipe = OmegaConf.load(run_folder(checkpoint) / "config.yaml")
    source, learned = (OmegaConf.select(recipe, f"tokenizer.{key}") for key in ("source", "fingerprint"))
    if source is None:
        return []
    place = find_checkpoint(Path(source))
    sets = available_weights(place).get("tokenizer", ["ema"])
    found = _fingerprint(_made(read_weights(place, "tokenizer", sets[0]), "tokenizer"))
    if learned not in (None, found):
        raise ModelError(f"{source} ({found}) is not the one whose codes it learned ({learned})")
    return [Model("tokenizer", place, sets)]


def _made(found: Weights, kind: str) -> Tokenizer | Transformer:
    """The model whose weights are the very tensors that were found: names and shapes are right. Raises ModelError."""
    schema, build = MODELS[kind]

    def on_meta(config):
        with torch.device("meta"):  # large ones take long to initialise, in vain
            return build(config)

    return build_model(found, kind, schema, on_meta, assign=True)


def _fingerprint(made: Tokenizer | Transformer) -> str:
    return made.fingerprint() if isinstance(made, Tokenizer) else fingerprint_of(made.state_dict())


# ------------------------------------------------------------------------------------------------------------ an export


def _export_one(model: Model, folder: Path, out: Path, source: str) -> str:
    """Fills a folder, which will be ``out``; returns a line of account."""
    found = read_weights(model.place, model.kind, model.sets[0])
    made = _made(found, model.kind)
    files = {MODEL: found.tensors}
    if len(model.sets) > 1:
        raw = read_weights(model.place, model.kind, "raw")
        _made(raw, model.kind)
        files[RAW] = raw.tensors
    beside = {DISCRIMINATOR: found.discriminator, DISCRIMINATOR_EMA: found.discriminator_ema}
    files |= {name: tensors for name, tensors in beside.items() if tensors}
    about = {
        "kind": model.kind,
        "weights": found.weights,
        "parameters": count_parameters(made),
        "fingerprint": _fingerprint(made),
        "source": source,
        "step": found.step,
        "average": found.average._asdict() if found.average else None,
        "model": asdict(made.config),
    }
    if model.kind == "tokenizer":
        about["downsampling_factor"] = made.downsampling_factor
    fill_export(folder, about, files, _card(model, made, about, out.name))
    return f"{_said(model.kind, made)}; weights: {' and '.join(model.sets)}; in {out}"


def _said(kind: str, made: Tokenizer | Transformer) -> str:
    config = made.config
    if kind == "tokenizer":
        sizes = (
            f"{config.quantizer}, {config.codebook_size:,} codes of {config.code_dim} dimensions, "
            f"{made.downsampling_factor} x {made.downsampling_factor} pixels each"
        )
    else:
        rows, columns = config.grid
        sizes = (
            f"{config.vocabulary:,} codes, {config.classes:,} classes, {rows} x {columns} tokens, "
            f"depth {config.depth}, width {config.width}"
        )
    return f"{kind}: {sizes}; {count_parameters(made):,} parameters"


def _card(model: Model, made: Tokenizer | Transformer, about: dict, name: str) -> str:
    """A model card, in Markdown."""
    kind = model.kind
    use = {
        "tokenizer": "codes_bhw = tokenizer.tokenize(images_bchw)  # float images in [-1, 1]; detokenize() goes back",
        "generator": "logits_btv = generator(codes_bt, class_b)  # the codes before; logits[:, t] are of code t",
    }[kind]
    sizes = {
        "parameters": f"{about['parameters']:,}",
        "weights": "averages (EMA) of the trained ones" if about["weights"] == "ema" else "as trained",
        "fingerprint": about["fingerprint"],
        "made of": about["source"] + (f", step {about['step']:,}" if about["step"] is not None else ""),
    }
    lines = [
        f"# {name}",
        "",
        {"tokenizer": "A discrete image tokenizer", "generator": "An autoregressive generator of image codes"}[kind]
        + " (IBQ, arXiv 2412.02692), exported by `ibq`.",
        "",
        "```python",
        "import model_zoo",
        f'{kind} = model_zoo.load_{kind}("{name}")  # this folder, or its name on the hub',
        use,
        "```",
        "",
        f"{_said(kind, made)[len(kind) + 2 :]}.",
        "",
        *(f"- {key}: {value}" for key, value in sizes.items()),
        "",
        *_figures(model.place, made),
        "Licence: to be stated by whoever passes this on; so are the data that it learned from.",
        "",
    ]
    return "\n".join(lines)


def _figures(checkpoint: Path, made: Tokenizer | Transformer) -> list[str]:
    """Of the run's report.json, where there is one of these very weights; where it is of others, that is said."""
    path = run_folder(checkpoint) / "report.json"
    if is_standalone(checkpoint) or not path.is_file():
        return []
    try:
        report = json.loads(path.read_text())
        manifest = report.get("manifest", {})
        if manifest.get("fingerprint") != fingerprint_of(made.state_dict()):  # of another step, or the other set
            return [
                "Not measured: the run's report.json names other weights, or none. `ibq evaluate` measures these.",
                "",
            ]
        names = manifest["images"] if isinstance(manifest["images"], list) else [manifest["images"]]
        images = f"{report['image_count']:,} images of {', '.join(names)}, {crop_of(manifest)}"
        rows = [f"| {name} | {report[key]:.4g} |" for key, name in FIGURES.items() if report.get(key) is not None]
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise TrainerError(f"{path} is damaged: evaluate again, or remove it") from error
    if not rows:
        return []
    return [
        f"Measured by `ibq evaluate` on {images}:",
        "",
        "| | |",
        "|---|---|",
        *rows,
        "",
    ]


@contextmanager
def _writing(out: Path, wrapper: type[Exception]) -> Iterator[None]:
    """`writing`, where a library wraps what the system refuses."""
    with writing(out):
        try:
            yield
        except wrapper as error:
            raise OSError(" ".join(str(error).split())) from error


def _named(keys: list[str]) -> str:
    """How many and which, in few words."""
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*(key.split(".") for key in keys), strict=False))
    common = ".".join(parts[0] for parts in same)
    which = f"{common}.*" if common and len(keys) > 1 else ", ".join(keys[:6]) + ", ..." * (len(keys) > 6)
    return f"{len(keys):,} ({which})"
