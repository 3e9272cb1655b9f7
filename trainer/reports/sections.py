"""Sections of the report.html of a tokenizer or a generator."""

import json
import math
import shlex
from html import escape
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from trainer import TrainerError
from trainer.init_from import read_init_record
from trainer.reports.charts import Curve
from trainer.reports.html import commands, header, image, table, tiles
from trainer.reports.measures import ALL_COLORS, MEASURES, describe_crop, has_fitted_palette

SAMPLED = "sampled.png"  # in a generator's run folder
GENERATOR = "generator"  # in a tokenizer's run folder: the run of a generator of its codes
FROZEN = {
    None: "Nothing is frozen.",
    "encoder": "The encoder and the codebook are frozen: codes, and generators trained on them, stay valid.",
    "decoder": "The decoder is frozen.",
}


# ---------------------------------------------------------------------------------------------------------- a tokenizer


def read_evaluation(path: Path) -> dict | None:
    """The content of report.json; None if there is none. Raises TrainerError."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TrainerError(
            f"{path} is not valid JSON: delete it and run `ibq evaluate reconstruction` again"
        ) from error


def tokenizer_summary(run: Path, config: DictConfig) -> str:
    codes, size = OmegaConf.select(config, "model.codebook_size"), OmegaConf.select(config, "data.image_size")
    multipliers = OmegaConf.select(config, "model.channel_multipliers")
    if not (codes and size and multipliers):
        return header(run, "An image tokenizer: it encodes images to codes and decodes codes to images.")
    side = size // (OmegaConf.select(config, "model.patch_size", default=1) * 2 ** (len(multipliers) - 1))
    bits = math.log2(codes)
    return header(
        run,
        f"An image tokenizer: it encodes an image of {size}&times;{size} pixels to {side}&times;{side} = "
        f"{side * side:,} tokens, each one of {codes:,} codes ({bits:.4g} bits), and decodes these to pixels. "
        f"That is {size * size * 24 / (side * side * bits):.0f} times fewer bits than the raw pixels.",
    )


def verdict(evaluation: dict) -> str:
    """One sentence: does the tokenizer beat the palette baseline, which has the same bits per token where there are as
    many colours as codes?"""
    psnr, palette = _decibels(evaluation["psnr"]), _decibels(evaluation["baseline_palette_psnr"])
    numbers, codes = f"{_format_db(psnr)} against {_format_db(palette)}", evaluation["codebook_size"]
    if has_fitted_palette(codes):
        numbers += ", at the same bits per token"
        baseline = f"a palette of {codes:,} colours, one per token, fitted to these images"
    else:
        numbers += f", at {math.log2(codes):.4g} bits per token against the palette's 24"
        baseline = f"a palette of all {ALL_COLORS:,} colours, one per token"
    if psnr > palette:
        return f"The tokenizer beats {baseline}: {numbers}."
    if psnr == palette:
        return f"The tokenizer is as good as {baseline}: {numbers}."
    return f"The tokenizer does not beat {baseline} yet: {numbers}. A longer run on more images should."


def results(run: Path, evaluation: dict | None) -> str:
    """What `ibq evaluate` measured, next to the baselines."""
    if evaluation is None:
        command = escape(f"ibq evaluate reconstruction {shlex.quote(str(run))}")
        return f"<section><h2>Results</h2><p>Not evaluated yet. To evaluate it:</p><pre>{command}</pre></section>"
    psnr, palette, mean = (
        _decibels(evaluation[key]) for key in ("psnr", "baseline_palette_psnr", "baseline_mean_color_psnr")
    )
    shown = tiles(
        [
            (
                f"{psnr:.1f} dB" if math.isfinite(psnr) else "exact",
                "PSNR on held-out images" if evaluation["manifest"]["held_out"] else "PSNR",
            ),
            (f"{psnr - mean:+.1f} dB" if math.isfinite(psnr - mean) else "none", "above the mean colour"),
            _usage_tile(evaluation),
        ]
    )
    rows = [["", "tokenizer", "palette", "mean colour"]]
    rows.append(["PSNR (dB)", *(_format_db(value, "") for value in (psnr, palette, mean))])
    rows += [
        [measure.title, measure.format_measured(evaluation[key]), "", ""]
        for key, measure in MEASURES.items()
        if key != "psnr" and evaluation.get(key) is not None
    ]
    return (
        f"<section><h2>Results</h2>{shown}<p class=verdict>{verdict(evaluation)}</p>{table(rows)}"
        f"<p class=note>{' '.join(_notes(evaluation))}</p></section>"
    )


def _usage_tile(evaluation: dict) -> tuple[str, str]:
    if evaluation["usage"] is None:
        return f"{evaluation['group_usage']:.0%}", f"usage of groups: of {evaluation['counted_codes']:,} values of bits"
    return f"{evaluation['usage']:.0%}", f"of {evaluation['codebook_size']:,} codes used"


def _notes(evaluation: dict) -> list[str]:
    fitted = has_fitted_palette(evaluation["codebook_size"])
    palette = (
        "one colour per token, from k-means on these very images, which favours the palette."
        if fitted
        else "each token's patch in its own mean colour, since there are more codes than colours."
    )
    notes = [
        f"{_count(evaluation['image_count'], 'image')}, {_count(evaluation['token_count'], 'token')}; protocol <b>"
        f"{escape(evaluation['protocol'])}</b>, {escape(describe_crop(evaluation['manifest']))}, means over images.",
        f"Mean colour: each image is replaced by its mean colour. Palette: {palette}",
    ]
    if evaluation["usage"] is None:
        notes.append(
            "There are too many codes to count. Usage and perplexity are those of groups of bits, which say less than "
            "those of codes and do not compare with them."
        )
    elif evaluation["token_count"] < 8 * evaluation["codebook_size"]:
        notes.append(
            f"This is a small test: with few tokens for {evaluation['codebook_size']:,} codes, the palette can hold "
            "nearly every token's colour, and codes may be unused by chance."
        )
    notes += [f"Warning: {escape(warning)}." for warning in evaluation.get("warnings", [])]
    notes += [
        f"{MEASURES[key].title} was not measured: {escape(reason)}."
        for key, reason in evaluation.get("not_measured", {}).items()
    ]
    if exact := evaluation["infinite_psnr_count"]:
        notes.append(f"{_count(exact, 'image')} reconstructed exactly and left out of PSNR.")
    if skipped := evaluation["skipped"]:
        notes.append(f"{_count(len(skipped), 'image')} skipped, the first: {escape(skipped[0])}.")
    return notes


def initialization(run: Path) -> str:
    """Of a run that started from other weights: which, and its validation at the start and now."""
    if (start := read_init_record(run)) is None:
        return ""
    text = (
        f"<p>From {escape(start['origin'])}, fingerprint <code>{escape(start['fingerprint'])}</code>. "
        f"{FROZEN[start['freeze']]} Discriminator: {escape(start['discriminator'])}.</p>"
    )
    if "validation" not in start:
        text += "<p>There was no validation, since data.val is not set.</p>"
    else:
        first, last = start["validation"]["start"], start["validation"]["now"]
        measures = (
            ("PSNR, dB", "psnr", "{:.2f}"),
            ("L1 on [-1, 1]", "l1", "{:.4f}"),
            ("usage of groups", "group_usage", "{:.1%}")
            if "group_usage" in last
            else ("codebook usage", "usage", "{:.1%}"),
        )
        rows = [["", f"now, step {last['step']:,}", "at the start"]]
        rows += [[name, form.format(last[key]), form.format(first[key])] for name, key, form in measures]
        text += table(rows) + "<p class=note>From validation during training, in the precision of training.</p>"
    return f"<section><h2>Initial weights</h2>{text}</section>"


def reconstructions(run: Path, evaluation: dict | None) -> str:
    """The grids that `ibq evaluate` wrote."""
    if evaluation is None:
        return ""
    shown = {}
    for name, file in evaluation["manifest"].get("pictures", {"first": "report.png"}).items():
        if (run / file).is_file():
            shown[name] = image(run / file, f"{name.capitalize()} images: original, palette and reconstruction of each")
    if not shown:
        return ""
    first = shown.pop("first", "")
    if first:
        first += "<p class=note>The first images of the set, not selected.</p>"
    has_lpips = any(evaluation.get(key) is not None for key in ("lpips_vgg", "lpips_alex"))
    more = "".join(
        f"<details><summary>The {name} by {'LPIPS' if has_lpips else 'PSNR'}</summary>{grid}</details>"
        for name, grid in shown.items()
    )
    return f"<section><h2>Reconstructions</h2>{first}{more}</section>"


def demonstration(run: Path) -> str:
    """Samples of the generator that `ibq quickstart` trained on this tokenizer's codes, if it did."""
    if not (run / SAMPLED).is_file():
        return ""
    return (
        "<section><h2>A generator of its codes</h2>"
        "<p>A small transformer was trained on the codes of the training photographs, one class for each. With so few "
        "images it mostly memorizes crops of them; it demonstrates the path from images through codes to generated "
        f"images. Its own report is <code>{run.name}/report.html</code>.</p>{sampled_images(run)}</section>"
    )


