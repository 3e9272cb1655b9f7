"""The README.md of an exported model."""

import json
from pathlib import Path

from torch import nn

from model_zoo.io.hashing import fingerprint_of
from model_zoo.io.load import is_standalone
from model_zoo.io.run_layout import run_folder
from model_zoo.tokenizer import Tokenizer
from model_zoo.transformer import Transformer
from trainer import TrainerError
from trainer.reports.measures import describe_crop, plain_markdown

RESULTS = {  # key of a run's report.json -> name in the model card
    "rfid": "rFID",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "lpips_vgg": "LPIPS (VGG)",
    "lpips_alex": "LPIPS (AlexNet)",
    "l1": "L1, of images in [-1, 1]",
    "usage": "codebook usage",
    "perplexity": "codebook perplexity",
    "group_usage": "usage of groups of bits, of too many codes to count",
    "group_perplexity": "perplexity of groups of bits",
}
KINDS = {"tokenizer": "A discrete image tokenizer", "generator": "An autoregressive generator of image codes"}
USAGE = {
    "tokenizer": "codes_bhw = tokenizer.tokenize(images_bchw)  # float images in [-1, 1]; detokenize() is the inverse",
    "generator": "logits_btv = generator(codes_bt, class_b)  # logits[:, t] predicts code t from the codes before it",
}


def count_parameters(model: nn.Module) -> int:
    """The number of scalars in a model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def describe_model(model: Tokenizer | Transformer) -> str:
    """Sizes in one line."""
    config = model.config
    if isinstance(model, Tokenizer):
        sizes = (
            f"{config.quantizer}, {config.codebook_size:,} codes of {config.code_dim} dimensions, "
            f"{model.downsampling_factor} x {model.downsampling_factor} pixels per token"
        )
    else:
        grids = " or ".join(f"{rows} x {columns}" for rows, columns in config.all_grids)
        sizes = (
            f"{config.vocabulary:,} codes, {config.classes:,} classes, {grids} tokens, "
            f"depth {config.depth}, width {config.width}"
        )
    return f"{sizes}; {count_parameters(model):,} parameters"


def model_card(kind: str, model: Tokenizer | Transformer, about: dict, name: str, checkpoint: Path) -> str:
    """Markdown. about: the content of the export's config.yaml. name: of its folder."""
    facts = {
        "parameters": f"{about['parameters']:,}",
        "weights": "EMA" if about["weights"] == "ema" else "raw, without EMA",
        "fingerprint": about["fingerprint"],
        "source": about["source"] + (f", step {about['step']:,}" if about["step"] is not None else ""),
    }
    lines = [
        f"# {plain_markdown(name)}",
        "",
        f"{KINDS[kind]} (IBQ, arXiv 2412.02692), exported by `ibq`.",
        "",
        "```python",
        "import model_zoo",
        f"{kind} = model_zoo.load_{kind}({json.dumps(name)})  # this folder, or its name on the hub",
        USAGE[kind],
        "```",
        "",
        f"{describe_model(model)}.",
        "",
        *(f"- {key}: {plain_markdown(value)}" for key, value in facts.items()),
        "",
        *_results(checkpoint, model),
        "Licence: to be added by whoever distributes this model, together with its training data.",
        "",
    ]
    return "\n".join(lines)


def _results(checkpoint: Path, model: Tokenizer | Transformer) -> list[str]:
    """The results in the run's report.json, if it is of exactly these weights. Raises TrainerError."""
    path = run_folder(checkpoint) / "report.json"
    if is_standalone(checkpoint) or not path.is_file():
        return []
    try:
        report = json.loads(path.read_text())
        provenance = report.get("manifest", {})
        if provenance.get("fingerprint") != fingerprint_of(model.state_dict()):  # another step, or EMA against raw
            return ["Not measured: the run's report.json is not of these weights. `ibq evaluate` measures them.", ""]
        names = provenance["images"] if isinstance(provenance["images"], list) else [provenance["images"]]
        images = f"{report['image_count']:,} images of {plain_markdown(', '.join(names))}, {describe_crop(provenance)}"
        rows = [f"| {name} | {report[key]:.4g} |" for key, name in RESULTS.items() if report.get(key) is not None]
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise TrainerError(f"{path} is damaged: evaluate again, or remove it") from error
    if not rows:
        return []
    return [f"Measured by `ibq evaluate` on {images}:", "", "| | |", "|---|---|", *rows, ""]
