"""Claim (e): t-SNE of codes and features of runs, as in the paper's figures 1 and 2.

    python benchmarks/claims/tsne.py VQ=runs/vq IBQ=runs/ibq --images PATH --out tsne.png

Needs scikit-learn (pip install scikit-learn), which is not a dependency of ibq.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

import model_zoo
from data import evaluation_images
from trainer.recipes import load_run_config

POINTS = 2000  # number of features and number of codes, drawn with a fixed seed


@torch.no_grad()
def features_and_codes(run: Path, path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features (POINTS, d), codes (POINTS, d), and whether any feature chooses each of these codes."""
    config = load_run_config(run, [])
    tokenizer = model_zoo.load_tokenizer(run)
    images = evaluation_images(path, image_size=config.data.image_size, resize=config.data.resize)
    images_bchw = torch.stack([image.image_chw for image in images]).float() / 127.5 - 1
    z_bdhw = torch.cat([tokenizer.encode(batch_bchw) for batch_bchw in images_bchw.split(32)])
    used_k = torch.zeros(tokenizer.config.codebook_size, dtype=torch.bool)
    used_k[tokenizer.quantize.tokenize(z_bdhw).flatten()] = True
    z_nd = z_bdhw.permute(0, 2, 3, 1).flatten(0, 2)
    generator = torch.Generator().manual_seed(0)
    some_n = torch.randperm(len(z_nd), generator=generator)[:POINTS]
    some_k = torch.randperm(len(used_k), generator=generator)[:POINTS]
    return z_nd[some_n].numpy(), tokenizer.quantize.vectors(some_k).numpy(), used_k[some_k].numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    parser.add_argument("--images", required=True)
    parser.add_argument("--out", type=Path, default=Path("tsne.png"))
    arguments = parser.parse_args()
    figure = Figure(figsize=(5.5 * len(arguments.runs), 5))
    panels = figure.subplots(1, len(arguments.runs), squeeze=False)
    for panel, (name, _, run) in zip(panels[0], (pair.partition("=") for pair in arguments.runs), strict=True):
        z_nd, code_kd, used_k = features_and_codes(Path(run), arguments.images)
        plane = TSNE(init="pca", random_state=0).fit_transform(np.concatenate([z_nd, code_kd]))
        of_features, of_codes = plane[: len(z_nd)], plane[len(z_nd) :]
        panel.scatter(*of_codes[~used_k].T, s=3, c="#b8b8b8", label=f"codes, not chosen: {np.mean(~used_k):.0%}")
        panel.scatter(*of_features.T, s=3, c="#4c72b0", alpha=0.6, label="features")
        panel.scatter(*of_codes[used_k].T, s=4, c="#dd8452", label=f"codes, chosen: {np.mean(used_k):.0%}")
        panel.set(title=name, xticks=[], yticks=[])
        panel.legend(fontsize=8, loc="upper right")
    figure.tight_layout()
    figure.savefig(arguments.out, dpi=110)
    print(arguments.out)


if __name__ == "__main__":
    main()
