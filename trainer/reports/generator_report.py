"""Sections of a generator's report.html."""

import shlex
from html import escape
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from trainer.reports.charts import Curve
from trainer.reports.html import commands, header, image, tiles

SAMPLED = "sampled.png"  # in a generator's run folder


def summary(run: Path, config: DictConfig) -> str:
    rows, columns = OmegaConf.select(config, "model.grid")
    codes, classes = OmegaConf.select(config, "model.vocabulary"), OmegaConf.select(config, "model.classes")
    return header(
        run,
        f"An autoregressive generator: for one of {classes:,} classes it predicts the {rows}&times;{columns} = "
        f"{rows * columns:,} codes of an image one after another, each one of {codes:,}. A tokenizer decodes them to "
        "pixels.",
    )


def generation(run: Path, config: DictConfig, curves: dict[str, Curve]) -> str:
    """The validation loss next to the entropy of the code frequencies, and samples."""
    losses = [curves[name][-1].value for name in ("val/loss", "val/unigram_entropy") if curves.get(name)]
    shown = ""
    if len(losses) == 2:
        held_out = OmegaConf.select(config, "data.val") != OmegaConf.select(config, "data.train")
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


def next_steps(run: Path) -> str:
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