def tokenizer_next_steps(run: Path) -> str:
    folder = shlex.quote(str(run))
    return commands(
        [
            ("Reconstruct your own images", f"ibq reconstruct {folder} --images MY_PHOTOS --out pictures"),
            (
                "Evaluate it on other images",
                f"ibq evaluate reconstruction {folder} --images MY_PHOTOS --report other.json",
            ),
            ("Continue training", f"ibq resume {folder} trainer.max_steps=STEPS"),
            ("See every scalar", f"tensorboard --logdir {folder}/tensorboard"),
            ("Train on your own images", "ibq shards pack MY_PHOTOS --out tars\nibq train quickstart data.train=tars"),
            (
                "Use it from Python",
                "import model_zoo\n"
                f"tokenizer = model_zoo.load_tokenizer({str(run)!r})\n"
                "index_bhw = tokenizer.tokenize(images_bchw)      # float images in [-1, 1]\n"
                "images_bchw = tokenizer.detokenize(index_bhw)",
            ),
        ]
    )


def _decibels(psnr: float | None) -> float:
    """report.json writes null for infinity."""
    return math.inf if psnr is None else psnr


def _format_db(psnr: float, unit: str = " dB") -> str:
    return "exact" if math.isinf(psnr) else f"{psnr:.2f}{unit}"


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


