"""Writes random 8 x 8 patches of photographs of 64x64 as the table of VQGAN-LC (model.codes), one row of 192 values per
code. VQGAN-LC takes cluster centres of a pretrained encoder's features; patches need no pretrained network.

    python benchmarks/claims/patches.py --images TARS --out claims/patches.npy
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from data import evaluation_images

PATCH, SIZE, CODES = 8, 64, 16384


def patches(paths: list[str]) -> np.ndarray:
    """``(CODES, 192)`` fp32 values in [-1, 1], drawn without replacement with seed 0. Raises DataError."""
    found = []
    for path in paths:
        for image in evaluation_images(path, image_size=SIZE):
            found.append(torch.nn.functional.unfold(image.image_chw[None] / 127.5 - 1, PATCH, stride=PATCH)[0].T)
    patches_nd = torch.cat(found)
    if len(patches_nd) < CODES:
        raise SystemExit(f"{len(patches_nd)} patches are fewer than {CODES} codes: give more --images")
    return patches_nd[torch.randperm(len(patches_nd), generator=torch.Generator().manual_seed(0))[:CODES]].numpy()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, nargs="+", help="tars or folders")
    parser.add_argument("--out", required=True, type=Path, help=".npy file")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    np.save(arguments.out, patches(arguments.images))
