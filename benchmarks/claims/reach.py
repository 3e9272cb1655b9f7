"""Claim (a): codebook usage of runs as a function of the number of evaluated tokens, with its upper bound.

    python benchmarks/claims/reach.py VQ='claims/usage/vq/seed_*' IBQ='claims/usage/ibq/seed_*' --images TARS

Images are 256 x 256, in the order of ``--images``. The bound is the expected usage of n tokens if all K codes are
equally likely: 1 - (1 - 1/K)^n. Also prints the expected usage of n tokens drawn at random from all images, because
codes are never equally likely and the tokens of one image are similar.
"""

import argparse
import glob
import json
import math
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

import model_zoo
from data import evaluation_images
from trainer.metrics.codebook import CodebookUsage
from trainer.recipes import load_run_config


@torch.no_grad()
def measure_usage(run: Path, paths: list[str], size: int) -> dict:
    """Tokens and usage after every 8 images, perplexity after each path, and the share of the most frequent code."""
    config = load_run_config(run, [])
    tokenizer = model_zoo.load_tokenizer(run)
    usage = CodebookUsage(tokenizer.config.codebook_size)
    tokens, used, ends = [0], [0.0], {}
    for path in paths:
        images = iter(evaluation_images(path, image_size=size, resize=config.data.resize))
        while batch := [image.image_chw for image in islice(images, 8)]:
            usage.update(tokenizer.tokenize(torch.stack(batch).float() / 127.5 - 1))
            tokens.append(usage.token_count())
            used.append(usage.usage())
        ends[path] = {"tokens": tokens[-1], "usage": used[-1], "perplexity": usage.perplexity()}
    for end in ends.values():
        end["drawn_from_all"] = rarefied(usage.counts_k, end["tokens"])
    return {
        "run": str(run),
        "codebook_size": len(usage.counts_k),
        "tokens": tokens,
        "usage": used,
        "after": ends,
        "most_frequent_code": usage.counts_k.max().item() / usage.token_count(),
    }


def rarefied(counts_k: torch.Tensor, tokens: int) -> float:
    """Expected share of codes used by this many of the counted tokens, drawn without replacement: the mean of
    1 - C(N - c, n) / C(N, n) over codes (Hurlbert 1971)."""
    c_k, total = counts_k.double(), float(counts_k.sum())
    left_k = total - c_k - tokens  # below 0: the code is certainly drawn
    log_missed_k = torch.lgamma(total - c_k + 1) - torch.lgamma(left_k.clamp(min=0) + 1)
    log_missed_k += math.lgamma(total - tokens + 1) - math.lgamma(total + 1)
    return 1 - torch.where(left_k < 0, 0.0, log_missed_k.exp()).mean().item()


def bound(tokens: np.ndarray, codes: int) -> np.ndarray:
    """Expected share of codes used by this many tokens if all codes are equally likely."""
    return -np.expm1(tokens * np.log1p(-1 / codes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN", help="RUN may be a glob pattern: every match is plotted")
    parser.add_argument("--images", required=True, nargs="+", help="evaluated in this order; put held-out images first")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("reach.png"))
    arguments = parser.parse_args()
    found = []
    for name, _, pattern in (pair.partition("=") for pair in arguments.runs):
        runs = sorted(glob.glob(pattern))
        if not runs:
            parser.error(f"no run is at {pattern}")
        for run in runs:
            one = measure_usage(Path(run), arguments.images, arguments.size) | {"name": name}
            found.append(one)
            for path, end in one["after"].items():
                limit = bound(np.array(end["tokens"]), one["codebook_size"])
                print(
                    f"{run}, up to {path}: {end['tokens']:,} tokens use {end['usage']:.1%} of {one['codebook_size']:,} "
                    f"codes, {end['usage'] / limit:.1%} of what they could reach ({limit:.1%}); as many drawn from "
                    f"all use {end['drawn_from_all']:.1%}; perplexity {end['perplexity']:,.0f}",
                    flush=True,
                )
    draw(found, arguments.out)
    arguments.out.with_suffix(".json").write_text(json.dumps(found) + "\n")


def draw(found: list[dict], path: Path) -> None:
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(one["name"] for one in found))
    for one in found:
        color = f"C{names.index(one['name'])}"
        axes.plot(one["tokens"], one["usage"], color=color, label=one["name"])
    codes, most = found[0]["codebook_size"], max(one["tokens"][-1] for one in found)
    at = np.geomspace(64, most, 200)
    axes.plot(at, bound(at, codes), "k--", linewidth=1, label="codes equally likely")
    axes.set(xlabel="tokens evaluated", ylabel="codes used at least once", xlim=(0, most), ylim=(0, 1.02))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title(f"{codes:,} codes: used as more is looked at")
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    by_name = dict(zip(labels, handles, strict=True))  # one legend entry for all seeds
    axes.legend(by_name.values(), by_name.keys(), loc="center right")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