# ---------------------------------------------------------------------------------------------------------- a generator


def generator_summary(run: Path, config: DictConfig) -> str:
    rows, columns = OmegaConf.select(config, "model.grid")
    grids = OmegaConf.select(config, "model.grids")
    shape = f"{rows}&times;{columns} = {rows * columns:,} codes"
    if grids:
        shape = f"codes ({' or '.join(grid.replace('x', '&times;') for grid in grids)})"
    codes, classes = OmegaConf.select(config, "model.vocabulary"), OmegaConf.select(config, "model.classes")
    return header(
        run,
        f"An autoregressive generator: for one of {classes:,} classes it predicts the {shape} of an image one "
        f"after another, each one of {codes:,}. A tokenizer decodes them to pixels.",
    )


def generation(run: Path, config: DictConfig, curves: dict[str, Curve]) -> str:
    """The validation loss next to the entropy of the code frequencies, and samples."""
    losses = [curves[name][-1].value for name in ("val/loss", "val/unigram_entropy") if curves.get(name)]
    shown = ""
    if len(losses) == 2:
        roots = [
            OmegaConf.select(config, "data.train"),
            *(one.root for one in OmegaConf.select(config, "data.sources") or ()),
        ]
        held_out = OmegaConf.select(config, "data.val") not in roots
        labels = (
            f"nats per code, {'in validation' if held_out else 'on the training images'}",
            "nats per code from code frequencies alone",
        )
        shown = tiles([(f"{loss:.2f}", label) for loss, label in zip(losses, labels, strict=True)]) + "<br>"
    return f"<section><h2>Generated images</h2>{shown}{sampled_images(run)}</section>"


def sampled_images(run: Path) -> str:
    """The run's SAMPLED, or the command that makes it."""
    if not (run / SAMPLED).is_file():
        command = escape(f"ibq sample {shlex.quote(str(run))} --count 16 --out {shlex.quote(str(run / SAMPLED))}")
        return f"<p>No samples yet. To draw some:</p><pre>{command}</pre>"
    return (
        image(run / SAMPLED, "Samples of the generator, a row for each class")
        + "<p class=note>One row per class: the first samples of the seed, not selected.</p>"
    )


def generator_next_steps(run: Path) -> str:
    folder = shlex.quote(str(run))
    return commands(
        [
            ("Draw more samples", f"ibq sample {folder} --classes 0,1 --count 64 --out samples"),
            ("Continue training", f"ibq resume {folder} trainer.max_steps=STEPS"),
            ("See every scalar", f"tensorboard --logdir {folder}/tensorboard"),
            (
                "Use it from Python",
                "import model_zoo\n"
                f"generator = model_zoo.load_generator({str(run)!r})\n"
                "logits_btk = generator(index_bt, class_b)      # logits_btk[:, t] predicts code t",
            ),
        ]
    )
